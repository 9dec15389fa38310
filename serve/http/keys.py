"""Who may ask: with an API key those who send it, without one this machine alone. Every route but health."""

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.errors import ApiError

HEALTH_PATH = "/v1/health"


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RequireKey:
    """ASGI middleware around the whole application, so that no route, known or unknown, is left out."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            response = JSONResponse(refusal.body(), refusal.status, headers={"www-authenticate": "Bearer"})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"].removeprefix(scope.get("root_path", "")) == HEALTH_PATH:
            return None
        if self._authorization is None:
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            message = "This server has no API key, so it answers its own machine alone. Set FT_API_KEY there."
            return ApiError(401, message, "no_api_key")
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, self._authorization):
            return None
        return ApiError(401, "Incorrect API key. Send 'Authorization: Bearer <FT_API_KEY>'.", "invalid_api_key")
