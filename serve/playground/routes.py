"""Serves the playground's page. Its own script is the only one that may run in it, and it may ask only this server."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).with_name("page.html")


def playground_routes() -> APIRouter:
    """GET and HEAD /."""
    api = APIRouter()

    @api.get("/", include_in_schema=False)
    @api.head("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        page, policy = _page()
        headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "cache-control": "no-cache",
        }
        return HTMLResponse(page, headers=headers)

    return api


@cache
def _page() -> tuple[str, str]:
    """The page and its content security policy, which names the script and the style by their digests."""
    page = PAGE.read_text(encoding="utf-8")
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
