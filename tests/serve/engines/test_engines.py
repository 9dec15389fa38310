"""Either engine answers with exactly the weights that were asked for, whatever else is in its batch.

The same tests hold both. Those of vLLM are skipped where it is not installed: docs/serving.md, Engines.
"""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ft_service.errors import ServingError
from ft_service.model.base import fingerprint
from ft_service.registry.registry import AdapterRecord
from serve.engines.engine import Engine, GenerationChunk, GenerationRequest, RefusedRequestError, Sampling
from serve.replica import make_engine
from serve.settings import BaseSettings
from tests.serve.engines.batching.lora_cases import KINDS
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
GIB = 2**30
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 128}
"""Heads of 32: vLLM's attention on CPU takes no smaller ones."""
ENGINES = ("transformers", "vllm")
TOLERANCE = {"transformers": 1e-4, "vllm": 1e-2}
"""Of log-probabilities, against stock transformers and peft in fp32."""
CLOSE = 1e-4
"""Two logits of the reference that are closer may change places."""
SMALL_CACHE = {"transformers": 100_000, "vllm": 4 * 65_536}
"""Bytes. vLLM's blocks on CPU are of 128 tokens."""
SAMPLING = {each.name for each in fields_of(Sampling)}


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
        return self.ask_all(make_request(self.world, adapter, **changes))[0]

    def ask_all(self, *requests: GenerationRequest) -> list[list[GenerationChunk]]:
        async def all_at_once() -> list[list[GenerationChunk]]:
            return await asyncio.gather(*(collect(self.engine, request) for request in requests))

        return asyncio.run(all_at_once())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), SIZES)


@pytest.fixture(scope="module", params=ENGINES)
def kind(request) -> str:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed here: docs/serving.md, Engines")
    return request.param


@pytest.fixture(scope="module")
def served(world, kind) -> Iterator[Served]:
    with running_engine(world, kind) as served:
        yield served


@pytest.fixture(scope="module")
def cramped(world, kind) -> Iterator[Served]:
    """An engine with room for one adapter, and for few tokens."""
    adapter_bytes = (world.registry.folder(world.adapters[0]) / "adapter_model.safetensors").stat().st_size
    adapter_gib = 1.5 * adapter_bytes / GIB if kind == "transformers" else 1e-9  # vLLM reserves whole slots
    with running_engine(world, kind, cache_gib=SMALL_CACHE[kind] / GIB, adapter_gib=adapter_gib) as served:
        yield served


@pytest.fixture(scope="module")
def limited(world, kind) -> Iterator[Served]:
    """An engine in bfloat16 with a short context, and a pinned adapter; the last test that uses it closes it."""
    pinned = (world.adapters[0].id, "no-such-adapter")
    with running_engine(world, kind, pinned=pinned, dtype="bfloat16", max_context=100) as served:
        yield served


@contextmanager
def running_engine(world: World, kind: str, **settings) -> Iterator[Served]:
    small = {"cache_gib": 0.05, "max_batch": 16, "max_lora_rank": 8}
    base = BaseSettings(base=str(world.base), engine=kind, **{**small, **settings})
    engine = make_engine(base, world.registry)
    try:
        yield Served(kind, engine, world)
    finally:
        asyncio.run(engine.close())


def make_request(world: World, adapter: AdapterRecord | None = None, **changes) -> GenerationRequest:
    sampling = {name: changes.pop(name) for name in SAMPLING if name in changes}
    fields: dict[str, object] = {
        "id": "test",
        "prompt_ids": ids_of(world, PROMPT),
        "max_tokens": MAX_TOKENS,
        "end_ids": frozenset([world.tokenizer.eos_token_id]),
        "sampling": Sampling(**{"temperature": 0.0, **sampling}),
    }
    return GenerationRequest(adapter=adapter, **{**fields, **changes})


def ids_of(world: World, text: str) -> tuple[int, ...]:
    return tuple(world.tokenizer(text)["input_ids"])


