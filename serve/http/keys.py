"""Access control of every route except health: clients with the API key, or only this machine if no key is set."""

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.errors import ApiError

HEALTH_PATH = "/v1/health"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RequireKey:
    """ASGI middleware around the whole application, so that it covers every route, known or unknown."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._access_error(scope)):
            response = JSONResponse(error.body(), error.status, headers={"www-authenticate": "Bearer"})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _access_error(self, scope: Scope) -> ApiError | None:
        if scope["path"].removeprefix(scope.get("root_path", "")) == HEALTH_PATH:
            return None
        if self._authorization is None:
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            message = "This server has no API key, so it answers only its own machine. Set FT_API_KEY on the server."
            return ApiError(401, message, "no_api_key")
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, self._authorization):
            return None
        return ApiError(401, "Incorrect API key. Send 'Authorization: Bearer <FT_API_KEY>'.", "invalid_api_key")
