"""Either engine answers with exactly the weights that were asked for, whatever else is in its batch.

The same tests hold both; those of vLLM are skipped where it is not installed.
"""

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import Engine, GenerationChunk, GenerationRequest, RefusedRequestError, Sampling
from serve.replica import make_engine
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
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 128}
"""Heads of 32: vLLM's attention on CPU takes no smaller ones."""
ENGINES = ("transformers", "vllm")
SAMPLING = {each.name for each in fields_of(Sampling)}
LOGPROB_TOLERANCE = 1e-2
CLOSE = 1e-4
"""Two logits of the reference that are closer may change places."""


@dataclass(frozen=True)
class Served:
    """An engine, and the world it serves."""

    kind: str
    engine: Engine
    world: World

    def seed(self, number: int) -> int:
        """For an adapter that a test damages: publishing the same one for the next engine would return it as it is."""
        return number + 100 * ENGINES.index(self.kind)

    def ask(self, adapter: AdapterRecord | None = None, **changes) -> list[GenerationChunk]:
        return asyncio.run(collect(self.engine, make_request(self.world, adapter, **changes)))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), SIZES)


@pytest.fixture(scope="module", params=ENGINES)
def kind(request) -> str:
    if request.param == "vllm":
        # It wants an older numpy than ours, and so an environment of its own.
        pytest.importorskip("vllm", reason="vLLM is not installed here: docs/serving.md, Engines")
    return request.param


@pytest.fixture(scope="module")
def served(world, kind) -> Iterator[Served]:
    with running_engine(world, kind) as engine:
        yield Served(kind, engine, world)


@contextmanager
def running_engine(world: World, kind: str, **settings) -> Iterator[Engine]:
    small = {"cache_gib": 0.05, "max_batch": 8, "max_lora_rank": 8}
    base = BaseSettings(base=str(world.base), engine=kind, **{**small, **settings})
    engine = make_engine(base, world.registry)
    try:
        yield engine
    finally:
        asyncio.run(engine.close())


def make_request(world: World, adapter: AdapterRecord | None = None, **changes) -> GenerationRequest:
    sampling = {name: changes.pop(name) for name in SAMPLING if name in changes}
    fields: dict[str, object] = {
        "id": "test",
        "prompt_ids": tuple(world.tokenizer(PROMPT)["input_ids"]),
        "max_tokens": MAX_TOKENS,
        "end_ids": frozenset([world.tokenizer.eos_token_id]),
        "sampling": Sampling(**{"temperature": 0.0, **sampling}),
    }
    return GenerationRequest(adapter=adapter, **{**fields, **changes})


