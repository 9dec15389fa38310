"""Base and adapter on the same items: the difference, how sure it is, and whether it may be called better.

"better" and "worse" need an interval that excludes 0 and a test that agrees. The skills of one evaluation are several
tests, so their p-values are Holm's: with eight skills and equal models, chance alone would otherwise name one of them
in every third evaluation.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ft_service.evaluate.statistics.intervals import LEVEL, Share, Verdict, holm
from ft_service.evaluate.statistics.paired import PairedComparison, compare_paired

VerdictName = Literal["better", "worse", "not settled"]
OVERALL = "overall"


class Result(BaseModel):
    """A part of an evaluation, as it is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoredAnswer(Result):
    """One answer of one model."""

    text: str
    value: float = Field(description="From 0 to 1.")
    reason: str
    is_cut: bool = Field(description="Whether it ended at the item's max_tokens.")


class ItemResult(Result):
    """An item that both models answered."""

    id: str
    skill: str
    cluster: str
    language: str
    metric: str
    counts: bool
    context: str = Field(default="", description="What came before the prompt: a system prompt, earlier turns.")
    prompt: str
    reference: str | list[str] | None
    base: ScoredAnswer
    adapter: ScoredAnswer

    @property
    def question(self) -> str:
        """The prompt with its context, for people and judges."""
        return f"{self.context}\n\nuser: {self.prompt}" if self.context else self.prompt

    @property
    def change(self) -> float:
        return self.adapter.value - self.base.value


class Comparison(Result):
    """Scores of both models on the same items, as means from 0 to 1; for a loss in nats per token."""

    name: str
    items: int
    clusters: int = Field(description="Independent groups of items.")
    base: float
    adapter: float
    difference: float = Field(description="adapter - base")
    low: float = Field(description="Lower end of the 95 % interval of the difference.")
    high: float
    p_value: float
    smallest_effect: float | None = Field(description="The difference that these items show with 80 % probability.")
    base_interval: tuple[float, float] | None = Field(
        default=None, description="Of `base`, for scores of 0 and 1: Wilson's, or one that respects clusters."
    )
    adapter_interval: tuple[float, float] | None = None
    verdict: VerdictName = Field(description="Of the adapter.")
    reason: str = Field(description="Why it is not settled.")
    won: int = Field(description="Items on which the adapter is better.")
    lost: int
    cut_base: int = Field(default=0, description="Answers of the base that ended at max_tokens.")
    cut_adapter: int = 0


class Comparisons(Result):
    """All items, and each skill."""

    overall: Comparison | None = Field(description="None where no item was answered by both.")
    skills: list[Comparison]


def compare_items(results: Sequence[ItemResult], seed: int) -> Comparisons:
    """Overall over the items that count, and each skill by itself."""
    counted = [result for result in results if result.counts]
    names = list(dict.fromkeys(result.skill for result in results))
    skills = [compare_one(name, [result for result in results if result.skill == name], seed) for name in names]
    overall = compare_one(OVERALL, counted, seed) if counted else None
    return Comparisons(overall=overall, skills=adjusted(skills))


def compare_one(name: str, results: Sequence[ItemResult], seed: int) -> Comparison:
    """Items of one skill, by their scores."""
    comparison = compare_values(
        name,
        [result.base.value for result in results],
        [result.adapter.value for result in results],
        [result.cluster for result in results],
        seed,
    )
    cut_base = sum(result.base.is_cut for result in results)
    cut_adapter = sum(result.adapter.is_cut for result in results)
    return comparison.model_copy(update={"cut_base": cut_base, "cut_adapter": cut_adapter})


def compare_values(
    name: str,
    base: Sequence[float],
    adapter: Sequence[float],
    clusters: Sequence[str],
    seed: int,
    *,
    is_loss: bool = False,
) -> Comparison:
    """Paired values of both models. Of a loss, lower is better. Values that are not from 0 to 1 have no largest one."""
    is_share = not is_loss and all(0 <= value <= 1 for value in (*base, *adapter))
    found = compare_paired(
        base,
        adapter,
        clusters,
        seed=seed,
        higher_is_better=not is_loss,
        largest_difference=1.0 if is_share else None,
    )
    return _comparison(name, found, base, adapter, -1 if is_loss else 1)


def _comparison(
    name: str, found: PairedComparison, base: Sequence[float], adapter: Sequence[float], sign: int
) -> Comparison:
    changes = [sign * (after - before) for before, after in zip(base, adapter, strict=True)]
    return Comparison(
        name=name,
        items=found.items,
        clusters=found.clusters,
        base=found.base_mean,
        adapter=found.other_mean,
        difference=found.difference,
        low=found.interval.low,
        high=found.interval.high,
        p_value=found.p_value,
        smallest_effect=found.smallest_effect,
        base_interval=_interval(found.base_share),
        adapter_interval=_interval(found.other_share),
        verdict=found.verdict.value,
        reason=found.reason,
        won=sum(change > 0 for change in changes),
        lost=sum(change < 0 for change in changes),
    )


def _interval(share: Share | None) -> tuple[float, float] | None:
    return (share.interval.low, share.interval.high) if share is not None else None


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, where a verdict that does not survive Holm's correction is not settled."""
    if not comparisons:
        return []
    p_values = holm([comparison.p_value for comparison in comparisons])
    return [
        comparison
        if comparison.verdict == Verdict.NOT_SETTLED.value or p_value <= 1 - LEVEL
        else comparison.model_copy(
            update={
                "verdict": Verdict.NOT_SETTLED.value,
                "reason": f"one of {len(comparisons)} comparisons may differ so much by chance",
            }
        )
        for comparison, p_value in zip(comparisons, p_values, strict=True)
    ]


def sentence(comparison: Comparison, name: str = "The adapter") -> str:
    """The comparison in plain words, for scores from 0 to 1. `name` is that of the second model."""
    figures = (
        f"{_points(comparison.difference)} points ({_points(comparison.low)} to {_points(comparison.high)}) over "
        f"{comparison.items} items"
    )
    if comparison.verdict != "not settled":
        return f"{name} is {comparison.verdict}: {figures}."
    least = comparison.smallest_effect
    shown = f" These items show a difference of {100 * least:.0f} points or more." if least is not None else ""
    return f"Not settled: {figures}; {comparison.reason}.{shown}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
