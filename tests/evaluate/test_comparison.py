"""Comparisons never flatter: equal models over many evaluations, several skills at once, and words that fit."""

import random

import pytest

from ft_service.evaluate.comparison import Comparison, ItemResult, ScoredAnswer, adjusted, compare_items, sentence

SKILLS = ("arithmetic", "reading", "code", "extraction")


def answer(value: float) -> ScoredAnswer:
    return ScoredAnswer(text="", value=value, reason="", is_cut=False)


def result(number: int, skill: str, base: float, adapter: float, cluster: str | None = None) -> ItemResult:
    name = f"{skill}-{number}"
    return ItemResult(
        id=name,
        skill=skill,
        cluster=cluster or name,
        language="en",
        metric="exact",
        counts=True,
        prompt=name,
        reference=None,
        base=answer(base),
        adapter=answer(adapter),
    )


@pytest.mark.slow
def test_equal_models_are_called_better_no_more_often_than_stated():
    """200 evaluations of two models of the same ability, whose answers are drawn apart: at 95 % an overall verdict is
    better in 2.5 % of them, and any skill is better or worse in at most 5 %. The bounds are those of the binomial
    distribution that chance passes in one of 1,000 runs of this test."""
    rng = random.Random(0)
    better = 0
    any_skill = 0
    for seed in range(200):
        results = [
            result(number, skill, float(rng.random() < 0.7), float(rng.random() < 0.7))
            for skill in SKILLS
            for number in range(30)
        ]
        found = compare_items(results, seed)
        assert found.overall is not None
        better += found.overall.verdict == "better"
        any_skill += any(skill.verdict != "not settled" for skill in found.skills)
    assert better <= 14
    assert any_skill <= 21


def comparison(p_value: float, verdict: str = "better") -> Comparison:
    return Comparison(
        name="x",
        items=40,
        clusters=40,
        base=0.5,
        adapter=0.6,
        difference=0.1,
        low=0.01,
        high=0.19,
        p_value=p_value,
        smallest_effect=0.12,
        verdict=verdict,  # type: ignore[arg-type]
        reason="",
        won=8,
        lost=2,
    )


def test_a_skill_among_many_needs_more_evidence():
    alone = adjusted([comparison(0.03)])
    assert alone[0].verdict == "better"
    among = adjusted([comparison(0.03), *[comparison(0.9, "not settled")] * 7])
    assert among[0].verdict == "not settled"
    assert among[0].reason == "one of 8 comparisons may differ so much by chance"
    strong = adjusted([comparison(0.0001), *[comparison(0.9, "not settled")] * 7])
    assert strong[0].verdict == "better"


def test_items_of_one_passage_count_as_one_group():
    """Forty items that all depend on two passages say no more than two."""
    apart = compare_items([result(number, "reading", 0, 1) for number in range(40)], 0).overall
    together = compare_items([result(number, "reading", 0, 1, f"p{number % 2}") for number in range(40)], 0).overall
    assert apart is not None and apart.verdict == "better"
    assert together is not None and together.verdict == "not settled" and together.clusters == 2


def test_the_sentence_says_better_only_where_it_is_settled():
    assert sentence(comparison(0.01)) == "The adapter is better: +10.0 points (+1.0 to +19.0) over 40 items."
    unsettled = comparison(0.2, "not settled").model_copy(update={"reason": "too few items differ"})
    text = sentence(unsettled)
    assert "better" not in text
    assert text.startswith("Not settled: +10.0 points (+1.0 to +19.0) over 40 items; too few items differ.")
    assert text.endswith("These items show a difference of 12 points or more.")
