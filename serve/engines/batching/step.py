"""What the parts of the batched engine hand to each other: rows of logits and tokens.

Legend: L rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from serve.engines.engine import RefusedRequestError, Sampling


class Grammar(Protocol):
    """What the next tokens of one answer may be. Belongs to one sequence; advances with its tokens."""

    def allowed_V(self) -> torch.Tensor:
        """Bool [V] on the CPU: tokens that may come next, the request's end tokens included once the text may end.

        Raises `RefusedRequestError` for a schema that costs too much to follow. The tensor may be overwritten by the
        next call.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advance by the token that was chosen; not called for end tokens."""
        ...


@dataclass(frozen=True)
class SamplingRow:
    """One sequence, as `sample` sees it. Lives as long as the sequence; only `answer_ids` grows, by the engine."""

    sampling: Sampling
    seed: int
    """`sampling.seed`, or drawn by the engine. A draw depends on `seed` and ``len(answer_ids)`` alone, so that it is
    the same on every replica, beside any neighbours, and after a preemption."""
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    """Tokens of the answer so far."""
    adapter_id: str | None = None
    """For messages; None is the base."""
    num_logprobs: int | None = None
    """None: no log-probabilities. Otherwise that of the chosen token, and so many most likely ones."""
    grammar: Grammar | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token with natural log-probabilities of the model's own distribution: fp32, before temperature, penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, most likely first."""


@dataclass(frozen=True)
class SampledToken:
    """The next token of a row, or why there is none."""

    token_id: int
    scored: ScoredToken | None = None
    """Only where the row has `num_logprobs`."""
    error: str | RefusedRequestError | None = None
    """Set when the row's logits are not finite or its grammar allows no token: the text of a `ServingError`. An error
    of its own if the request is to blame."""


class Sample(Protocol):
    """`serve.engines.batching.sampling.sample`. Does not call `Grammar.accept`: the engine does."""

    def __call__(self, logits_LV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One row of logits, in the model's dtype, for each of `rows`. Non-finite logits fail only their own row."""
        ...


class Score(Protocol):
    """`serve.engines.batching.sampling.score`: log-probabilities of given tokens, for a prompt."""

    def __call__(self, logits_LV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[ScoredToken]:
        """Row i of the logits scores ``token_ids[i]``. Raises `ServingError` when a logit is not finite."""
        ...
