"""Who may ask: clients with a key on every route except health and the shells of pages.

A server without any key answers only its own machine, and only under a loopback name: a web page of another site can
make a browser on this machine ask any address, but not under a name of its choice (DNS rebinding). Nor does it take
anything but reading requests from such a page, which a browser sends without asking the server first.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ft_service.errors import DatabaseError
from serve.database.keys import ApiKey
from serve.http.errors import ApiError
from serve.http.rates import Rates

HEALTH_PATH = "/v1/health"
READY_PATH = "/v1/ready"
VOTE_PATHS = frozenset({"/vote", "/vote/state", "/vote/votes", "/vote/withdrawals", "/vote/reveals"})
"""Raters have no API key. Behind the page, `serve.voting.links` checks the token of their link."""
JOBS_PATH = "/jobs"
OPEN_PATHS = frozenset({HEALTH_PATH, READY_PATH, "/", JOBS_PATH}) | VOTE_PATHS
"""Health, shells of pages, which hold no data, and what checks a token of its own."""
CACHED_SECONDS = 5.0
"""So long a revoked key may still be accepted."""
_MAX_CACHED = 10_000
_READING = frozenset({"GET", "HEAD"})


class FindKey(Protocol):
    def __call__(self, key: str) -> ApiKey | None: ...


@dataclass(frozen=True)
class Client:
    """Who asks. `key` None is this machine, on a server without keys."""

    key: ApiKey | None

    @property
    def name(self) -> str:
        return self.key.name if self.key else "local"

    def may_use(self, model_id: str) -> bool:
        return self.key is None or self.key.may_use(model_id)

    def check_may_use(self, model_id: str) -> None:
        """Raises `ApiError` 403."""
        if not self.may_use(model_id):
            message = f"The key {self.name!r} may not use the model {model_id!r}. Ask for a key that may."
            raise ApiError(403, message, "model_not_allowed", "model")

    def check_may_use_all(self) -> None:
        """Raises `ApiError` 403 for a key that is limited to some models, unless it is an admin's."""
        if self.key is not None and self.key.models is not None and not self.key.is_admin:
            message = f"The key {self.name!r} may use some models only, and this covers all. Use an admin key."
            raise ApiError(403, message, "admin_required")

    def check_is_admin(self) -> None:
        """Raises `ApiError` 403."""
        if self.key is not None and not self.key.is_admin:
            message = f"The key {self.name!r} may not change anything on this server. Use an admin key."
            raise ApiError(403, message, "admin_required")


def client_of(request: Request) -> Client:
    """Who sent a request that `RequireKey` has let in."""
    client = request.scope["state"]["client"]
    assert isinstance(client, Client)
    return client


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RequireKey:
    """ASGI middleware around the whole application, so that it covers every route, known or unknown.

    `root_key` is the one of FT_API_KEY; `find_key` looks others up in the database. Without both, only pages of
    `allowed_origins` and the server's own may send anything.
    """

    def __init__(
        self,
        app: ASGIApp,
        root_key: str | None,
        find_key: FindKey | None = None,
        allowed_origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._allowed_origins = allowed_origins
        self._root = _digest(root_key.strip()) if root_key and root_key.strip() else None
        self._find_key = find_key
        self._found: dict[bytes, tuple[float, ApiKey | None]] = {}
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            client = await self._client(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})
        scope["state"]["client"] = client
        scope["state"]["rates"] = self._rates
        await self._app(scope, receive, send)

    async def _client(self, scope: Scope) -> Client | None:
        if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        headers = Headers(scope=scope)
        if self._root is None and self._find_key is None:
            _check_is_this_machine(scope, headers)
            if scope["method"] not in _READING:
                _check_is_no_foreign_page(headers, self._allowed_origins)
            return Client(None)
        key = await self._key(_bearer(headers))
        if key is None:
            raise ApiError(401, "Incorrect API key. Send 'Authorization: Bearer <key>'.", "invalid_api_key")
        self._rates.check_request(key)
        return Client(key)

    async def _key(self, given: str) -> ApiKey | None:
        digest = _digest(given)
        if self._root is not None and hmac.compare_digest(digest, self._root):
            return _ROOT
        if self._find_key is None:
            return None
        now = time.monotonic()
        cached = self._found.get(digest)
        if cached is None or now - cached[0] > CACHED_SECONDS:
            try:
                found = await asyncio.to_thread(self._find_key, given)
            except DatabaseError as error:
                raise ApiError(503, str(error), "database_error", retry_after=5) from None
            if len(self._found) >= _MAX_CACHED:
                self._found.clear()
            self._found[digest] = cached = (now, found)
        key = cached[1]
        return key if key is not None and key.is_valid(datetime.now(UTC)) else None


_ROOT = ApiKey(id="root", name="FT_API_KEY", created=datetime.fromtimestamp(0, UTC), is_admin=True)


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check_is_this_machine(scope: Scope, headers: Headers) -> None:
    client = scope.get("client")
    if not (client and is_loopback(client[0])):
        message = "This server has no API key, so it answers only its own machine. Set FT_API_KEY on the server."
        raise ApiError(401, message, "no_api_key")
    host = headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name):
        message = f"This server has no API key, so it answers only as localhost, not as {name[:100]!r}."
        raise ApiError(403, message, "host_not_allowed")


def _check_is_no_foreign_page(headers: Headers, allowed_origins: Collection[str]) -> None:
    """Trap: a body without content type is sent by any page's script, as by a form; no preflight comes before it."""
    origin = headers.get("origin")
    if origin is None:
        is_foreign = headers.get("sec-fetch-site") == "cross-site"
    else:
        is_own = origin.partition("://")[2] == headers.get("host")
        is_foreign = not is_own and origin not in allowed_origins and "*" not in allowed_origins
    if is_foreign:
        message = (
            f"This server has no API key, so it answers no page of another address ({(origin or 'unknown')[:100]}). "
            "Add the address to allowed_origins, or set FT_API_KEY."
        )
        raise ApiError(403, message, "origin_not_allowed")
