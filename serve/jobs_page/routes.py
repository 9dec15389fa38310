"""Serves the page of fine-tuning jobs, and what only this page asks: keys, and what each has used."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import Engine

from ft_service.storage.storage import Storage
from serve.http.keys import JOBS_PATH, client_of
from serve.http.pages import page_response
from serve.jobs_page.usage import usage_of_keys
from serve.settings import ServeSettings

PAGE = Path(__file__).with_name("page.html")


def jobs_page_routes(engine: Engine | None, settings: ServeSettings) -> APIRouter:
    """GET and HEAD /jobs; GET /v1/fine_tuning/keys and /v1/fine_tuning/bases."""
    api = APIRouter()

    @api.get(JOBS_PATH, include_in_schema=False)
    @api.head(JOBS_PATH, include_in_schema=False)
    def page() -> HTMLResponse:
        return page_response(PAGE)

    if engine is not None and settings.storage and settings.fine_tuning:
        storage = Storage(settings.storage)
        tuning = settings.fine_tuning

        @api.get("/v1/fine_tuning/keys")
        def keys(request: Request) -> dict[str, Any]:
            """The client's key with its limits and what it has used; all keys for an admin."""
            rows = usage_of_keys(engine, storage, tuning, client_of(request).key)
            return {"object": "list", "data": rows, "has_more": False}

        @api.get("/v1/fine_tuning/bases")
        def bases(request: Request) -> dict[str, Any]:
            """The models that the client may fine-tune."""
            client = client_of(request)
            data = [{"id": name, "object": "fine_tuning.base"} for name in tuning.templates if client.may_use(name)]
            return {"object": "list", "data": data, "has_more": False}

    return api
