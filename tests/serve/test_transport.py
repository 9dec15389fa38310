"""What Serve's proxy answers itself: it has the shape of all other errors."""

import asyncio
import json
import os
from typing import Any

import pytest

from serve.transport import RAY_SETTINGS, ProxyErrors, prepare_ray, proxy_middlewares
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

    (middleware,) = proxy_middlewares()
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

    (middleware,) = call_function_from_import_path(RAY_SETTINGS["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
    assert middleware.cls is ProxyErrors
