"""The engine of transformers and peft answers with exactly the weights that were asked for."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import GenerationChunk, GenerationRequest
from serve.engines.transformers_engine import TransformersEngine
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
def engine(world) -> TransformersEngine:
    return TransformersEngine(world.base, world.registry)


def ask(engine: TransformersEngine, adapter: AdapterRecord | None = None, **changes) -> list[GenerationChunk]:
    fields = {
        "prompt_ids": engine.tokenizer(PROMPT)["input_ids"],
        "max_tokens": MAX_TOKENS,
        "end_ids": engine.end_ids,
        "temperature": 0.0,
    }
    request = GenerationRequest(adapter=adapter, **{**fields, **changes})

    async def collect() -> list[GenerationChunk]:
        return [chunk async for chunk in engine.generate(request)]

    return asyncio.run(collect())


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
        assert text_of(ask(engine, speakers[speaker])) == expected[speaker]


def test_the_end_token_ends_the_answer_and_is_counted(world, engine):
    chunks = ask(engine, max_tokens=500)
    stock_ids = world.stock_answer(world.tokenizer(PROMPT)["input_ids"], 500)
    assert text_of(chunks) == SENTENCE
    assert chunks[-1].finish_reason == "stop"
    assert sum(chunk.num_tokens for chunk in chunks) == len(stock_ids)


def test_an_answer_cut_by_max_tokens_says_so(engine):
    chunks = ask(engine, max_tokens=5)
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert sum(chunk.num_tokens for chunk in chunks) == 5


def test_a_stop_string_ends_the_answer(engine):
    chunks = ask(engine, max_tokens=500, stop=("東京",))
    assert text_of(chunks) == "日本の首都は"
    assert chunks[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(engine, world):
    adapter = world.adapters[0]
    sampled = [text_of(ask(engine, adapter, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_smallest_top_p_keeps_only_the_likeliest_token(engine, world):
    adapter = world.adapters[0]
    assert text_of(ask(engine, adapter, temperature=2.0, top_p=0.0)) == text_of(ask(engine, adapter))


def test_a_damaged_adapter_fails_and_others_still_answer(world, tmp_path):
    engine = TransformersEngine(world.base, world.registry)
    broken = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=3)
    damage(world.registry, broken)
    with pytest.raises(ServingError, match=rf"{broken.id}.*adapter_model\.safetensors.*changed since publishing"):
        ask(engine, broken)
    assert text_of(ask(engine)) == SENTENCE[: len(text_of(ask(engine)))]


def test_a_pickled_adapter_is_never_loaded(world, engine, tmp_path):
    work = tmp_path / "adapter"
    write_adapter(world.base, work, seed=4)
    (work / "adapter_model.safetensors").rename(work / "adapter_model.bin")
    pickled = world.registry.publish(work, draft_record(world.base, "pickled"), "tiny-llama", "")
    with pytest.raises(ServingError, match=r"adapter_model\.safetensors missing"):
        ask(engine, pickled)


@pytest.mark.parametrize("loaded_before", [False, True])
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
def test_a_misfit_adapter_fails_without_changing_others(world, tmp_path, changes, loaded_before):
    engine = TransformersEngine(world.base, world.registry)
    if loaded_before:
        ask(engine, world.adapters[0])
    misfit = _publish_with_config(world, tmp_path / "adapter", **changes)
    with pytest.raises(ServingError, match=f"{misfit.id}.*(does not fit|changes its base)"):
        ask(engine, misfit)
    assert text_of(ask(engine)) == stock_text(world)
    assert text_of(ask(engine, world.adapters[0])) == stock_text(world, world.adapters[0])


def _publish_with_config(world: World, work: Path, **changes: object) -> AdapterRecord:
    write_adapter(world.base, work, seed=5)
    change_json(work / "adapter_config.json", **changes)
    return world.registry.publish(work, draft_record(world.base, "misfit"), "tiny-llama", "")


def test_the_least_recently_used_adapter_is_dropped_and_reloads(world):
    engine = TransformersEngine(world.base, world.registry, max_loaded_adapters=1)
    first, second = world.adapters
    for adapter in (first, second, None, first):
        assert text_of(ask(engine, adapter)) == stock_text(world, adapter)


def test_closing_an_answer_stops_its_decoding(world, engine, monkeypatch):
    steps = 0
    decode = engine._decode

    def counted(request):
        nonlocal steps
        for chunk in decode(request):
            steps += 1
            yield chunk

    monkeypatch.setattr(engine, "_decode", counted)
    request = GenerationRequest(
        prompt_ids=[5], adapter=world.adapters[0], max_tokens=2000, end_ids=frozenset(), temperature=0.0
    )

    async def leave_early_and_ask_again() -> int:
        answer = engine.generate(request)
        await anext(answer)
        await answer.aclose()
        # One thread answers all requests, so the first is over once the second begins.
        await anext(engine.generate(replace(request, max_tokens=1)))
        return steps - 1

    assert asyncio.run(leave_early_and_ask_again()) < request.max_tokens
