"""Simulated studies whose true win share is known: intervals cover it, and equal models are not called different."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from ft_service.evaluate.statistics.intervals import Verdict, clopper_pearson
from ft_service.evaluate.statistics.study import summarise
from ft_service.evaluate.statistics.votes import pair_results, scores_for
from tests.evaluate.statistics.simulate import CAREFUL, LEFT_ONLY, RANDOM, Design, simulate

STUDIES = 200
WORST_BY_CHANCE = int(stats.binom.ppf(0.999, STUDIES, 0.05))
TRUE_SHARES = (0.8, 0.6, 0.5, 1.0)
MIXED = (0.7, 0.15, 0.15)
"""Seven of ten raters are careful, the others press at random or always left."""


def run(design: Design, seed: int) -> tuple[float, float, int]:
    """Share of studies whose interval covers the truth, mean width against Clopper and Pearson's, false verdicts."""
    rng = np.random.default_rng(seed)
    covered = 0
    width = 0.0
    exact_width = 0.0
    called = 0
    for _ in range(STUDIES):
        votes = simulate(design, rng)
        (pair,) = pair_results(votes)
        share = pair.share
        exact = clopper_pearson(pair.wins + pair.ties / 2, pair.votes)
        covered += share.interval.low <= design.true_share <= share.interval.high
        width += share.interval.high - share.interval.low
        exact_width += exact.high - exact.low
        called += pair.verdict is not Verdict.NOT_SETTLED
    return covered / STUDIES, width / exact_width, called


@pytest.mark.parametrize("win_share", TRUE_SHARES)
def test_intervals_of_independent_votes_cover_the_truth_and_are_hardly_wider_than_exact_ones(win_share: float) -> None:
    coverage, width, called = run(Design(win_share), seed=31)
    assert coverage >= 0.92
    assert width <= 1.3
    if win_share == 0.5:
        assert called <= WORST_BY_CHANCE


@pytest.mark.parametrize(("raters", "votes_each"), [(10, 30), (300, 1)])
def test_from_ten_raters_on_intervals_of_independent_votes_are_hardly_wider_than_exact_ones(
    raters: int, votes_each: int
) -> None:
    """The same 300 votes: of few people, or of many with one vote each, who still share items."""
    found = [run(Design(share, raters=raters, votes_each=votes_each), seed=37) for share in TRUE_SHARES]
    assert min(coverage for coverage, _, _ in found) >= 0.92
    assert np.mean([width for _, width, _ in found]) <= 1.3


@pytest.mark.parametrize("win_share", TRUE_SHARES)
def test_intervals_cover_the_truth_where_raters_are_careful_random_and_one_sided(win_share: float) -> None:
    coverage, _, called = run(Design(win_share, kinds=MIXED), seed=32)
    assert coverage >= 0.92
    if win_share == 0.5:
        assert called <= WORST_BY_CHANCE


@pytest.mark.parametrize("win_share", (0.8, 0.6, 0.5))
def test_intervals_cover_the_truth_where_raters_agree_on_which_items_are_better(win_share: float) -> None:
    """All votes on one item go the same way nine times of ten, so 300 votes on 60 items are far fewer than 300."""
    coverage, _, called = run(Design(win_share, consensus=0.9), seed=33)
    assert coverage >= 0.92
    if win_share == 0.5:
        assert called <= WORST_BY_CHANCE


@pytest.mark.parametrize("design", [Design(0.8, raters=5, votes_each=40), Design(0.6, raters=10, ties=0.4)])
def test_intervals_cover_the_truth_with_few_raters_and_with_ties(design: Design) -> None:
    coverage, _, _ = run(design, seed=34)
    assert coverage >= 0.92


def test_the_exact_interval_would_not_cover_the_truth_of_dependent_votes() -> None:
    """Why clusters are respected: this study fails with intervals that take votes as independent."""
    design = Design(0.6, consensus=0.9)
    rng = np.random.default_rng(33)
    covered = 0
    for _ in range(STUDIES):
        scores = scores_for("adapter", simulate(design, rng))
        interval = clopper_pearson(scores.sum(), len(scores))
        covered += interval.low <= design.true_share <= interval.high
    assert covered / STUDIES < 0.88


def test_a_better_adapter_is_called_better() -> None:
    rng = np.random.default_rng(35)
    verdicts = [pair_results(simulate(Design(0.8, kinds=MIXED), rng))[0].verdict for _ in range(50)]
    assert verdicts.count(Verdict.BETTER) >= 47
    assert verdicts.count(Verdict.WORSE) == 0


def test_without_raters_who_look_random_the_share_is_that_of_careful_raters() -> None:
    """Eight careful raters of eleven, the others random or always left: the share of all is diluted towards half."""
    design = Design(0.8, votes_each=40, items=60, consensus=0.95)
    kinds: Sequence[int] = [CAREFUL] * 8 + [RANDOM] * 2 + [LEFT_ONLY]
    rng = np.random.default_rng(36)
    everyone = []
    careful = []
    covered = 0
    for _ in range(20):
        result = summarise(simulate(design, rng, kinds, repeats=6))
        share = (result.without_random or result.everyone).pairs[0].share
        everyone.append(result.everyone.pairs[0].share.value)
        careful.append(share.value)
        covered += share.interval.low <= 0.8 <= share.interval.high
    assert np.mean(everyone) == pytest.approx((8 * 0.8 + 3 * 0.5) / 11, abs=0.03)
    assert np.mean(careful) == pytest.approx(0.8, abs=0.03)
    assert covered >= 17
