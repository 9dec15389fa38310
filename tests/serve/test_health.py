"""Health answers whatever else a gateway does: long prompts arrive, are encoded and refused beside it."""

import threading
import time
from collections.abc import AsyncGenerator, Iterator

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
MIB = 2**20


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
    settings = ServeSettings(storage=str(folder), api_key=None, limits=Limits(max_body_mib=32))
    models = ServedModels(Registry(Storage(str(folder))), [load_base(base)])
    with served(create_api(models, {"tiny": Idle()}, settings)) as address:
        httpx.post(f"{address}/v1/tokenize", json={"prompt": "x"})  # the tokenizer is loaded by now
        yield f"{address}/v1"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tokenize", {"prompt": WORDS * (20 * MIB // len(WORDS))}),
        ("completions", {"model": "tiny", "prompt": WORDS * (20 * MIB // len(WORDS))}),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": WORDS * (MIB // 2)}]}),
        ("completions", {"model": "tiny", "prompt": WORDS * (45 * MIB // len(WORDS))}),
        ("completions", {"model": "tiny", "prompt": [5] * (4 * MIB)}),
    ],
)
def test_health_answers_while_a_long_prompt_arrives_and_is_encoded(url, path, body):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(httpx.post(f"{url}/{path}", json=body, timeout=300)))
    with httpx.Client() as client:
        client.get(f"{url}/health")
        thread.start()
        took = []
        while thread.is_alive():
            began = time.perf_counter()
            assert client.get(f"{url}/health").status_code == 200
            took.append(time.perf_counter() - began)
            time.sleep(0.002)
    print(path, replies[0].status_code, replies[0].text[:200], len(took), max(took), sorted(took)[len(took) // 2])
