"""Request ids, and one structured line in the log for each request. Neither prompts, answers nor keys are in it."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import as_api_error
from serve.log import log_fields

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET_PATHS = frozenset({"/v1/health", "/v1/ready"})

logger = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware. Puts into the request's state its `request_id`, `log` (fields that routes add to) and `headers`
    (which every reply gets from then on, errors too)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")  # Serve's proxy gives every request one
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, object] = {}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["log"] = fields
        added: dict[str, str] = {}
        state["headers"] = added
        status = 0
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(added)
                if not given:
                    headers.append(REQUEST_ID_HEADER, request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # Starlette's own answer to what nobody expected would pass by this middleware: it would have no headers.
            if status:
                raise
            await as_api_error(error).response()(scope, receive, send_with_id)
        finally:
            if scope["path"].removeprefix(scope.get("root_path", "")) not in _QUIET_PATHS:
                fields = {
                    "request": request_id,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "seconds": round(time.perf_counter() - began, 4),
                    **fields,
                }
                log_fields(logger, fields)
