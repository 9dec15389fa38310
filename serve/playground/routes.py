"""Serves the playground's page."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from serve.http.pages import page_response

PAGE = Path(__file__).with_name("page.html")


def playground_routes() -> APIRouter:
    """GET and HEAD /."""
    api = APIRouter()

    @api.get("/", include_in_schema=False)
    @api.head("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        return page_response(PAGE)

    return api
