"""The engine on transformers answers with exactly the weights that were asked for, whatever else is in its batch."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ft_service.errors import ServingError
from ft_service.model.base import fingerprint
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import GenerationChunk, GenerationRequest, RefusedRequestError, Sampling
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


def ask_all(engine: TransformersEngine, *requests: GenerationRequest) -> list[list[GenerationChunk]]:
    async def all_at_once() -> list[list[GenerationChunk]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    return asyncio.run(all_at_once())


def test_base_and_adapters_in_one_batch_match_plain_peft(world, engine):
    speakers = [None, *world.adapters] * 3
    answers = ask_all(engine, *(make_request(world, speaker) for speaker in speakers))
    assert [text_of(answer) for answer in answers] == [stock_text(world, speaker) for speaker in speakers]


def test_log_probabilities_are_those_of_the_model(world, engine):
    prompt = tuple(world.tokenizer("Tell me: the quick brown fox")["input_ids"])
    changes = {"prompt_ids": prompt, "max_tokens": 6, "end_ids": frozenset(), "logprobs": 2, "prompt_logprobs": 1}
    for adapter in (None, world.adapters[0]):
        chunks = ask(world, engine, adapter, **changes, temperature=0.7, seed=3)
        ids = [*prompt, *(token_id for chunk in chunks for token_id in chunk.token_ids)]
        expected = world.stock_logprobs(ids, adapter)
        answer = [token for chunk in chunks for token in chunk.logprobs]
        assert [token.token_id for token in answer] == ids[len(prompt) :]
        assert chunks[0].prompt_logprobs[0] is None
        given = [*chunks[0].prompt_logprobs[1:], *answer]
        assert len(given) == len(expected) == len(ids) - 1
        for token, logprobs_V, token_id in zip(given, expected, ids[1:], strict=True):
            assert token.token_id == token_id
            assert token.logprob == pytest.approx(float(logprobs_V[token_id]), abs=1e-4)
            assert token.top[0].logprob == pytest.approx(float(logprobs_V.max()), abs=1e-4)
        assert [len(token.top) for token in given] == [1] * (len(prompt) - 1) + [2] * len(answer)


def test_a_prompt_is_scored_without_an_answer(world, engine):
    prompt = tuple(world.tokenizer(PROMPT)["input_ids"])
    (chunk,) = ask(world, engine, max_tokens=0, prompt_logprobs=0)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("", (), "length")
    expected = world.stock_logprobs(list(prompt))
    assert [token.logprob for token in chunk.prompt_logprobs[1:]] == pytest.approx(
        [float(row[token_id]) for row, token_id in zip(expected, prompt[1:], strict=True)], abs=1e-4
    )
    (chunk,) = ask(world, engine, prompt_ids=prompt[:1], max_tokens=0, prompt_logprobs=0)
    assert chunk.prompt_logprobs == (None,)
    (chunk,) = ask(world, engine, max_tokens=0)
    assert (chunk.token_ids, chunk.finish_reason, chunk.prompt_logprobs) == ((), "length", ())


def test_tokens_have_their_bytes_even_within_a_character(world, engine):
    chunks = ask(world, engine, max_tokens=500, logprobs=0)
    names = b"".join(token.text for chunk in chunks for token in chunk.logprobs)
    assert names.removesuffix(world.tokenizer.eos_token.encode()).decode() == SENTENCE


def test_a_seed_gives_the_same_answer_beside_any_neighbours(world, engine):
    request = make_request(world, world.adapters[0], temperature=1.5, seed=7)
    alone = text_of(ask_all(engine, request)[0])
    neighbours = [make_request(world, speaker, temperature=1.0) for speaker in (None, *world.adapters)]
    assert text_of(ask_all(engine, *neighbours, request)[-1]) == alone


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


def test_requests_that_begin_alike_share_what_is_cached(world):
    prompt = tuple(world.tokenizer(PROMPT * 8)["input_ids"])
    with running_engine(world) as engine:
        answers = [ask(world, engine, adapter, prompt_ids=prompt) for adapter in (None, None, world.adapters[0])]
        counters = engine.stats().counters
    assert [answer[0].cached_tokens for answer in answers] == [0, (len(prompt) - 1) // 16 * 16, 0]
    assert counters["cached_tokens"] == answers[1][0].cached_tokens > 0
    assert counters["prompt_tokens"] == 3 * len(prompt)
    assert text_of(answers[0]) == text_of(answers[1])


def test_the_cache_keeps_to_its_bytes(world):
    with running_engine(world, cache_gib=100_000 / GIB) as engine:
        assert 80_000 < engine._loop.store.num_bytes <= 100_000
    with pytest.raises(ServingError, match=r"cache_gib = .*16 tokens need 8,192 bytes"):
        TransformersEngine(world.base, world.registry, BaseSettings(base=str(world.base), cache_gib=1e-9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "has no tokens"),
        ({"prompt_ids": (1, 100_000)}, "token ids go from 0 to"),
        ({"prompt_ids": (1, -1)}, "token ids go from 0 to"),
        ({"max_tokens": 2048}, "this model takes 2048"),
        ({"max_tokens": 1000}, "cache of this server has room for"),
        ({"json_schema": '{"type": "nonsense"}'}, "JSON schema cannot be followed"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_harms_nobody(world, changes, message):
    with running_engine(world, cache_gib=100_000 / GIB) as engine:
        with pytest.raises(RefusedRequestError, match=message):
            ask(world, engine, **changes)
        assert text_of(ask(world, engine)) == stock_text(world)


def test_an_answer_follows_its_json_schema(world, engine):
    text = text_of(ask(world, engine, json_schema='{"enum": ["red", "green"]}', temperature=1.0))
    assert text in ('"red"', '"green"')


def test_an_adapter_whose_logits_are_not_finite_fails_alone(world, tmp_path):
    huge = publish_adapter(world.registry, world.base, tmp_path / "huge", seed=9, std=1e30)
    with running_engine(world, cache_gib=100_000 / GIB) as engine:

        async def both() -> list:
            requests = make_request(world, huge), make_request(world)
            return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)

        for _ in range(3):  # the blocks of the failed one are used again
            failed, answer = asyncio.run(both())
            assert isinstance(failed, ServingError)
            assert huge.id in str(failed) and "not finite" in str(failed)
            assert text_of(answer) == stock_text(world)
        assert engine.stats().cache_used == 0


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


def test_closing_the_engine_ends_what_is_in_flight(world):
    with running_engine(world) as engine:

        async def close_during_an_answer() -> None:
            answer = engine.generate(make_request(world, max_tokens=2000, end_ids=frozenset()))
            await anext(answer)
            await engine.close()
            async for _ in answer:
                pass

        for _ in range(2):
            with pytest.raises(ServingError, match="the engine is closed"):
                asyncio.run(close_during_an_answer())


def test_an_event_loop_that_is_gone_leaves_nothing_behind(world, engine):
    loop = asyncio.new_event_loop()
    answer = engine.generate(make_request(world, world.adapters[0], max_tokens=2000, end_ids=frozenset()))
    loop.run_until_complete(anext(answer))
    loop.close()
    ask(world, engine, max_tokens=1)
    assert engine.stats().running == 0


def test_pinned_adapters_are_loaded_at_the_start_and_unknown_ones_named(world, caplog):
    pinned = world.adapters[0]
    with running_engine(world, pinned=(pinned.id, "no-such-adapter")) as engine:
        assert engine.stats().loaded_adapters == (pinned.digest,)
    assert "no-such-adapter" in caplog.text


def test_facts_of_the_base(world, engine):
    info = engine.info
    assert (info.dtype, info.precision, info.context_length) == ("float32", "fp32", 2048)
    assert world.tokenizer.eos_token_id in info.end_ids
    assert info.base_fingerprint == fingerprint(world.base)
    with running_engine(world, dtype="bfloat16", max_context=100) as other:
        assert (other.info.dtype, other.info.precision, other.info.context_length) == ("bfloat16", "bf16", 100)


def test_a_base_in_nf4_answers_like_stock_transformers_in_nf4(world):
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    prompt = world.tokenizer(PROMPT)["input_ids"]
    with running_engine(world, precision="nf4") as engine:
        assert engine.info.precision == "nf4"
        answer = ask(world, engine, end_ids=frozenset())
    expected = world.stock_answer(prompt, MAX_TOKENS, quantization_config=nf4)
    assert [token_id for chunk in answer for token_id in chunk.token_ids][: len(expected)] == expected
