"""The engine on transformers answers with exactly the weights that were asked for, whatever else is in its batch."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import GenerationChunk, GenerationRequest, Sampling
from serve.engines.transformers_engine import GIB, TransformersEngine
from serve.settings import BaseSettings
from tests.serve.serving_world import (
    PROMPT,
    World,
    make_world,
)

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(world) -> Iterator[TransformersEngine]:
    with running_engine(world) as engine:
        yield engine


@contextmanager
def running_engine(world: World, **settings) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(world.base, world.registry, BaseSettings(base=str(world.base), **settings))
    yield engine
    asyncio.run(engine.close())


def make_request(world: World, adapter: AdapterRecord | None = None, **changes) -> GenerationRequest:
    sampling = {name: changes.pop(name) for name in ("temperature", "top_p", "seed") if name in changes}
    fields = {
        "id": "test",
        "prompt_ids": tuple(world.tokenizer(PROMPT)["input_ids"]),
        "max_tokens": MAX_TOKENS,
        "end_ids": frozenset([world.tokenizer.eos_token_id]),
        "sampling": Sampling(**{"temperature": 0.0, **sampling}),
    }
    return GenerationRequest(adapter=adapter, **{**fields, **changes})


async def collect(engine: TransformersEngine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


def ask(
    world: World, engine: TransformersEngine, adapter: AdapterRecord | None = None, **changes
) -> list[GenerationChunk]:
    return asyncio.run(collect(engine, make_request(world, adapter, **changes)))


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def stock_text(world: World, adapter: AdapterRecord | None = None) -> str:
    ids = world.stock_answer(world.tokenizer(PROMPT)["input_ids"], MAX_TOKENS, adapter)
    return world.tokenizer.decode(ids, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}")


def test_a_slow_reader_gets_everything_that_is_ready_in_one_piece(world, engine):
    async def read_late() -> list[GenerationChunk]:
        answer = engine.generate(make_request(world, max_tokens=12, end_ids=frozenset()))
        first = await anext(answer)
        while engine.stats().running:
            await asyncio.sleep(0.001)
        return [first, *[chunk async for chunk in answer]]

    chunks = asyncio.run(read_late())
    assert sum(len(chunk.token_ids) for chunk in chunks) == 12
    assert len(chunks) <= 2 + 1


def test_the_cache_keeps_to_its_bytes(world):
    with running_engine(world, cache_gib=100_000 / GIB) as engine:
        assert 80_000 < engine._loop.store.num_bytes <= 100_000
    with pytest.raises(ServingError, match=r"cache_gib = .*16 tokens need 8,192 bytes"):
        TransformersEngine(world.base, world.registry, BaseSettings(base=str(world.base), cache_gib=1e-9))


def test_a_step_that_fails_ends_its_requests_and_no_others(world, engine, monkeypatch):
    run = engine._loop.forward.run
    steps = 0

    def fail_once(pieces, adapters):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("out of memory")
        return run(pieces, adapters)

    monkeypatch.setattr(engine._loop.forward, "run", fail_once)
    with pytest.raises(ServingError, match=r"failed in a step \(RuntimeError: out of memory\)"):
        ask(world, engine)
    assert text_of(ask(world, engine)) == stock_text(world)
    assert (engine.stats().running, engine.stats().cache_used) == (0, 0)


def test_a_base_in_nf4_answers_like_stock_transformers_in_nf4(world):
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    prompt = world.tokenizer(PROMPT)["input_ids"]
    with running_engine(world, precision="nf4") as engine:
        assert engine.info.precision == "nf4"
        answer = ask(world, engine, end_ids=frozenset())
    expected = world.stock_answer(prompt, MAX_TOKENS, quantization_config=nf4)
    assert [token_id for chunk in answer for token_id in chunk.token_ids][: len(expected)] == expected
