"""How a gateway stops: it refuses new requests, lets those in flight end, and cuts what takes too long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.errors import ApiError
from serve.http.keys import HEALTH_PATH, READY_PATH

RETRY_SECONDS = 5
_ALWAYS_ANSWERED = frozenset({HEALTH_PATH, READY_PATH})

Cut = Callable[[ApiError], None]


class InFlight:
    """The requests that one gateway answers, health aside. Use it on the gateway's event loop only."""

    def __init__(self) -> None:
        self.is_stopping = False
        self.requests = 0
        self._is_cut = False
        self._cuts: set[Cut] = set()

    def refuse_new(self) -> int:
        """Accept no request from now on. Returns how many are in flight."""
        self.is_stopping = True
        return self.requests

    def cut(self) -> int:
        """End every answer with an error, also those that have yet to begin. Returns how many are in flight."""
        self._is_cut = True
        for cut in tuple(self._cuts):
            cut(_cut_short())
        return self.refuse_new()

    @contextmanager
    def answering(self, cut: Cut) -> Iterator[None]:
        """`cut` is called, at most once, with the error that ends this answer."""
        if self._is_cut:
            cut(_cut_short())
        self._cuts.add(cut)
        try:
            yield
        finally:
            self._cuts.discard(cut)


def stopping() -> ApiError:
    """What a request gets that comes too late."""
    message = "The server is stopping and takes no new requests. Ask again in a moment, or ask another server."
    return ApiError(503, message, "server_stopping", retry_after=RETRY_SECONDS)


def _cut_short() -> ApiError:
    message = "The server has stopped before the answer was complete. Ask again, or ask another server."
    return ApiError(503, message, "server_stopping", retry_after=RETRY_SECONDS)


class CountInFlight:
    """ASGI middleware. Counts requests until their last byte, and refuses new ones once the server stops."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        if self._in_flight.is_stopping:
            response = stopping().response()
            response.headers["connection"] = "close"  # the next request then finds another server
            await response(scope, receive, send)
            return
        self._in_flight.requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.requests -= 1
