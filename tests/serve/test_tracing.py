"""One request is one trace, from its client to the engine: the real SDK, and a collector in this process."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ray import serve
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from examples.quickstart.quickstart import free_ports
from serve.app import app
from serve.http.access import AccessLog
from serve.http.traces import TraceRequests
from serve.run import LOGGING
from serve.settings import ServeSettings
from serve.tracing import Tracing, traceparent
from tests.hosts import ROOT, Cluster, wait_for
from tests.serve.serving_world import PROMPT, SENTENCE, World, make_world
from tests.shared_cluster import joined

SECONDS = 90
TOKENS = 5


@dataclass
class Collector:
    """What an OpenTelemetry collector receives over HTTP."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def spans(self, trace: str) -> dict[str, tuple[str, Span]]:
        """Name -> service and span, of one trace."""
        found = {}
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                (service,) = (it.value.string_value for it in resource.resource.attributes if it.key == "service.name")
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    if span.trace_id.hex() == trace:
                        found[span.name] = (service, span)
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            found.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Server:
    url: str
    collector: Collector
    world: World

    def ask(self, trace: str, flags: str = "01", **body: object) -> httpx.Response:
        body = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **body}
        headers = {"traceparent": f"00-{trace}-{'b7' * 8}-{flags}", "x-request-id": f"id-{trace[:4]}"}
        return httpx.post(f"{self.url}/completions", json=body, headers=headers, timeout=SECONDS, trust_env=False)


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    world = make_world(tmp_path_factory.mktemp("world"))
    (port,) = free_ports(1)
    with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with joined(cluster, environment):
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            try:
                serve.run(app(ServeSettings(storage=world.storage)), name="traced", logging_config=LOGGING)
                yield Server(f"http://127.0.0.1:{port}/v1", collector, world)
            finally:
                serve.shutdown()


def attributes(span: Span) -> dict[str, object]:
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in span.attributes}


@pytest.mark.cluster
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_request_is_one_trace_from_its_client_to_the_engine(server: Server, stream: bool) -> None:
    trace = ("cd" if stream else "ab") * 16
    reply = server.ask(trace, model=server.world.adapters[0].id, stream=stream)
    assert reply.status_code == 200, reply.text
    names = {"POST /v1/completions", "engine", "queue", "prefill", "decode"}
    wait_for(lambda: set(server.collector.spans(trace)) == names, SECONDS)
    spans = server.collector.spans(trace)

    service, gateway = spans["POST /v1/completions"]
    assert service == "ft-gateway" and gateway.kind == Span.SPAN_KIND_SERVER
    assert gateway.parent_span_id.hex() == "b7" * 8
    assert attributes(gateway)["ft.request.id"] == f"id-{trace[:4]}"
    assert attributes(gateway)["http.response.status_code"] == 200

    service, engine = spans["engine"]
    assert service == "ft-engine" and engine.parent_span_id == gateway.span_id
    assert attributes(engine) == {
        "ft.request.id": f"id-{trace[:4]}",
        "ft.base": "tiny-llama",
        "ft.adapter": server.world.adapters[0].id,
        "ft.outcome": "ok",
        "ft.cached_tokens": attributes(engine)["ft.cached_tokens"],
        "gen_ai.usage.input_tokens": len(server.world.tokenizer(PROMPT)["input_ids"]),
        "gen_ai.usage.output_tokens": TOKENS,
    }
    phases = [spans[name][1] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent_span_id == engine.span_id for phase in phases)
    edges = [time for phase in phases for time in (phase.start_time_unix_nano, phase.end_time_unix_nano)]
    assert edges == sorted(edges) and edges[1] == edges[2] and edges[3] == edges[4]
    assert engine.start_time_unix_nano <= edges[0] and edges[-1] <= engine.end_time_unix_nano


@pytest.mark.cluster
def test_no_text_of_prompt_or_answer_leaves_the_server(server: Server) -> None:
    trace = "12" * 16
    text = server.ask(trace, max_tokens=24).json()["choices"][0]["text"]
    wait_for(lambda: len(server.collector.spans(trace)) == 5, SECONDS)
    sent = b"".join(server.collector.bodies)
    assert text.startswith(SENTENCE[:4])
    assert PROMPT.strip().encode() not in sent and SENTENCE[:4].encode() not in sent


@pytest.mark.cluster
def test_a_trace_that_its_client_does_not_sample_is_not_sent(server: Server) -> None:
    assert server.ask("34" * 16, flags="00").status_code == 200
    assert server.ask("56" * 16).status_code == 200
    wait_for(lambda: len(server.collector.spans("56" * 16)) == 5, SECONDS)
    assert server.collector.spans("34" * 16) == {}


@pytest.mark.cluster
def test_a_request_that_an_engine_refuses_has_the_kind_of_its_error_only(server: Server) -> None:
    reply = server.ask("78" * 16, prompt=[5, 6], max_tokens=3, logit_bias={"100000": 1})
    assert reply.status_code == 400
    wait_for(lambda: "POST /v1/completions" in server.collector.spans("78" * 16), SECONDS)
    _, gateway = server.collector.spans("78" * 16)["POST /v1/completions"]
    assert attributes(gateway)["http.response.status_code"] == 400 and "100000" not in str(gateway)


@pytest.mark.cluster
def test_the_line_in_the_log_names_the_trace(server: Server, cluster: Cluster) -> None:
    server.ask("9a" * 16)

    def found() -> list[dict]:
        lines = [
            line
            for file in cluster.sessions.rglob("logs/serve/replica_traced*.log")
            for line in file.read_text(errors="replace").splitlines()
            if line.startswith("{")
        ]
        fields = [json.loads(line).get("ft") or {} for line in lines]
        return [one for one in fields if one.get("request") == "id-9a9a" and "status" in one]

    wait_for(lambda: bool(found()), SECONDS)
    assert found()[0]["trace"] == "9a" * 16


def test_without_a_collector_nothing_is_imported() -> None:
    code = """
import sys
from serve.tracing import Tracing, continued
assert Tracing.from_environment("x") is None
requests = [object()]
assert continued(requests) is requests
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_standard_variables_turn_it_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.from_environment("x") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    tracing = Tracing.from_environment("x")
    assert tracing is not None
    tracing.close()


def test_a_request_is_answered_although_the_collector_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing = Tracing.from_environment("x")
    assert tracing is not None
    seen: list[str] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(traceparent.get())
        await PlainTextResponse("yes")(scope, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(AccessLog(TraceRequests(answer, tracing)))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            reply = await client.get("/")
        assert traceparent.get() == ""  # the next request of this task has no trace of this one
        return reply

    assert asyncio.run(ask()).text == "yes"
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", seen[0])
    tracing.close()
