"""How Ray Serve carries a request from its proxy to an engine. Settings of Ray's processes, and a part of its proxy.

Needs nothing of this project, and imports Ray only where a process of Ray calls it: every proxy imports this module.
"""

import asyncio
import json
import os
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RAY_SETTINGS = {
    # From the proxy to the gateway, too, and not only to engines (see `serve.gateway.Replicas`).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # On Serve's own event loop a request and each of its chunks pass to no other thread. Nothing here blocks the loop:
    # what takes long, such as encoding and parsing a long text, has threads of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.transport.proxy_middlewares",
}
"""Environment variables. Ray reads them when its processes start, so `ft serve` sets them for a Ray that it starts, and
a cluster of your own has them on every node (docs/serving.md)."""
RETRY_SECONDS = 2
SMALL_BYTES = 64 * 1024
EARLY_SECONDS = 0.05
"""A body that has not arrived by then goes the usual way."""
_BODY = "ft_service.body"
_API = "/v1/"
_PLAIN_TEXT = b"text/plain"
_EVENTS = b"text/event-stream"
_REFUSALS = {408: "request_timeout", 429: "overloaded", 503: "not_ready"}
"""Statuses that the proxy itself answers with, in plain text."""


def prepare_ray() -> None:
    """Apply `RAY_SETTINGS` to the Ray that this process starts, where the environment does not say otherwise."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


def proxy_middlewares() -> list[Middleware]:
    """Called by each of Serve's proxies at its start."""
    return [Middleware(SendBodyAlong), Middleware(ProxyErrors)]


class SendBodyAlong:
    """ASGI middleware of the proxy. A small body is in the scope that the gateway gets, and need not be asked for.

    Serve sends a gateway the scope alone, and the gateway fetches the body by a call to the proxy's actor. A gateway
    with `BodyFromScope` does not wait for that call, and after `spare_proxy_calls` it makes none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _API in scope["path"] and 0 < _content_length(scope) <= SMALL_BYTES:
            try:
                async with asyncio.timeout(EARLY_SECONDS):
                    first = await receive()
            except TimeoutError:  # a slow client; the gateway limits how long it may take
                pass
            else:
                if first["type"] == "http.request" and not first.get("more_body", False):
                    scope[_BODY] = first["body"]
                receive = _again(first, receive)
        await self._app(scope, receive, send)


class BodyFromScope:
    """ASGI middleware of the gateway: reads a body that `SendBodyAlong` has put into the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = scope.pop(_BODY, None)
        if body is not None:
            receive = _body_first(body, receive)
        await self._app(scope, receive, send)


def spare_proxy_calls() -> None:
    """For the gateway's process: ask the proxy for nothing more of a request whose body is in its scope.

    For every request Serve looks up the proxy's actor and calls it twice: for the body, and to learn that the client
    has gone (docs/benchmarks.md has what that costs). The proxy cancels the request of a client that has gone in any
    case, and that ends it here.
    """
    from ray.serve._private.common import StreamingHTTPRequest

    ask_proxy = StreamingHTTPRequest.receive_asgi_messages

    def receive_asgi_messages(request: Any) -> Any:
        return _nothing_more if _BODY in request.asgi_scope else ask_proxy.__get__(request)

    StreamingHTTPRequest.receive_asgi_messages = property(receive_asgi_messages)  # type: ignore[assignment]


async def _nothing_more(_metadata: object) -> bytes:
    """Serve cancels it when the request ends."""
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


def _again(first: Message, receive: Receive) -> Receive:
    unread = [first]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    return receive_again


def _body_first(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def receive_body_first() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the same body, the usual way
                return message

    return receive_body_first


def _content_length(scope: Scope) -> int:
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(value) if value.isdigit() else 0


class ProxyErrors:
    """ASGI middleware of the proxy. What the proxy says itself is an error in the shape that OpenAI's clients read.

    Without it, a request whose gateway dies gets a 500 in plain text without a reason, and a stream ends without an
    error. Routes that are not of OpenAI's API pass unchanged, because they may belong to other applications.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _API not in scope["path"]:
            await self._app(scope, receive, send)
            return
        kind: bytes | None = None
        refused: Message | None = None
        is_complete = False

        async def send_seen(message: Message) -> None:
            nonlocal kind, refused, is_complete
            if message["type"] == "http.response.start":
                kind = _content_type(message)
                if message["status"] in _REFUSALS and kind.startswith(_PLAIN_TEXT):
                    refused = message
                    return
            if refused is not None:  # its body is the text that is replaced
                return
            if message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, send_seen)
        if is_complete:
            return
        if refused is not None:
            status = int(refused["status"])
            await _send_error(send, scope, status, _REFUSALS[status], "The server cannot take the request now.")
        elif kind is None:
            await _send_error(send, scope, 503, "gateway_died", "The process that was answering has died.")
        elif kind.startswith(_EVENTS):
            event = _error(503, "gateway_died", "The process that was answering has died. Ask again.")
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n"})


async def _send_error(send: Send, scope: Scope, status: int, code: str, message: str) -> None:
    body = _error(status, code, f"{message} Ask again in a moment.")
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_SECONDS).encode()),
        *((name, value) for name, value in scope["headers"] if name == b"x-request-id"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _error(status: int, code: str, message: str) -> bytes:
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


def _content_type(message: Message) -> bytes:
    return next((bytes(value) for name, value in message["headers"] if bytes(name).lower() == b"content-type"), b"")
