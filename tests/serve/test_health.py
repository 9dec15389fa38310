"""Health answers whatever else a gateway does: long prompts arrive, are encoded and refused beside it."""

import json
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, Limits, ServeSettings
from tests.browser import served
from tests.worlds import SMALL, made_up_texts, write_base

WORDS = "a few words, and again "


class Idle:
    """A base whose replicas answer with nothing."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        yield GenerationChunk("", (), "stop")

    async def unload(self, adapter_digest: str) -> None: ...

    async def all_stats(self) -> list[EngineStats]:
        return []


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, made_up_texts(50), 2000, SMALL)
    base = BaseSettings(base=str(folder), name="tiny")
    settings = ServeSettings(storage=str(folder), api_key=None, limits=Limits(max_body_mib=16))
    models = ServedModels(Registry(Storage(str(folder))), [load_base(base)])
    with served(create_api(models, {"tiny": Idle()}, settings)) as address:
        httpx.post(f"{address}/v1/tokenize", json={"prompt": "x"})  # the tokenizer is loaded by now
        yield f"{address}/v1"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("tokenize", {"prompt": WORDS * 20_000}, 200),
        ("completions", {"model": "tiny", "prompt": WORDS * 300_000}, 400),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": WORDS * 300_000}]}, 400),
        ("completions", {"model": "tiny", "prompt": WORDS * 800_000}, 413),
        ("completions", {"model": "tiny", "prompt": [5] * 1_000_000}, 400),
        ("completions", {"model": "tiny", "prompt": [5] * 3_000_000}, 413),
    ],
)
def test_health_answers_while_a_long_prompt_arrives_and_is_encoded(url, path, body, status):
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    with ThreadPoolExecutor(1) as threads, httpx.Client() as client:
        reply = threads.submit(httpx.post, f"{url}/{path}", content=content, headers=headers, timeout=300)
        answers = 0
        while not reply.done():
            assert client.get(f"{url}/health", timeout=300).status_code == 200
            answers += not reply.done()
        assert reply.result().status_code == status, reply.result().text[:300]
    # Encoding so much takes a hundred times as long as answering.
    assert answers > 2 or path != "tokenize"
