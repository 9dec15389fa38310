"""Health answers whatever else a gateway does: long prompts arrive, are encoded and refused beside it."""

import json
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer

from ft_service.model.base import load_tokenizer
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest, TokenLogprob
from serve.http.body import LARGE_BYTES, _values
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.inference.replies import CompletionShape
from serve.inference.tokens import LONG_CHARACTERS, BaseTokens
from serve.inference.wire import ChatRequest, Choice, CompletionRequest, TokenizeRequest
from serve.settings import BaseSettings, Limits, ServeSettings
from tests.browser import served
from tests.worlds import SMALL, made_up_texts, write_base

WORDS = "a few words, and again "


class Idle:
    """A base whose replicas answer with nothing, or with very many log-probabilities."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        top = tuple(TokenLogprob(number, b"x", -1.0) for number in range(20))
        tokens = 0 if request.logprobs is None else 200
        yield GenerationChunk("", (5,) * tokens, "stop", (TokenLogprob(5, b"x", -0.5, top),) * tokens)

    async def unload(self, adapter_digest: str) -> None: ...

    async def all_stats(self) -> list[EngineStats]:
        return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, made_up_texts(50), 2000, SMALL)
    return folder


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
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
        ("completions", {"model": "tiny", "prompt": [None] * 1_000_000}, 400),
        ("completions", {"model": "tiny", "prompt": ["x"] * 1_000_000}, 413),
        ("completions", {"model": "tiny", "prompt": [[5]] * 500_000}, 413),
        ("chat/completions", {"model": "tiny", "messages": [7] * 1_000_000}, 400),
        ("tokenize", {"messages": [7] * 1_000_000}, 400),
        ("tokenize", {"prompt": WORDS * 50_000}, 413),
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


class Planted:
    """Work that goes on until the test ends it."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.ended = threading.Event()

    def work(self) -> None:
        self.has_begun.set()
        assert self.ended.wait(60)


def ask(url: str, prompt: object) -> httpx.Response:
    return httpx.post(f"{url}/tokenize", json={"prompt": prompt}, timeout=60)


def answers_meanwhile(url: str, planted: Planted, long_request: Callable[[], httpx.Response]) -> None:
    """Health and a short request are answered while the planted work of a long request goes on."""
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(long_request)
        try:
            assert planted.has_begun.wait(60)
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
            assert ask(url, "a few words").status_code == 200
            assert not reply.done()
        finally:
            planted.ended.set()
        assert reply.result().status_code == 200


def test_health_and_short_requests_do_not_wait_while_a_long_text_is_encoded(url, monkeypatch):
    planted = Planted()
    encode = BaseTokens.prompt_ids

    def slow(tokens: BaseTokens, text: str) -> list[int]:
        if len(text) > LONG_CHARACTERS:
            planted.work()
        return encode(tokens, text)

    monkeypatch.setattr(BaseTokens, "prompt_ids", slow)
    answers_meanwhile(url, planted, lambda: ask(url, "x " * LONG_CHARACTERS))


def test_health_and_short_requests_do_not_wait_while_a_large_body_is_parsed(url, monkeypatch):
    planted = Planted()
    parse = TokenizeRequest.model_validate_json

    def slow(body: bytes) -> TokenizeRequest:
        if len(body) > LARGE_BYTES:
            planted.work()
        return parse(body)

    monkeypatch.setattr(TokenizeRequest, "model_validate_json", slow)
    answers_meanwhile(url, planted, lambda: ask(url, "x " * LARGE_BYTES))


def test_health_and_short_requests_do_not_wait_while_a_long_reply_is_written(url, monkeypatch):
    planted = Planted()
    write = CompletionShape.choice

    def slow(shape: CompletionShape, *arguments: Any) -> Choice:
        planted.work()
        return write(shape, *arguments)

    monkeypatch.setattr(CompletionShape, "choice", slow)
    body = {"model": "tiny", "prompt": [5], "max_tokens": 1, "logprobs": 20}
    answers_meanwhile(url, planted, lambda: httpx.post(f"{url}/completions", json=body, timeout=60))


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"model": "tiny", "prompt": [None] * 1000}),
        (CompletionRequest, {"model": "tiny", "prompt": [-1] * 1000}),
        (CompletionRequest, {"model": "tiny", "prompt": [[-1]] * 1000}),
        (CompletionRequest, {"model": "tiny", "prompt": "x", "stop": [1] * 1000}),
        (CompletionRequest, {"model": "tiny", "prompt": "x", "logit_bias": {str(i): "x" for i in range(2000)}}),
        (ChatRequest, {"model": "tiny", "messages": [7] * 1000}),
        (ChatRequest, {"model": "tiny", "messages": [{}], "tools": [7] * 1000}),
        (TokenizeRequest, {"messages": [7] * 1000}),
        (TokenizeRequest, {"messages": [{}], "tools": [{}] * 1000}),
    ],
)
def test_many_wrong_items_are_few_errors(model: type[BaseModel], body):
    """An error for each of a million items takes seconds, in which the whole process stands still."""
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() < 10


def test_a_text_that_cannot_fit_is_refused_after_a_few_pieces_of_it_are_encoded(folder, monkeypatch):
    tokens = BaseTokens(load_base(BaseSettings(base=str(folder))))
    context = 20_000
    piece_lengths = []
    encode = BaseTokens.ids_without_begin

    def counted(tokens: BaseTokens, text: str) -> list[int]:
        piece_lengths.append(len(text))
        return encode(tokens, text)

    monkeypatch.setattr(BaseTokens, "ids_without_begin", counted)
    text = "1 2 3 4 5 6 " * 20_000
    assert len(text) // tokens.max_token_characters < context  # not refused by its length alone
    assert tokens.exceeds([text], context)
    assert max(piece_lengths) <= LONG_CHARACTERS and sum(piece_lengths) < len(text)
    piece_lengths.clear()
    assert not tokens.exceeds([text[: 4 * context]], context) and piece_lengths == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'["a, [b]", "c"]', 2 * 4 + 1 + 10),
        (rb'{"a\"b": [1, 2]}', 4 + 1 + 2 * 10),
        (b"[" * 1000, 0),  # refused as soon as it is parsed
        (b'"never closed, ' + rb"\"" * 1000, 4),
    ],
)
def test_a_body_is_weighed_by_what_parsing_it_costs(monkeypatch, body, expected):
    monkeypatch.setattr("serve.http.body.MAX_VALUES", 100)
    padded = body + b'"' + b"," * 200 + b'"'  # a text with commas, so that the exact count is needed
    assert _values(body) == expected or _values(padded) == expected + 4


def test_a_tokenizer_that_truncates_or_pads_still_gives_whole_texts(folder, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(folder, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(copy / "tokenizer.json"))
    plain = BaseTokens(load_base(BaseSettings(base=str(folder))))
    tokens = BaseTokens(load_base(BaseSettings(base=str(copy))))
    for text in ("", "a", WORDS * 10, "<|begin_of_text|>again"):
        assert tokens.prompt_ids(text) == plain.prompt_ids(text)
        assert tokens.ids_without_begin(text) == load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
