"""Sampling against transformers' own processors, and what a draw may depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ft_service.errors import ServingError
from serve.engines.batching.sampling import sample, score
from serve.engines.batching.step import SamplingRow
from serve.engines.engine import Sampling

V = 50
DRAWS = 4000


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def row(sampling: Sampling | None = None, seed: int = 0, **fields: object) -> SamplingRow:
    sampling = sampling or Sampling()
    return SamplingRow(**{"sampling": sampling, "seed": seed, "prompt_ids": [1, 2], "answer_ids": [3, 3, 4], **fields})


def ids(values: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return [token.token_id for token in sample(values, rows)]


def shares(values: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token is drawn, over many seeds."""
    rows = [row(sampling, seed) for seed in range(DRAWS)]
    return torch.bincount(torch.tensor(ids(values.expand(DRAWS, V), rows)), minlength=V) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(), []),
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(top_p=0.8), [TopPLogitsWarper(0.8)]),
        (Sampling(min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
        (Sampling(repetition_penalty=1.8), [RepetitionPenaltyLogitsProcessor(1.8)]),
    ],
)
def test_tokens_are_drawn_as_often_as_transformers_distribution_says(sampling, warpers):
    values = logits(1)
    expected = values.clone()
    for warper in warpers:
        expected = warper(torch.tensor([[1, 2, 3, 3, 4]]), expected)
    expected = expected.softmax(-1)[0]
    drawn = shares(values, sampling)
    assert not drawn[expected == 0].any()
    # Five standard deviations of a share of so many draws, and one draw.
    allowed = 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1 / DRAWS
    assert ((drawn - expected).abs() <= allowed).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 5), st.floats(0, 2))
def test_a_row_gets_the_same_token_beside_any_neighbours(seeds, at, temperature):
    at %= len(seeds)
    values = torch.cat([logits(seed) for seed in seeds])
    rows = [row(Sampling(temperature=temperature, top_p=0.9), seed, num_logprobs=seed % 3 or None) for seed in seeds]
    alone = sample(values[at : at + 1], [rows[at]])
    assert sample(values, rows)[at].token_id == alone[0].token_id


def test_a_draw_depends_on_seed_and_place_and_survives_rounding():
    values = logits(2)
    tokens = ids(values.expand(200, V), [row(seed=seed) for seed in range(200)])
    assert len(set(tokens)) > 3
    shaken = values + (torch.rand(1, V, generator=torch.Generator().manual_seed(0)) - 0.5) * 8e-5
    again = ids(shaken.expand(200, V), [row(seed=seed) for seed in range(200)])
    assert sum(one != other for one, other in zip(tokens, again, strict=True)) <= 1
    places = ids(values.expand(50, V), [row(answer_ids=[7] * place) for place in range(50)])
    assert len(set(places)) > 3


def test_greedy_rows_take_the_most_likely_token_whatever_the_others_do():
    values = logits(3, rows=4)
    greedy = [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0), Sampling(temperature=1e-6)]
    assert ids(values, [row(sampling) for sampling in greedy]) == values.argmax(-1).tolist()
    mixed = [row(Sampling()), row(greedy[0]), row(Sampling(temperature=2)), row(greedy[0])]
    assert [ids(values, mixed)[index] for index in (1, 3)] == values.argmax(-1)[[1, 3]].tolist()


def test_penalties_and_bias_are_openais_and_change_the_most_likely_token():
    values = torch.zeros(1, V)
    values[0, 3] = 2.0  # twice in the answer
    values[0, 4] = 1.5  # once
    values[0, 5] = 1.2  # never
    expected = [
        ({}, 3),
        ({"frequency_penalty": 0.45}, 5),  # 2 - 2 * 0.45 = 1.1 and 1.5 - 0.45 = 1.05, against 1.2
        ({"frequency_penalty": 0.3}, 3),  # 1.4, 1.2 and 1.2
        ({"presence_penalty": 0.6}, 3),  # 1.4, 0.9 and 1.2
        ({"presence_penalty": 1.0}, 5),  # 1.0, 0.5 and 1.2
        ({"repetition_penalty": 2.0}, 5),  # 1.0, 0.75 and 1.2
    ]
    for penalty, token in expected:
        assert ids(values, [row(Sampling(temperature=0, **penalty))]) == [token]
    assert ids(values, [row(Sampling(temperature=0, logit_bias={9: 2.5}))]) == [9]
    assert ids(values, [row(Sampling(temperature=0, logit_bias={3: -100, 4: -100}))]) == [5]


