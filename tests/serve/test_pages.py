"""The pages of the server: what they share is put into each, and only their own script and style may run."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from serve.http.pages import SHELL, page_response
from serve.jobs_page import routes as jobs_page
from serve.playground import routes as playground
from serve.voting import routes as voting

PAGES = (jobs_page.PAGE, playground.PAGE, voting.PAGE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_what_pages_share_and_its_policy_names_the_whole(page: Path) -> None:
    response = page_response(page)
    text = bytes(response.body).decode()
    for shared in SHELL.iterdir():
        assert f"/* {shared.name} */" not in text
        assert shared.read_text(encoding="utf-8").rstrip() in text
    policy = response.headers["content-security-policy"]
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
