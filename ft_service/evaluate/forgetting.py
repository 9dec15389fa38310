"""What the adapter lost: general items and general text, against the base as it is served.

Lost ability is measured on items that have nothing to do with the training data, and on the loss of general texts. It
counts with its uncertainty: an adapter passes only where the interval of the difference stays above the limit.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ft_service.evaluate.comparison import Comparison, ItemResult, Result, adjusted, compare_one
from ft_service.evaluate.losses import LossComparison

GENERAL = "general items"
_SHOWN = 10


class LostItem(Result):
    """An item that the base answers better than the adapter."""

    id: str
    skill: str
    prompt: str
    reference: str | list[str] | None
    base_answer: str
    adapter_answer: str
    base_value: float
    adapter_value: float
    reason: str


class Forgetting(Result):
    """What was lost."""

    overall: Comparison | None
    skills: list[Comparison]
    texts: LossComparison | None = Field(description="The loss of general texts; exp of it is the perplexity.")
    lost: list[LostItem] = Field(description="The items that lost most, at most ten.")
    num_lost: int
    num_gained: int
    limit: float = Field(description="The suite's thresholds.max_forgetting.")
    verdict: Literal["within the limit", "forgot", "not settled", "not measured"]
    sentence: str


def measure_forgetting(
    results: Sequence[ItemResult], texts: LossComparison | None, limit: float, seed: int
) -> Forgetting:
    """`results` are those of the general items."""
    if not results:
        return Forgetting(
            overall=None,
            skills=[],
            texts=texts,
            lost=[],
            num_lost=0,
            num_gained=0,
            limit=limit,
            verdict="not measured",
            sentence="No general items: add `general: [general-en]` to the suite to see what the adapter forgot.",
        )
    overall = compare_one(GENERAL, results, seed)
    names = list(dict.fromkeys(result.skill for result in results))
    skills = adjusted([compare_one(name, [one for one in results if one.skill == name], seed) for name in names])
    lost = sorted((result for result in results if result.change < 0), key=lambda result: result.change)
    verdict = _verdict(overall, limit)
    return Forgetting(
        overall=overall,
        skills=skills,
        texts=texts,
        lost=[_lost(result) for result in lost[:_SHOWN]],
        num_lost=len(lost),
        num_gained=sum(result.change > 0 for result in results),
        limit=limit,
        verdict=verdict,
        sentence=_sentence(verdict, overall, skills, limit),
    )


def _verdict(overall: Comparison, limit: float) -> Literal["within the limit", "forgot", "not settled"]:
    if overall.difference < -limit and overall.verdict == "worse":
        return "forgot"
    if overall.low >= -limit:
        return "within the limit"
    return "not settled"


def _sentence(verdict: str, overall: Comparison, skills: Sequence[Comparison], limit: float) -> str:
    worse = [skill.name for skill in skills if skill.verdict == "worse"]
    where = f" Worse at: {', '.join(worse)}." if worse else ""
    change = f"{100 * overall.difference:+.1f} points ({100 * overall.low:+.1f} to {100 * overall.high:+.1f})"
    figures = f"{change} on {overall.items} general items; the limit is {-100 * limit:.1f}."
    if verdict == "not settled":
        return f"Not settled whether it forgot more than the limit: {figures}{where}"
    return f"{'It forgot' if verdict == 'forgot' else 'Within the limit'}: {figures}{where}"


def _lost(result: ItemResult) -> LostItem:
    return LostItem(
        id=result.id,
        skill=result.skill,
        prompt=result.question,
        reference=result.reference,
        base_answer=result.base.text,
        adapter_answer=result.adapter.text,
        base_value=result.base.value,
        adapter_value=result.adapter.value,
        reason=result.adapter.reason,
    )
