"""The engine on transformers answers with exactly the weights that were asked for, whatever else is in its batch."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import GenerationChunk, GenerationRequest, Sampling
from serve.engines.transformers_engine import GIB, TransformersEngine
from serve.settings import BaseSettings
from tests.serve.serving_world import (
    PROMPT,
    SENTENCE,
    World,
    change_json,
    damage,
    draft_record,
    make_world,
    publish_adapter,
    write_adapter,
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


def test_base_and_adapters_in_turn_match_plain_peft(world, engine):
    speakers = [None, *world.adapters]
    expected = [stock_text(world, adapter) for adapter in speakers]
    assert len(set(expected)) == 3
    for speaker in (0, 1, 2, 0, 2, 1, 0):
        assert text_of(ask(world, engine, speakers[speaker])) == expected[speaker]


def test_the_end_token_ends_the_answer_and_is_counted(world, engine):
    chunks = ask(world, engine, max_tokens=500)
    stock_ids = world.stock_answer(world.tokenizer(PROMPT)["input_ids"], 500)
    assert text_of(chunks) == SENTENCE
    assert chunks[-1].finish_reason == "stop"
    assert sum(len(chunk.token_ids) for chunk in chunks) == len(stock_ids)


def test_an_answer_cut_by_max_tokens_says_so(world, engine):
    chunks = ask(world, engine, max_tokens=5)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert sum(len(chunk.token_ids) for chunk in chunks) == 5


def test_a_stop_string_ends_the_answer(world, engine):
    chunks = ask(world, engine, max_tokens=500, stop=("東京",))
    assert text_of(chunks) == "日本の首都は"
    assert chunks[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(engine, world):
    adapter = world.adapters[0]
    sampled = [text_of(ask(world, engine, adapter, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_smallest_top_p_keeps_only_the_likeliest_token(engine, world):
    adapter = world.adapters[0]
    assert text_of(ask(world, engine, adapter, temperature=2.0, top_p=0.0)) == text_of(ask(world, engine, adapter))


def test_a_damaged_adapter_fails_and_others_still_answer(world, engine, tmp_path):
    broken = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=3)
    damage(world.registry, broken)
    with pytest.raises(ServingError, match=rf"{broken.id}.*adapter_model\.safetensors.*changed since publishing"):
        ask(world, engine, broken)
    assert text_of(ask(world, engine)) == SENTENCE[: len(text_of(ask(world, engine)))]


def test_a_pickled_adapter_is_never_loaded(world, engine, tmp_path):
    work = tmp_path / "adapter"
    write_adapter(world.base, work, seed=4)
    (work / "adapter_model.safetensors").rename(work / "adapter_model.bin")
    pickled = world.registry.publish(work, draft_record(world.base, "pickled"), "tiny-llama", "")
    with pytest.raises(ServingError, match=r"adapter_model\.safetensors missing"):
        ask(world, engine, pickled)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},  # peft would leave the other weights out
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]},
        {"r": 8},
        {"target_modules": ["no_such_module"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_a_misfit_adapter_fails_without_changing_others(world, engine, tmp_path, changes):
    misfit = _publish_with_config(world, tmp_path / "adapter", **changes)
    with pytest.raises(ServingError, match=f"{misfit.id}.*(does not fit|changes its base)"):
        ask(world, engine, misfit)
    assert text_of(ask(world, engine)) == stock_text(world)
    assert text_of(ask(world, engine, world.adapters[0])) == stock_text(world, world.adapters[0])


def _publish_with_config(world: World, work: Path, **changes: object) -> AdapterRecord:
    write_adapter(world.base, work, seed=5)
    change_json(work / "adapter_config.json", **changes)
    return world.registry.publish(work, draft_record(world.base, "misfit"), "tiny-llama", "")


def test_the_least_recently_used_adapter_is_dropped_and_reloads(world):
    first, second = world.adapters
    nbytes = (world.registry.folder(first) / "adapter_model.safetensors").stat().st_size
    with running_engine(world, adapter_gib=1.5 * nbytes / GIB) as engine:
        for adapter in (first, second, None, first):
            assert text_of(ask(world, engine, adapter)) == stock_text(world, adapter)
            assert len(engine.stats().loaded_adapters) <= 1
        assert engine.stats().counters["adapter_loads"] == 3


def test_an_unloaded_adapter_is_loaded_again_when_asked_for(world, engine):
    adapter = world.adapters[0]
    before = text_of(ask(world, engine, adapter))
    asyncio.run(engine.unload(adapter.digest))
    assert adapter.digest not in engine.stats().loaded_adapters
    assert text_of(ask(world, engine, adapter)) == before


def test_closing_an_answer_stops_its_decoding_and_frees_its_blocks(world, engine):
    endless = make_request(world, world.adapters[0], max_tokens=2000, end_ids=frozenset())

    async def leave_early_and_ask_again() -> None:
        answer = engine.generate(endless)
        await anext(answer)
        assert engine.stats().cache_used > 0
        await answer.aclose()
        await collect(engine, make_request(world, max_tokens=1))

    generated = engine.stats().counters["generated_tokens"]
    asyncio.run(leave_early_and_ask_again())
    assert engine.stats().counters["generated_tokens"] - generated < endless.max_tokens
    assert engine.stats().running == 0
    assert engine.stats().cache_used == 0
