"""A gateway that stops refuses new requests, lets those in flight end, and cuts what takes too long."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.http.in_flight import InFlight
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, ServeSettings
from tests.worlds import SMALL, write_base

HELD = 7
SECONDS = 60


class HeldEngine:
    """A base whose answers go on only once they are released."""

    def __init__(self) -> None:
        self.begun = 0
        self.released = asyncio.Event()
        self.ended = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        try:
            yield GenerationChunk("first ", (10,), None)
            self.begun += 1
            await self.released.wait()
            yield GenerationChunk("last", (11,), "length")
        finally:
            self.ended += 1

    async def unload(self, adapter_digest: str) -> None: ...

    async def all_stats(self) -> list[EngineStats]:
        return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, ["the quick brown fox"], 280, SMALL)
    return folder


class Gateway:
    """The application in this process, over one held engine. Enter it on an event loop."""

    def __init__(self, folder: Path) -> None:
        self.in_flight = InFlight()
        self.engine = HeldEngine()
        models = ServedModels(Registry(Storage(str(folder))), [load_base(BaseSettings(base=str(folder), name="tiny"))])
        settings = ServeSettings(storage=str(folder), api_key=None)
        api = create_api(models, {"tiny": self.engine}, settings, in_flight=self.in_flight)
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def until_begun(self, answers: int) -> None:
        while self.engine.begun < answers:
            await asyncio.sleep(0.001)

    async def ask(self, stream: bool) -> httpx.Response:
        body = {"model": "tiny", "prompt": [HELD], "max_tokens": 2, "stream": stream}
        return await self.http.post("/v1/completions", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopping_gateway_refuses_new_requests_and_completes_those_in_flight(folder, stream):
    async def run() -> None:
        gateway = Gateway(folder)
        asked = asyncio.create_task(gateway.ask(stream))
        await gateway.until_begun(1)
        assert gateway.in_flight.refuse_new() == 1
        for path, method in [("/v1/completions", "POST"), ("/v1/models", "GET"), ("/", "GET")]:
            refused = await gateway.http.request(method, path, json={})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
            assert refused.json()["error"]["type"] == "server_error"
            assert int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"
        assert (await gateway.http.get("/v1/health")).status_code == 200
        ready = await gateway.http.get("/v1/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "server_stopping")
        gateway.engine.released.set()
        reply = await asked
        assert reply.status_code == 200 and '"length"' in reply.text.replace(" ", "")
        assert not stream or reply.text.endswith("data: [DONE]\n\n")
        assert gateway.in_flight.refuse_new() == 0

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_answers_that_are_cut_end_in_an_error_and_cost_no_more_compute(folder):
    async def run() -> None:
        gateway = Gateway(folder)
        whole = asyncio.create_task(gateway.ask(stream=False))
        streamed = asyncio.create_task(gateway.ask(stream=True))
        await gateway.until_begun(2)
        assert gateway.in_flight.cut() == 2
        reply = await whole
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "server_stopping")
        events = [line.removeprefix("data: ") for line in (await streamed).text.split("\n") if line]
        assert json.loads(events[-1])["error"]["code"] == "server_stopping" and "[DONE]" not in events
        assert gateway.engine.ended == 2 and gateway.in_flight.requests == 0

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_an_answer_that_begins_after_the_cut_is_cut_too():
    in_flight = InFlight()
    in_flight.cut()
    errors = []
    with in_flight.answering(errors.append):
        pass
    assert [error.code for error in errors] == ["server_stopping"]


def test_an_answer_that_has_ended_is_not_cut():
    in_flight = InFlight()
    errors = []
    with in_flight.answering(errors.append):
        pass
    in_flight.cut()
    assert errors == []
