"""Losses of given texts under both models, from the log-probabilities of /v1/completions (`echo`, `logprobs`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from ft_service.evaluate.ask import Answer
from ft_service.evaluate.comparison import Comparison, Result, compare_values


@dataclass(frozen=True)
class Loss:
    """Sum of the negative log-probabilities of some tokens, in nats."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


class LossComparison(Result):
    """The loss of the same tokens under both models, in nats per token over all tokens."""

    texts: int
    tokens: int
    base: float
    adapter: float
    per_text: Comparison = Field(description="Of the mean loss of each text; a positive difference is worse.")

    @property
    def base_perplexity(self) -> float:
        return math.exp(self.base)

    @property
    def adapter_perplexity(self) -> float:
        return math.exp(self.adapter)


def loss_of(answer: Answer, last: int | None = None) -> Loss | None:
    """The loss of the tokens of a measured prompt, or of its `last` ones; None if there are none.

    The first token of a prompt has no probability, and does not count.
    """
    values = answer.token_logprobs or []
    chosen = values if last is None else values[max(0, len(values) - last) :]
    known = [value for value in chosen if value is not None]
    return Loss(-math.fsum(known), len(known)) if known else None


def compare_losses(
    name: str, base: Sequence[Loss], adapter: Sequence[Loss], clusters: Sequence[str], seed: int
) -> LossComparison | None:
    """Losses of the same texts, in the same order. None without texts."""
    if not base:
        return None
    per_text = compare_values(
        name, [loss.mean for loss in base], [loss.mean for loss in adapter], clusters, seed, is_loss=True
    )
    return LossComparison(
        texts=len(base),
        tokens=sum(loss.tokens for loss in base),
        base=_mean(base),
        adapter=_mean(adapter),
        per_text=per_text,
    )


def _mean(losses: Sequence[Loss]) -> float:
    return math.fsum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