async def collect(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def token_ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def stock_text(world: World, adapter: AdapterRecord | None = None) -> str:
    ids = world.stock_answer(list(ids_of(world, PROMPT)), MAX_TOKENS, adapter)
    return world.tokenizer.decode(ids, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}")


# -- text --------------------------------------------------------------------------------------------------------------


def test_base_and_adapters_in_turn_match_plain_peft(world, served):
    speakers = [None, *world.adapters]
    expected = [stock_text(world, adapter) for adapter in speakers]
    assert len(set(expected)) == 3
    for speaker in (0, 1, 2, 0, 2, 1, 0):
        assert text_of(served.ask(speakers[speaker])) == expected[speaker]


def test_base_and_adapters_in_one_batch_match_plain_peft(world, served):
    speakers = [None, *world.adapters] * 3
    answers = served.ask_all(*(make_request(world, speaker) for speaker in speakers))
    assert [text_of(answer) for answer in answers] == [stock_text(world, speaker) for speaker in speakers]


def test_prompts_of_any_length_in_one_batch_are_each_answered_as_by_plain_peft(world, served):
    prompts = [ids_of(world, text) for text in ("Tell", PROMPT, "the quick brown fox. " * 20)]
    asked = [(prompt, speaker) for prompt in prompts for speaker in (None, *world.adapters)]
    answers = served.ask_all(
        *(make_request(world, speaker, prompt_ids=prompt, end_ids=frozenset()) for prompt, speaker in asked)
    )
    ties = 0
    for (prompt, speaker), answer in zip(asked, answers, strict=True):
        ids = [*prompt, *token_ids_of(answer)]
        assert len(ids) == len(prompt) + MAX_TOKENS
        logprobs_TV = world.stock_logprobs(ids, speaker)
        for place in range(len(prompt), len(ids)):
            short = logprobs_TV[place - 1].max().item() - logprobs_TV[place - 1, ids[place]].item()
            assert short < CLOSE
            ties += short > 0
    assert ties <= 1


def test_the_end_token_ends_the_answer_and_is_counted(world, served):
    chunks = served.ask(max_tokens=500)
    stock_ids = world.stock_answer(list(ids_of(world, PROMPT)), 500)
    assert text_of(chunks) == SENTENCE
    assert chunks[-1].finish_reason == "stop"
    assert token_ids_of(chunks) == stock_ids


def test_an_answer_cut_by_max_tokens_says_so(served):
    chunks = served.ask(max_tokens=5)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert len(token_ids_of(chunks)) == 5


def test_without_max_tokens_the_answer_may_fill_the_context(world, kind, cramped):
    chunks = cramped.ask(max_tokens=None, end_ids=frozenset())
    count = len(ids_of(world, PROMPT)) + len(token_ids_of(chunks))
    assert chunks[-1].finish_reason == "length"
    if kind == "vllm":  # its context is what the cache has room for
        assert count == cramped.engine.info.context_length
    else:
        assert 150 < count <= SMALL_CACHE[kind] // 512


def test_a_stop_string_ends_the_answer(served):
    chunks = served.ask(max_tokens=500, stop=("東京",))
    assert text_of(chunks) == "日本の首都は"
    assert chunks[-1].finish_reason == "stop"


def test_an_answer_follows_its_json_schema(served):
    text = text_of(served.ask(json_schema='{"enum": ["red", "green"]}', temperature=1.0))
    assert text in ('"red"', '"green"')


def test_an_answer_that_may_be_text_is_the_same_text_and_json_of_the_schema_once_it_begins(world, served):
    schema = '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}'
    free = text_of(served.ask(max_tokens=12))
    assert text_of(served.ask(max_tokens=12, json_schema=schema, text_allowed=True)) == free
    opening = dict.fromkeys(world.tokenizer("{", add_special_tokens=False)["input_ids"], 100.0)
    chunks = served.ask(max_tokens=60, json_schema=schema, text_allowed=True, logit_bias=opening)
    assert (text_of(chunks), chunks[-1].finish_reason) == ('{"a": 1}', "stop")


def test_json_has_the_separators_of_json_dumps_on_either_engine(served):
    properties = '{"a": {"enum": [1, 2]}, "b": {"const": [3, 4]}}'
    schema = f'{{"type": "object", "properties": {properties}, "required": ["a", "b"], "additionalProperties": false}}'
    chunks = served.ask(json_schema=schema, max_tokens=60)
    assert text_of(chunks) in ('{"a": 1, "b": [3, 4]}', '{"a": 2, "b": [3, 4]}')
    assert chunks[-1].finish_reason == "stop"


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(world, served):
    adapter = world.adapters[0]
    sampled = [text_of(served.ask(adapter, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("seed", [7, -1, 2**63 - 1])
def test_a_seed_gives_the_same_answer_beside_any_neighbours(world, served, seed):
    request = make_request(world, world.adapters[0], temperature=1.5, seed=seed)
    alone = text_of(served.ask_all(request)[0])
    neighbours = [make_request(world, speaker, temperature=1.0) for speaker in (None, *world.adapters)]
    assert text_of(served.ask_all(*neighbours, request)[-1]) == alone


def test_the_smallest_top_p_keeps_only_the_likeliest_token(world, served):
    adapter = world.adapters[0]
    assert text_of(served.ask(adapter, temperature=2.0, top_p=0.0)) == text_of(served.ask(adapter))


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_limit_that_leaves_one_token_is_greedy(world, served, limit):
    adapter = world.adapters[0]
    assert text_of(served.ask(adapter, temperature=2.0, seed=1, **limit)) == text_of(served.ask(adapter))


def test_a_bias_decides(served):
    assert token_ids_of(served.ask(logit_bias={9: 100.0}, max_tokens=3, end_ids=frozenset())) == [9, 9, 9]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.7}, {"frequency_penalty": 1.9}, {"presence_penalty": 1.9}]
)
def test_penalties_are_those_that_the_interface_defines(world, served, penalty):
    """Every token is the likeliest one of the reference's logits after the penalties."""
    adapter = world.adapters[1]
    prompt = list(ids_of(world, PROMPT))
    answer = token_ids_of(served.ask(adapter, end_ids=frozenset(), **penalty))
    assert answer != token_ids_of(served.ask(adapter, end_ids=frozenset()))
    ids = [*prompt, *answer]
    with torch.inference_mode():
        logits_TV = world.stock_model(adapter)(input_ids=torch.tensor([ids])).logits[0]
    for place in range(len(prompt), len(ids)):
        logits_V = penalised(logits_TV[place - 1].clone(), prompt, ids[len(prompt) : place], **penalty)
        assert logits_V.max().item() - logits_V[ids[place]].item() < CLOSE


def penalised(
    logits_V: torch.Tensor,
    prompt: list[int],
    answer: list[int],
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> torch.Tensor:
    for token_id in {*prompt, *answer}:
        value = logits_V[token_id]
        logits_V[token_id] = value / repetition_penalty if value > 0 else value * repetition_penalty
    for token_id in set(answer):
        logits_V[token_id] -= frequency_penalty * answer.count(token_id) + presence_penalty
    return logits_V


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7, "seed": 3}, {"temperature": 1.3, "seed": 5, "presence_penalty": 1.0}]
)
def test_log_probabilities_are_those_of_the_model(world, served, sampling):
    prompt = ids_of(world, "Tell me: the quick brown fox")
    changes = {"prompt_ids": prompt, "max_tokens": 6, "end_ids": frozenset(), "logprobs": 2, "prompt_logprobs": 1}
    tolerance = TOLERANCE[served.kind]
    for adapter in (None, world.adapters[0]):
        chunks = served.ask(adapter, **changes, **sampling)
        ids = [*prompt, *token_ids_of(chunks)]
        expected = world.stock_logprobs(ids, adapter)
        answer = [token for chunk in chunks for token in chunk.logprobs]
        assert [token.token_id for token in answer] == ids[len(prompt) :]
        assert chunks[0].prompt_logprobs[0] is None
        given = [*chunks[0].prompt_logprobs[1:], *answer]
        assert len(given) == len(expected) == len(ids) - 1
        for token, logprobs_V, token_id in zip(given, expected, ids[1:], strict=True):
            assert token.token_id == token_id
            assert token.logprob == pytest.approx(float(logprobs_V[token_id]), abs=tolerance)
            best = logprobs_V.topk(len(token.top)).values.tolist()
            assert [each.logprob for each in token.top] == pytest.approx(best, abs=tolerance)
        assert [len(token.top) for token in given] == [1] * (len(prompt) - 1) + [2] * len(answer)