class OnlyToken:
    """A grammar that allows the tokens given."""

    def __init__(self, *tokens: int) -> None:
        self.allowed = torch.zeros(V, dtype=torch.bool)
        self.allowed[list(tokens)] = True

    def allowed_V(self) -> torch.Tensor:
        return self.allowed

    def accept(self, token_id: int) -> None: ...


def test_a_grammar_rules_over_everything_and_one_without_a_way_on_is_an_error():
    values = logits(4, rows=3)
    rows = [
        row(Sampling(temperature=0), grammar=OnlyToken(11)),
        row(Sampling(temperature=2), grammar=OnlyToken(12)),
        row(Sampling(temperature=1), grammar=OnlyToken()),
    ]
    first, second, third = sample(values, rows)
    assert (first.token_id, second.token_id) == (11, 12)
    assert first.error is None and third.error is not None and "JSON schema" in third.error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_own_row_by_name(bad, temperature):
    values = logits(5, rows=3)
    values[1, 7] = bad
    rows = [row(Sampling(temperature=temperature), adapter_id=name, num_logprobs=1) for name in ("a", "b-1", None)]
    tokens = sample(values, rows)
    assert [token.error is None for token in tokens] == [True, False, True]
    assert "'b-1'" in str(tokens[1].error)


class BrokenGrammar:
    def allowed_V(self) -> torch.Tensor:
        raise IndexError("planted")


def test_a_grammar_that_fails_ends_its_own_row_only():
    values = logits(0, 2)
    rows = [row(Sampling(temperature=0), grammar=BrokenGrammar()), row(Sampling(temperature=0))]
    broken, other = sample(values, rows)
    assert broken.error and "IndexError: planted" in broken.error
    assert other.error is None and other.token_id == int(values[1].argmax())


def test_logprobs_are_those_of_the_model_itself():
    values = logits(6)
    expected = torch.log_softmax(values.double(), -1)[0]
    sampling = Sampling(temperature=0.3, logit_bias={8: 100})
    token = sample(values, [row(sampling, num_logprobs=3)])[0]
    assert token.token_id == 8 and token.scored is not None
    assert token.scored.logprob == pytest.approx(float(expected[8]), abs=1e-5)
    assert [id_ for id_, _ in token.scored.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in token.scored.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
    assert sample(values, [row()])[0].scored is None


def test_a_prompt_is_scored_token_by_token_and_not_if_a_logit_is_not_finite():
    values = logits(7, rows=2)
    scored = score(values, [4, 5], num_top=1)
    expected = torch.log_softmax(values, -1)
    assert [token.logprob for token in scored] == pytest.approx([float(expected[0, 4]), float(expected[1, 5])])
    assert scored[1].top == ((int(expected[1].argmax()), pytest.approx(float(expected[1].max()))),)
    values[0, 0] = math.nan
    with pytest.raises(ServingError, match="not finite"):
        score(values, [4, 5], num_top=1)


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_tokens():
    size = 5000
    values = torch.arange(size, 0, -1).float() * 1e-6  # all but equal, the first ones most likely
    rows = [row(Sampling(top_p=0.5), seed) for seed in range(300)]
    tokens = ids(values.expand(300, size), rows)
    assert size * 0.4 < max(tokens) <= size * 0.51


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_token_is_the_greedy_one(dtype):
    values = torch.zeros(3, V, dtype=dtype)
    values[1, [5, 9]] = 2.0
    values[2] = -1.0
    values[2, V - 1] = 0.5
    assert ids(values, [row(Sampling(temperature=0))] * 3) == [0, 5, V - 1]