async def collect(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def stock_text(world: World, adapter: AdapterRecord | None = None) -> str:
    ids = world.stock_answer(world.tokenizer(PROMPT)["input_ids"], MAX_TOKENS, adapter)
    return world.tokenizer.decode(ids, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}")


def test_base_and_adapters_in_turn_match_plain_peft(world, served):
    speakers = [None, *world.adapters]
    expected = [stock_text(world, adapter) for adapter in speakers]
    assert len(set(expected)) == 3
    for speaker in (0, 1, 2, 0, 2, 1, 0):
        assert text_of(served.ask(speakers[speaker])) == expected[speaker]


def test_the_end_token_ends_the_answer_and_is_counted(world, served):
    chunks = served.ask(max_tokens=500)
    stock_ids = world.stock_answer(world.tokenizer(PROMPT)["input_ids"], 500)
    assert text_of(chunks) == SENTENCE
    assert chunks[-1].finish_reason == "stop"
    assert sum(len(chunk.token_ids) for chunk in chunks) == len(stock_ids)


def test_an_answer_cut_by_max_tokens_says_so(world, served):
    chunks = served.ask(max_tokens=5)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert sum(len(chunk.token_ids) for chunk in chunks) == 5


def test_a_stop_string_ends_the_answer(world, served):
    chunks = served.ask(max_tokens=500, stop=("東京",))
    assert text_of(chunks) == "日本の首都は"
    assert chunks[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(world, served):
    adapter = world.adapters[0]
    sampled = [text_of(served.ask(adapter, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_smallest_top_p_keeps_only_the_likeliest_token(world, served):
    adapter = world.adapters[0]
    assert text_of(served.ask(adapter, temperature=2.0, top_p=0.0)) == text_of(served.ask(adapter))


def test_a_damaged_adapter_fails_and_others_still_answer(world, served, tmp_path):
    broken = publish_adapter(world.registry, world.base, tmp_path / "adapter", served.seed(3))
    damage(world.registry, broken)
    with pytest.raises(ServingError, match=rf"{broken.id}.*adapter_model\.safetensors.*changed since publishing"):
        served.ask(broken)
    assert text_of(served.ask()) == SENTENCE[: len(text_of(served.ask()))]


def test_a_pickled_adapter_is_never_loaded(world, served, tmp_path):
    work = tmp_path / "adapter"
    write_adapter(world.base, work, seed=4)
    (work / "adapter_model.safetensors").rename(work / "adapter_model.bin")
    pickled = world.registry.publish(work, draft_record(world.base, "pickled"), "tiny-llama", "")
    with pytest.raises(ServingError, match=r"adapter_model\.safetensors missing"):
        served.ask(pickled)


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
def test_a_misfit_adapter_fails_without_changing_others(world, served, tmp_path, changes):
    misfit = _publish_with_config(world, tmp_path / "adapter", **changes)
    with pytest.raises(ServingError, match=f"{misfit.id}.*(does not fit|changes its base)"):
        served.ask(misfit)
    assert text_of(served.ask()) == stock_text(world)
    assert text_of(served.ask(world.adapters[0])) == stock_text(world, world.adapters[0])


def _publish_with_config(world: World, work: Path, **changes: object) -> AdapterRecord:
    write_adapter(world.base, work, seed=5)
    change_json(work / "adapter_config.json", **changes)
    return world.registry.publish(work, draft_record(world.base, "misfit"), "tiny-llama", "")


def test_the_least_recently_used_adapter_is_dropped_and_reloads(world, kind):
    first, second = world.adapters
    with running_engine(world, kind, adapter_gib=room_for_one_adapter(world, kind)) as engine:
        served = Served(kind, engine, world)
        for adapter in (first, second, None, first):
            assert text_of(served.ask(adapter)) == stock_text(world, adapter)
            assert len(engine.stats().loaded_adapters) <= 1
        assert engine.stats().counters["adapter_loads"] == 3


def room_for_one_adapter(world: World, kind: str) -> float:
    if kind == "vllm":  # it reserves whole slots
        return 1e-9
    return 1.5 * (world.registry.folder(world.adapters[0]) / "adapter_model.safetensors").stat().st_size / 2**30


def test_an_unloaded_adapter_is_loaded_again_when_asked_for(world, served):
    adapter = world.adapters[0]
    before = text_of(served.ask(adapter))
    asyncio.run(served.engine.unload(adapter.digest))
    assert adapter.digest not in served.engine.stats().loaded_adapters
    assert text_of(served.ask(adapter)) == before


def test_closing_an_answer_stops_its_decoding_and_frees_its_blocks(world, served):
    engine = served.engine
    endless = make_request(world, world.adapters[0], max_tokens=1000, end_ids=frozenset())

    async def leave_early_and_ask_again() -> None:
        answer = engine.generate(endless)
        await anext(answer)
        await answer.aclose()
        await collect(engine, make_request(world, max_tokens=1))

    generated = engine.stats().counters["generated_tokens"]
    asyncio.run(leave_early_and_ask_again())
    assert engine.stats().counters["generated_tokens"] - generated < endless.max_tokens
    assert engine.stats().running == 0
    assert engine.stats().cache_used == 0


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of stock transformers and peft in fp32, of each token after the first."""

    logprobs_TV: torch.Tensor

    def of(self, ids: list[int], place: int) -> float:
        return self.logprobs_TV[place - 1, ids[place]].item()


def reference(world: World, ids: list[int], adapter: AdapterRecord | None) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(world.base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, world.registry.folder(adapter))
    with torch.inference_mode():
        return Reference(model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1))


def test_mixed_requests_at_once_are_each_those_of_plain_peft(world, served):
    speakers = [None, *world.adapters]
    prompts = [tuple(world.tokenizer(text)["input_ids"]) for text in ("Tell", PROMPT, "the quick brown fox. " * 6)]
    asked = [(prompt, speaker) for prompt in prompts for speaker in speakers]

    async def all_at_once() -> list[list[GenerationChunk]]:
        requests = [make_request(world, speaker, prompt_ids=prompt, end_ids=frozenset()) for prompt, speaker in asked]
        return await asyncio.gather(*(collect(served.engine, request) for request in requests))

    ties = 0
    for (prompt, speaker), chunks in zip(asked, asyncio.run(all_at_once()), strict=True):
        ids = [*prompt, *(token_id for chunk in chunks for token_id in chunk.token_ids)]
        assert len(ids) == len(prompt) + MAX_TOKENS
        best_TV = reference(world, ids, speaker).logprobs_TV
        for place in range(len(prompt), len(ids)):
            short = best_TV[place - 1].max().item() - best_TV[place - 1, ids[place]].item()
            assert short < CLOSE
            ties += short > 0
    assert ties <= 1


@pytest.mark.parametrize("speaker", [None, 0])
def test_log_probabilities_are_those_of_plain_peft_before_any_sampling(world, served, speaker):
    adapter = None if speaker is None else world.adapters[speaker]
    settings = {"logprobs": 3, "prompt_logprobs": 2, "temperature": 1.3, "seed": 5, "presence_penalty": 1.0}
    chunks = served.ask(adapter, **settings)
    prompt = list(make_request(world).prompt_ids)
    ids = [*prompt, *(token_id for chunk in chunks for token_id in chunk.token_ids)]
    expected = reference(world, ids, adapter)
    of_prompt = chunks[0].prompt_logprobs
    of_answer = [scored for chunk in chunks for scored in chunk.logprobs]
    assert of_prompt[0] is None and len(of_prompt) == len(prompt)
    assert [scored.token_id for scored in (*of_prompt[1:], *of_answer)] == ids[1:]
    for place, scored in enumerate((*of_prompt[1:], *of_answer), start=1):
        assert scored.logprob == pytest.approx(expected.of(ids, place), abs=LOGPROB_TOLERANCE)
        values = expected.logprobs_TV[place - 1].topk(3).values.tolist()
        assert len(scored.top) == (2 if place < len(prompt) else 3)
        assert [each.logprob for each in scored.top] == pytest.approx(values[: len(scored.top)], abs=LOGPROB_TOLERANCE)
        assert scored.text is not None


def test_a_prompt_can_be_scored_without_an_answer(world, served):
    chunks = served.ask(max_tokens=0, prompt_logprobs=0)
    assert text_of(chunks) == "" and [chunk.finish_reason for chunk in chunks][-1] == "length"
    assert sum(len(chunk.token_ids) for chunk in chunks) == 0
    scored = next(chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs)
    assert len(scored) == len(make_request(world).prompt_ids)


def test_a_seed_repeats_an_answer_beside_others(world, served):
    adapter = world.adapters[0]
    alone = text_of(served.ask(adapter, temperature=1.5, seed=-1, end_ids=frozenset()))

    async def beside_others() -> str:
        seeds = (-1, 8, 9)
        requests = [make_request(world, adapter, temperature=1.5, seed=seed, end_ids=frozenset()) for seed in seeds]
        answers = await asyncio.gather(*(collect(served.engine, request) for request in requests))
        return text_of(answers[0])

    assert asyncio.run(beside_others()) == alone


def test_a_bias_decides_and_penalties_change_the_answer(world, served):
    forced = served.ask(logit_bias={9: 100.0}, max_tokens=3, end_ids=frozenset())
    assert [token_id for chunk in forced for token_id in chunk.token_ids] == [9, 9, 9]
    kept = served.ask(logit_bias={9: 50.0}, frequency_penalty=2.0, repetition_penalty=10.0, max_tokens=3)
    assert [token_id for chunk in kept for token_id in chunk.token_ids] != [9, 9, 9]


def test_without_max_tokens_the_answer_may_fill_the_context(world, served):
    chunks = served.ask(max_tokens=None, end_ids=frozenset())
    count = sum(len(chunk.token_ids) for chunk in chunks)
    assert count == served.engine.info.context_length - len(make_request(world).prompt_ids)
    assert chunks[-1].finish_reason == "length"


def test_an_answer_follows_a_json_schema(world, served):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    chunks = served.ask(json_schema=json.dumps(schema), max_tokens=40)
    assert text_of(chunks) in ('{"a": 1}', '{"a": 2}')
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_ids": ()}, "prompt"),
        ({"prompt_ids": (1, 10**6)}, "prompt"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"json_schema": '{"type": "nonsense"}'}, "response_format"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served, changes, param):
    with pytest.raises(RefusedRequestError) as error:
        served.ask(**changes)
    assert error.value.param == param
    assert served.ask(max_tokens=1)[-1].finish_reason == "length"


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_an_adapter_with_values_that_are_not_finite_is_refused(world, served, tmp_path, monkeypatch):
    monkeypatch.setattr("ft_service.registry.registry.nonfinite_tensor", lambda _: None)  # published long ago
    broken = publish_changed(world, tmp_path / "adapter", lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(ServingError, match=rf"{broken.id}.*not finite"):
        served.ask(broken)
    assert text_of(served.ask(world.adapters[0])) == stock_text(world, world.adapters[0])


def test_logits_that_are_not_finite_are_an_error_that_names_the_adapter(world, served, tmp_path):
    huge = publish_changed(world, tmp_path / "adapter", lambda tensor: tensor.fill_(3e38))

    async def beside_another() -> str:
        good = asyncio.create_task(collect(served.engine, make_request(world, world.adapters[0])))
        with pytest.raises(ServingError, match=rf"{huge.id}.*not finite"):
            await collect(served.engine, make_request(world, huge))
        return text_of(await good)

    assert asyncio.run(beside_another()) == stock_text(world, world.adapters[0])


def publish_changed(world: World, work: Path, change) -> AdapterRecord:
    write_adapter(world.base, work, seed=7)
    tensors = load_file(work / "adapter_model.safetensors")
    change(next(tensor for name, tensor in tensors.items() if "lora_B" in name))
    save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
    return world.registry.publish(work, draft_record(world.base, "changed"), "tiny-llama", "")


def test_an_adapter_of_another_base_is_refused(world, served, tmp_path):
    other = publish_adapter(world.registry, world.base, tmp_path / "adapter", 8, base_fingerprint="f" * 64)
    with pytest.raises(ServingError, match=rf"{other.id}.*another base"):
        served.ask(other)


def test_an_adapter_that_is_deleted_while_loaded_still_answers(world, served, tmp_path):
    adapter = publish_adapter(world.registry, world.base, tmp_path / "adapter", served.seed(9))
    before = text_of(served.ask(adapter))
    shutil.rmtree(world.registry.folder(adapter))
    assert text_of(served.ask(adapter)) == before


def test_rslora_matches_plain_peft(world, served, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_rslora=True)
    adapter = publish_config(world, tmp_path / "adapter", config)
    assert text_of(served.ask(adapter)) == stock_text(world, adapter)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, "rank_pattern"),
        ({"r": 16}, "max_lora_rank"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_before_it_sees_it(world, served, tmp_path, changes, problem):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **changes})
    adapter = publish_config(world, tmp_path / "adapter", config)
    if served.kind == "transformers":
        assert text_of(served.ask(adapter)) == stock_text(world, adapter)
        return
    with pytest.raises(ServingError, match=f"{adapter.id}.*{problem}"):
        served.ask(adapter)
    assert text_of(served.ask(world.adapters[0])) == stock_text(world, world.adapters[0])


def publish_config(world: World, work: Path, config: LoraConfig) -> AdapterRecord:
    torch.manual_seed(11)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(work)
    return world.registry.publish(work, draft_record(world.base, work.name), "tiny-llama", "")


def test_pinned_adapters_are_loaded_at_the_start_and_a_missing_one_stops_nothing(world, kind):
    first, second = world.adapters
    with running_engine(world, kind, pinned=(first.id, "no-such-adapter")) as engine:
        assert engine.stats().loaded_adapters == (first.digest,)
        assert text_of(Served(kind, engine, world).ask(second)) == stock_text(world, second)


def test_a_closed_engine_ends_its_requests_with_an_error(world, kind):
    with running_engine(world, kind) as engine:

        async def close_in_between() -> None:
            answer = engine.generate(make_request(world, max_tokens=1000, end_ids=frozenset()))
            await anext(answer)
            await engine.close()
            with pytest.raises(ServingError, match="closed"):
                async for _ in answer:
                    pass

        asyncio.run(close_in_between())