def test_a_prompt_is_scored_without_an_answer(world, served):
    prompt = ids_of(world, PROMPT)
    (chunk,) = served.ask(max_tokens=0, prompt_logprobs=0)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("", (), "length")
    expected = world.stock_logprobs(list(prompt))
    assert [token.logprob for token in chunk.prompt_logprobs[1:]] == pytest.approx(
        [float(row[token_id]) for row, token_id in zip(expected, prompt[1:], strict=True)], abs=TOLERANCE[served.kind]
    )
    (chunk,) = served.ask(prompt_ids=prompt[:1], max_tokens=0, prompt_logprobs=0)
    assert chunk.prompt_logprobs == (None,)
    (chunk,) = served.ask(max_tokens=0)
    assert (chunk.token_ids, chunk.finish_reason, chunk.prompt_logprobs) == ((), "length", ())


def test_tokens_have_their_bytes_even_within_a_character(world, served):
    chunks = served.ask(max_tokens=500, logprobs=0)
    names = b"".join(token.text for chunk in chunks for token in chunk.logprobs)
    assert names.removesuffix(world.tokenizer.eos_token.encode()).decode() == SENTENCE


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt_ids": ()}, "prompt", "has no tokens"),
        ({"prompt_ids": (1, 100_000)}, "prompt", "token ids go from 0 to"),
        ({"prompt_ids": (1, -1)}, "prompt", "token ids go from 0 to"),
        ({"logit_bias": {100_000: 1.0}}, "logit_bias", "token ids go from 0 to"),
        ({"max_tokens": 2048}, "max_tokens", {"transformers": "this model takes 2048", "vllm": "this server takes"}),
        (
            {"max_tokens": 1000},
            "max_tokens",
            {"transformers": "cache of this server has room for", "vllm": "this server takes"},
        ),
        ({"json_schema": '{"type": "nonsense"}'}, "response_format", "JSON schema cannot be followed"),
        ({"json_schema": "{"}, "response_format", "JSON schema cannot be followed"),
        ({"json_schema": "{", "text_allowed": True}, "response_format", "JSON schema cannot be followed"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name_and_harms_nobody(world, cramped, changes, param, message):
    with pytest.raises(RefusedRequestError, match=message if isinstance(message, str) else message[cramped.kind]) as it:
        cramped.ask(**changes)
    assert it.value.param == param
    assert text_of(cramped.ask()) == stock_text(world)


# -- adapters ----------------------------------------------------------------------------------------------------------


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


def test_an_adapter_of_another_base_is_refused(world, served, tmp_path):
    other = publish_adapter(world.registry, world.base, tmp_path / "adapter", 8, base_fingerprint="f" * 64)
    with pytest.raises(ServingError, match=rf"{other.id}.*another base"):
        served.ask(other)


def test_an_adapter_with_values_that_are_not_finite_is_refused(world, served, tmp_path, monkeypatch):
    monkeypatch.setattr("ft_service.registry.registry.nonfinite_tensor", lambda _: None)  # published long ago
    work = tmp_path / "adapter"
    write_adapter(world.base, work, seed=7)
    tensors = load_file(work / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0] = torch.nan
    save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
    broken = world.registry.publish(work, draft_record(world.base, "broken"), "tiny-llama", "")
    with pytest.raises(ServingError, match=rf"{broken.id}.*not finite"):
        served.ask(broken)
    assert text_of(served.ask(world.adapters[0])) == stock_text(world, world.adapters[0])


def test_an_adapter_whose_logits_are_not_finite_fails_alone(world, cramped, tmp_path):
    huge = publish_adapter(world.registry, world.base, tmp_path / "huge", seed=9, std=1e30)

    async def both() -> list:
        requests = make_request(world, huge), make_request(world)
        tasks = (collect(cramped.engine, request) for request in requests)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for _ in range(3):  # the blocks of the failed one are used again
        failed, answer = asyncio.run(both())
        assert isinstance(failed, ServingError)
        assert huge.id in str(failed) and "not finite" in str(failed)
        assert text_of(answer) == stock_text(world)
    assert cramped.engine.stats().cache_used == 0


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_that_of_peft_or_refused_by_name(world, served, tmp_path, name):
    """What vLLM refuses is what the adapter's record says since its publication."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **KINDS[name]})
    adapter = publish_config(world, tmp_path / "adapter", config, seed=served.seed(11))
    if served.kind == "vllm" and adapter.vllm_problems:
        setting = adapter.vllm_problems[0].split(":")[0]
        with pytest.raises(ServingError, match=rf"{adapter.id}.*vLLM cannot serve it.*{setting}"):
            served.ask(adapter)
        assert text_of(served.ask(world.adapters[0])) == stock_text(world, world.adapters[0])
        return
    prompt = ids_of(world, "the quick brown fox. " * 2)
    chunks = served.ask(adapter, prompt_ids=prompt, logprobs=0, prompt_logprobs=0, end_ids=frozenset())
    ids = [*prompt, *token_ids_of(chunks)]
    expected = world.stock_logprobs(ids, adapter)
    base = world.stock_logprobs(ids)
    given = [*chunks[0].prompt_logprobs[1:], *(token for chunk in chunks for token in chunk.logprobs)]
    of_ids = torch.tensor(ids[1:])[:, None]
    assert (expected - base).gather(1, of_ids).abs().max() > 0.05, "the adapter must change what is compared"
    assert [token.logprob for token in given] == pytest.approx(
        expected.gather(1, of_ids)[:, 0].tolist(), abs=TOLERANCE[served.kind]
    )


@pytest.mark.parametrize("changes", [{"r": 16}, {"r": 4, "rank_pattern": {"q_proj": 16}}])
def test_a_rank_above_that_of_the_slots_is_refused_by_vllm(world, served, tmp_path, changes):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **changes)
    adapter = publish_config(world, tmp_path / "adapter", config, seed=12)
    if served.kind == "transformers":
        assert text_of(served.ask(adapter)) == stock_text(world, adapter)
    else:
        with pytest.raises(ServingError, match=f"{adapter.id}.*rank is 16.*max_lora_rank"):
            served.ask(adapter)


def publish_config(world: World, work: Path, config: LoraConfig, seed: int) -> AdapterRecord:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(work)
    return world.registry.publish(work, draft_record(world.base, f"kind-{seed}"), "tiny-llama", "")


# -- life --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_is_dropped_and_reloads(world, cramped):
    first, second = world.adapters
    asyncio.run(cramped.engine.unload(first.digest))
    loads = cramped.engine.stats().counters["adapter_loads"]
    for adapter in (first, second, None, first):
        assert text_of(cramped.ask(adapter)) == stock_text(world, adapter)
        assert len(cramped.engine.stats().loaded_adapters) <= 1
    assert cramped.engine.stats().counters["adapter_loads"] - loads == 3


def test_more_adapters_at_once_than_there_is_room_for_wait_for_each_other(world, cramped):
    speakers = [*world.adapters, None] * 3
    answers = cramped.ask_all(*(make_request(world, speaker) for speaker in speakers))
    assert [text_of(answer) for answer in answers] == [stock_text(world, speaker) for speaker in speakers]


def test_an_unloaded_adapter_is_loaded_again_when_asked_for(world, served):
    adapter = world.adapters[0]
    before = text_of(served.ask(adapter))
    asyncio.run(served.engine.unload(adapter.digest))
    assert adapter.digest not in served.engine.stats().loaded_adapters
    assert text_of(served.ask(adapter)) == before


def test_a_request_in_flight_keeps_the_adapter_that_is_deleted(world, served, tmp_path):
    adapter = publish_adapter(world.registry, world.base, tmp_path / "adapter", served.seed(9))
    expected = stock_text(world, adapter)

    async def delete_in_between() -> list[GenerationChunk]:
        answer = served.engine.generate(make_request(world, adapter))
        first = await anext(answer)
        await served.engine.unload(adapter.digest)
        shutil.rmtree(world.registry.folder(adapter))
        return [first, *[chunk async for chunk in answer]]

    assert text_of(asyncio.run(delete_in_between())) == expected
    assert text_of(served.ask()) == stock_text(world)
    assert adapter.digest not in served.engine.stats().loaded_adapters
    with pytest.raises(ServingError, match=f"{adapter.id}.*missing"):
        served.ask(adapter)


def test_closing_an_answer_stops_its_decoding_and_frees_its_blocks(world, served):
    engine = served.engine
    endless = make_request(world, world.adapters[0], max_tokens=2000, end_ids=frozenset())

    async def cache_used_by_a_short_answer() -> float:
        answer = engine.generate(make_request(world, max_tokens=2))
        await anext(answer)
        used = engine.stats().cache_used
        async for _ in answer:
            pass
        return used

    async def leave_early_and_ask_again() -> float:
        answer = engine.generate(endless)
        await anext(answer)
        assert engine.stats().cache_used > 0
        await answer.aclose()
        return await cache_used_by_a_short_answer()

    alone = asyncio.run(cache_used_by_a_short_answer())
    generated = engine.stats().counters["generated_tokens"]
    assert asyncio.run(leave_early_and_ask_again()) <= alone
    assert engine.stats().counters["generated_tokens"] - generated < endless.max_tokens
    assert engine.stats().running == 0
    assert engine.stats().cache_used == 0


def test_an_event_loop_that_is_gone_leaves_nothing_behind(world, served):
    loop = asyncio.new_event_loop()
    answer = served.engine.generate(make_request(world, world.adapters[0], max_tokens=2000, end_ids=frozenset()))
    loop.run_until_complete(anext(answer))
    loop.close()
    served.ask(max_tokens=1)
    assert served.engine.stats().running == 0


def test_requests_that_begin_alike_share_what_is_cached(world, served):
    prompt = ids_of(world, "a prompt of its own: " + PROMPT * 50)
    before = served.engine.stats().counters
    answers = [served.ask(adapter, prompt_ids=prompt) for adapter in (None, None, world.adapters[0])]
    after = served.engine.stats().counters
    block = {"transformers": 16, "vllm": 128}[served.kind]
    assert [answer[0].cached_tokens for answer in answers] == [0, (len(prompt) - 1) // block * block, 0]
    assert after["cached_tokens"] - before["cached_tokens"] == answers[1][0].cached_tokens > 0
    assert after["prompt_tokens"] - before["prompt_tokens"] == 3 * len(prompt)
    assert text_of(answers[0]) == text_of(answers[1])


def test_facts_of_the_base(world, served):
    info = served.engine.info
    assert info.engine.startswith(f"{served.kind} ")
    assert (info.dtype, info.precision, info.context_length) == ("float32", "fp32", 2048)
    assert world.tokenizer.eos_token_id in info.end_ids
    assert info.base_fingerprint == fingerprint(world.base)


def test_pinned_adapters_are_loaded_at_the_start_and_unknown_ones_named(world, limited, caplog):
    pinned, other = world.adapters
    assert limited.engine.stats().loaded_adapters == (pinned.digest,)
    assert any("no-such-adapter" in record.getMessage() for record in caplog.get_records("setup"))
    limited.ask(other)
    assert pinned.digest in limited.engine.stats().loaded_adapters


def test_dtype_and_context_are_those_of_the_settings(limited):
    info = limited.engine.info
    assert (info.dtype, info.precision, info.context_length) == ("bfloat16", "bf16", 100)
    assert len(token_ids_of(limited.ask(end_ids=frozenset()))) == MAX_TOKENS
    with pytest.raises(RefusedRequestError, match="takes 100"):
        limited.ask(max_tokens=100)


def test_closing_the_engine_ends_what_is_in_flight(world, limited):
    async def close_during_an_answer() -> None:
        answer = limited.engine.generate(make_request(world, max_tokens=80, end_ids=frozenset()))
        await anext(answer)
        await limited.engine.close()
        async for _ in answer:
            pass

    for _ in range(2):
        with pytest.raises(ServingError, match="the engine is closed"):
            asyncio.run(close_during_an_answer())
