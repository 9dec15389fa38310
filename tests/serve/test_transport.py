"""What Serve's proxy answers itself: it has the shape of all other errors."""

import asyncio
import json
import os
import pickle
from typing import Any

import pytest

from serve import transport
from serve.transport import (
    RAY_SETTINGS,
    SMALL_BYTES,
    BodyFromScope,
    ProxyErrors,
    SendBodyAlong,
    prepare_ray,
    proxy_middlewares,
    spare_proxy_calls,
)
from tests.hosts import ROOT

PLAIN = [(b"content-type", b"text/plain; charset=utf-8")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


def start(status: int, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def sent_after(*messages: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    """What a client gets when the proxy has sent `messages` and then no more."""
    sent: list[dict[str, Any]] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    middleware = proxy_middlewares()[-1]
    scope = {"type": "http", "path": path, "headers": [(b"x-request-id", b"abc")]}

    async def run() -> None:
        await middleware.cls(proxy, *middleware.args, **middleware.kwargs)(scope, receive, send)

    asyncio.run(run())
    return sent


def error_of(body: bytes) -> dict[str, Any]:
    return json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/v1/completions", "/other/v1/models"])
def test_a_request_whose_gateway_dies_gets_an_error_that_clients_read_and_repeat(path):
    begin, body = sent_after(path=path)
    assert begin["status"] == 503
    headers = dict(begin["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert headers[b"x-request-id"] == b"abc"
    assert int(headers[b"retry-after"]) > 0
    error = error_of(body["body"])
    assert (error["type"], error["code"], error["param"]) == ("server_error", "gateway_died", None)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (408, "request_timeout", "invalid_request_error"),
        (429, "overloaded", "rate_limit_error"),
        (503, "not_ready", "server_error"),
    ],
)
def test_what_the_proxy_says_in_plain_text_is_said_in_json(status, code, kind):
    begin, body = sent_after(start(status, PLAIN), part(b"Request 1 failed."))
    assert begin["status"] == status
    assert (error_of(body["body"])["code"], error_of(body["body"])["type"]) == (code, kind)


def test_a_stream_whose_gateway_dies_ends_in_an_error_event():
    begun = [start(200, EVENTS), part(b"data: {}\n\n", more=True)]
    *before, last = sent_after(*begun)
    assert before == begun
    assert not last.get("more_body", False)
    text = last["body"].decode()
    assert text.startswith("data: ") and text.endswith("\n\n")
    assert error_of(text.removeprefix("data: ").encode())["code"] == "gateway_died"


@pytest.mark.parametrize(
    "messages",
    [
        [start(200, EVENTS), part(b"data: [DONE]\n\n", more=True), part(b"")],
        [start(503, JSON), part(b"{}")],
        [start(404, PLAIN), part(b"Path '/v1/x' not found.")],
        [start(200, JSON), part(b"{", more=True)],
    ],
    ids=["whole stream", "the gateway's own error", "unknown path", "half a reply in JSON"],
)
def test_everything_else_passes_as_it_is(messages):
    assert sent_after(*messages) == messages


def test_other_applications_of_the_cluster_are_left_alone():
    assert sent_after(path="/other") == []
    assert sent_after(start(503, PLAIN), part(b"no"), path="/other") == [start(503, PLAIN), part(b"no")]


def test_ray_gets_the_settings_that_the_environment_does_not_have(monkeypatch):
    for name in RAY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0")
    prepare_ray()
    assert {name: os.environ[name] for name in RAY_SETTINGS} == {**RAY_SETTINGS, "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"}
    for name in RAY_SETTINGS:
        monkeypatch.delenv(name)


def test_the_documentation_names_the_settings():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert all(f"export {name}={value}\n" in text for name, value in RAY_SETTINGS.items())


def test_the_proxy_can_import_what_the_settings_name():
    from ray.serve._private.utils import call_function_from_import_path

    found = call_function_from_import_path(RAY_SETTINGS["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert [middleware.cls for middleware in found] == [SendBodyAlong, ProxyErrors]


def received(*parts: dict[str, Any], length: bytes, takes_body: bool) -> tuple[list[dict[str, Any]], int]:
    """What an application behind proxy and gateway receives of a request, and how often it asked the proxy for it."""
    left = list(parts)
    asked = 0
    got: list[dict[str, Any]] = []

    async def from_client() -> Any:
        return left.pop(0) if left else await asyncio.Event().wait()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            got.append(dict(await receive()))
            if not got[-1].get("more_body", False):
                return

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        """Hands a copy of the scope to the gateway, which asks for the rest."""

        async def ask_proxy() -> Any:
            nonlocal asked
            asked += 1
            return await receive()

        gateway = BodyFromScope(application) if takes_body else application
        await gateway(dict(scope), ask_proxy, send)

    async def run() -> None:
        scope = {"type": "http", "path": "/v1/completions", "headers": [(b"content-length", length)]}
        await SendBodyAlong(serve)(scope, from_client, no_answer)

    asyncio.run(run())
    return got, asked


async def no_answer(message: Any) -> None:
    raise AssertionError(message)


def request_part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_small_body_comes_with_the_request():
    assert received(request_part(b"{}"), length=b"2", takes_body=True) == ([request_part(b"{}")], 0)


def test_a_gateway_without_the_middleware_gets_the_body_the_usual_way():
    assert received(request_part(b"{}"), length=b"2", takes_body=False) == ([request_part(b"{}")], 1)


def test_a_body_that_is_large_or_comes_in_parts_goes_the_usual_way():
    parts = [request_part(b"{", more=True), request_part(b"}")]
    assert received(*parts, length=b"2", takes_body=True) == (parts, 2)
    whole = request_part(b" " * (SMALL_BYTES + 1))
    assert received(whole, length=str(SMALL_BYTES + 1).encode(), takes_body=True) == ([whole], 1)
    assert received(request_part(b"{}"), length=b"two", takes_body=True) == ([request_part(b"{}")], 1)


def test_a_client_that_is_slow_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(transport, "EARLY_SECONDS", 0)
    late = request_part(b"{}")

    async def run() -> list[Any]:
        has_begun = asyncio.Event()
        got: list[Any] = []

        async def from_client() -> Any:
            await has_begun.wait()
            return late

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            has_begun.set()
            got.extend([sorted(scope), await receive()])

        scope = {"type": "http", "path": "/v1/completions", "headers": [(b"content-length", b"2")]}
        await SendBodyAlong(serve)(scope, from_client, no_answer)
        return got

    assert asyncio.run(run()) == [["headers", "path", "type"], late]


def test_a_client_that_goes_away_is_noticed_after_the_body():
    gone = {"type": "http.disconnect"}

    async def run() -> list[Any]:
        left = [request_part(b"{}"), gone]
        got: list[Any] = []

        async def from_proxy() -> Any:
            return left.pop(0)

        async def application(scope: Any, receive: Any, send: Any) -> None:
            got.extend([await receive(), await receive()])

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            await BodyFromScope(application)(dict(scope), receive, send)

        scope = {"type": "http", "path": "/v1/completions", "headers": [(b"content-length", b"2")]}
        await SendBodyAlong(serve)(scope, from_proxy, no_answer)
        return got

    assert asyncio.run(run()) == [request_part(b"{}"), gone]


def test_the_proxy_is_asked_for_nothing_of_a_request_whose_body_came_along(monkeypatch):
    from ray.serve._private.common import StreamingHTTPRequest
    from ray.serve._private.http_util import ASGIReceiveProxy

    monkeypatch.setattr(StreamingHTTPRequest, "receive_asgi_messages", StreamingHTTPRequest.receive_asgi_messages)
    spare_proxy_calls()
    messages = [[request_part(b"{}")], [{"type": "http.disconnect"}]]

    async def ask_proxy(metadata: Any) -> bytes:
        return pickle.dumps(messages.pop(0))

    async def run(scope: dict[str, Any]) -> tuple[list[Any], bool]:
        """As Serve's replica does: what the application receives, and whether Serve goes on asking the proxy."""
        request: Any = StreamingHTTPRequest(scope, receive_asgi_messages=ask_proxy)
        receive = ASGIReceiveProxy(scope, request, request.receive_asgi_messages)
        fetching = asyncio.ensure_future(receive.fetch_until_disconnect())
        got: list[Any] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            got.append(await receive())

        await BodyFromScope(application)(scope, receive, no_answer)
        for _ in range(10):  # it would have asked for both messages by then
            await asyncio.sleep(0)
        is_asking = not fetching.done()
        fetching.cancel()
        await asyncio.wait([fetching])
        return got, is_asking

    scope = {"type": "http", "path": "/v1/completions"}
    assert asyncio.run(run({**scope, "ft_service.body": b"{}"})) == ([request_part(b"{}")], True)
    assert len(messages) == 2
    assert asyncio.run(run(scope)) == ([request_part(b"{}")], False)
    assert not messages
