"""Every greedy answer is stock transformers' own, whatever else is in the batch, in the queue and in the cache."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.engines.engine import GenerationRequest, Sampling
from serve.engines.transformers_engine import GIB, StepLimits, TransformersEngine
from serve.settings import BaseSettings
from tests.worlds import SMALL, write_base

TIE = 1e-4
"""Two logits of the reference that are closer may change places: a row's rounding depends on the batch."""
PREFIXES = ((5, 9, 14, 3, 77, 12, 40, 41, 8, 100, 7), (200, 13, 13, 60), ())


@dataclass
class Reference:
    """Stock transformers, one request at a time."""

    model: LlamaForCausalLM
    ties: int = 0
    tokens: int = 0
    _answers: dict[tuple[int, ...], tuple[list[int], list[float]]] = field(default_factory=dict)

    def answer(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        """Tokens, and by how much the best logit of each exceeds the second."""
        if len(self._answers.get(prompt, ([], []))[0]) < count:
            output = self.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(output.logits).topk(2).values
            self._answers[prompt] = (output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())
        tokens, margins = self._answers[prompt]
        return tokens[:count], margins[:count]

    def check(self, prompt: tuple[int, ...], answer: list[int], count: int) -> None:
        expected, margins = self.answer(prompt, count)
        self.tokens += len(answer)
        if answer != expected[: len(answer)]:
            place = next(at for at, token in enumerate(answer) if token != expected[at])
            assert margins[place] < TIE, f"token {place} of {prompt}: {answer[place]} instead of {expected[place]}"
            self.ties += 1


@dataclass(frozen=True)
class Client:
    """One request, when it comes, and after how many chunks its client goes away."""

    prefix: int
    rest: tuple[int, ...]
    max_tokens: int
    wait: int
    leaves_after: int | None

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*PREFIXES[self.prefix], *self.rest) or (1,)


@dataclass(frozen=True)
class Sizes:
    """A small engine: blocks for some hundred tokens, so that sequences have to make room for others."""

    block_size: int
    prompt_tokens_per_step: int
    max_batch: int
    cache_tokens: int


SIZES = (Sizes(16, 128, 64, 4096), Sizes(4, 8, 6, 96), Sizes(2, 5, 3, 80), Sizes(4, 64, 16, 112))
MOST_TOKENS = 78

clients = st.builds(
    Client,
    prefix=st.integers(0, len(PREFIXES) - 1),
    rest=st.lists(st.integers(0, 250), max_size=40).map(tuple),
    max_tokens=st.integers(1, 24),
    wait=st.integers(0, 4),
    leaves_after=st.none() | st.integers(1, 6),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "small"
    write_base(folder, ["the quick brown fox"], 300, SMALL)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(8)  # new weights are so small that attention hardly changes an answer
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(base) -> Iterator[Reference]:
    reference = Reference(LlamaForCausalLM.from_pretrained(base).eval())
    yield reference
    print(f"{reference.ties} ties in {reference.tokens} tokens")
    assert reference.ties <= 1 + reference.tokens // 1000


@pytest.fixture(scope="module")
def engines(base) -> Iterator[list[TransformersEngine]]:
    registry = Registry(Storage(str(base.parent / "storage")))

    @cache
    def make(sizes: Sizes) -> TransformersEngine:
        token_bytes = 2 * 4 * SMALL["num_layers"] * SMALL["hidden_size"] * SMALL["num_kv_heads"] // SMALL["num_heads"]
        server = BaseSettings(
            base=str(base), max_batch=sizes.max_batch, cache_gib=sizes.cache_tokens * token_bytes / GIB
        )
        return TransformersEngine(base, registry, server, StepLimits(sizes.block_size, sizes.prompt_tokens_per_step))

    engines = [make(sizes) for sizes in SIZES]
    yield engines
    for engine in engines:
        asyncio.run(engine.close())


def request_of(client: Client, **changes) -> GenerationRequest:
    fields = {"sampling": Sampling(temperature=0.0), "adapter": None, "end_ids": frozenset()}
    return GenerationRequest(id="test", prompt_ids=client.prompt, max_tokens=client.max_tokens, **{**fields, **changes})


async def listen(engine: TransformersEngine, client: Client) -> list[int]:
    for _ in range(client.wait):
        await asyncio.sleep(0)
    answer: list[int] = []
    chunks = engine.generate(request_of(client))
    heard = 0
    try:
        async for chunk in chunks:
            answer += chunk.token_ids
            heard += 1
            if heard == client.leaves_after:
                return answer
    finally:
        await chunks.aclose()
    assert len(answer) == client.max_tokens
    return answer


TOO_MANY = [Client(2, (number,), 24, 0, None) for number in range(12)]
"""Each is admitted, and their answers need twice the blocks of `SIZES[3]`."""


@example(size=3, crowd=TOO_MANY)
@given(size=st.sampled_from(range(len(SIZES))), crowd=st.lists(clients, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_stock_transformers_whatever_else_happens(engines, reference, size, crowd):
    engine = engines[size]

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(listen(engine, client) for client in crowd))

    for client, answer in zip(crowd, asyncio.run(all_at_once()), strict=True):
        reference.check(client.prompt, answer, client.max_tokens)
    assert_idle(engine)


def assert_idle(engine: TransformersEngine) -> None:
    """Once the model thread has seen all cancellations, nothing is left."""
    client = Client(2, (1,), 1, 0, None)
    asyncio.run(listen(engine, client))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)


def test_the_engines_above_did_share_prefixes_and_make_room(engines):
    """Otherwise the test above would not test them. Runs after it."""
    totals = [engine.stats().counters for engine in engines]
    assert sum(counters["cached_tokens"] for counters in totals) > 0
    assert sum(counters["preemptions"] for counters in totals) > 0
