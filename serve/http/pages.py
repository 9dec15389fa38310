"""Self-contained pages. A page's own script is the only one that may run in it, and it may ask only this server.

What pages share is in shell/: a page that has the comments `/* shell.css */` and `/* shell.js */` gets the files there.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi.responses import HTMLResponse

SHELL = Path(__file__).with_name("shell")


def page_response(file: Path) -> HTMLResponse:
    """The page, which has one script and one style element, with headers that forbid everything else."""
    page, policy = _page(file)
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }
    return HTMLResponse(page, headers=headers)


@cache
def _page(file: Path) -> tuple[str, str]:
    """The page and its content security policy, which names the script and the style by their digests."""
    page = file.read_text(encoding="utf-8")
    for shared in SHELL.iterdir():
        page = page.replace(f"/* {shared.name} */", shared.read_text(encoding="utf-8").rstrip())
    script = _digest(page, "script")
    style = _digest(page, "style")
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
