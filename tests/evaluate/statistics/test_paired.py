"""Two models on the same items: against scipy, on equal models, and where too little is known to say anything."""

import math

import numpy as np
import pytest
from scipy import stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import Verdict
from ft_service.evaluate.statistics.paired import compare_paired, randomisation_p

STUDIES = 200
WORST_BY_CHANCE = int(stats.binom.ppf(0.999, STUDIES, 0.05))
"""An honest test at 5 % exceeds this number in one of 1,000 runs of this file; seeds are fixed, so it does not vary."""


def solved(
    rng: np.random.Generator, base: float, other: float, clusters: int, size: int = 1, likeness: float = 0.6
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of 0 and 1 of two models with these true shares, and cluster labels. Items of a cluster are alike, and the
    two models find the same items hard."""
    labels = np.repeat(np.arange(clusters), size)
    shared = np.sqrt(0.3) * rng.normal(size=clusters)[labels] + np.sqrt(0.7) * rng.normal(size=len(labels))
    own = np.sqrt(0.3) * rng.normal(size=(2, clusters))[:, labels] + np.sqrt(0.7) * rng.normal(size=(2, len(labels)))
    ability = np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * own
    return (ability[0] < stats.norm.ppf(base)) * 1.0, (ability[1] < stats.norm.ppf(other)) * 1.0, labels


@pytest.mark.parametrize(
    ("share", "clusters", "size", "likeness"),
    [(0.8, 60, 1, 0.9), (0.8, 8, 5, 0.5), (0.97, 100, 1, 0.8), (0.5, 25, 4, 0)],
)
def test_equal_models_are_called_different_no_more_often_than_the_level(
    share: float, clusters: int, size: int, likeness: float
) -> None:
    rng = np.random.default_rng(11)
    called = 0
    for _ in range(STUDIES):
        base, other, labels = solved(rng, share, share, clusters, size, likeness)
        result = compare_paired(base, other, labels, resamples=2_000)
        called += result.verdict is not Verdict.NOT_SETTLED
    assert called <= WORST_BY_CHANCE


def test_equal_models_with_scores_between_0_and_1_are_called_different_no_more_often_than_the_level() -> None:
    rng = np.random.default_rng(12)
    called = 0
    for _ in range(STUDIES):
        base, other = np.clip(rng.normal(0.6, 0.3, size=(2, 40)) + rng.normal(0, 0.2, size=40), 0, 1)
        called += compare_paired(base, other, resamples=2_000).verdict is not Verdict.NOT_SETTLED
    assert called <= WORST_BY_CHANCE


@pytest.mark.parametrize(
    ("base", "other", "clusters", "size"), [(0.6, 0.7, 40, 1), (0.92, 0.96, 60, 1), (0.6, 0.7, 12, 5)]
)
def test_intervals_cover_the_true_difference(base: float, other: float, clusters: int, size: int) -> None:
    rng = np.random.default_rng(13)
    covered = 0
    for _ in range(2 * STUDIES):
        first, second, labels = solved(rng, base, other, clusters, size)
        interval = compare_paired(first, second, labels, resamples=1_000).interval
        covered += interval.low <= other - base <= interval.high
    assert covered >= 0.92 * 2 * STUDIES


def test_the_smallest_effect_is_found_in_about_four_of_five_comparisons() -> None:
    rng = np.random.default_rng(14)
    results = [compare_paired(*solved(rng, 0.6, 0.8, 60)[:2], resamples=100) for _ in range(50)]
    effect = float(np.mean([result.smallest_effect or 0 for result in results]))
    found = 0
    for _ in range(STUDIES):
        base, other, _ = solved(rng, 0.6, 0.6 + effect, 60)
        found += compare_paired(base, other, resamples=2_000).verdict is Verdict.BETTER
    assert 0.68 <= found / STUDIES <= 0.92


def test_equal_answers_settle_nothing_and_leave_room_for_a_difference() -> None:
    scores = np.arange(50) % 2
    result = compare_paired(scores, scores)
    assert result.verdict is Verdict.NOT_SETTLED
    assert result.reason == "no item differs"
    assert result.p_value == 1
    assert result.interval.low < 0 < result.interval.high
    assert result.smallest_effect is not None and result.smallest_effect > 0


@pytest.mark.parametrize(("wins", "verdict"), [(5, Verdict.NOT_SETTLED), (6, Verdict.BETTER)])
def test_five_items_without_a_loss_are_too_few_and_six_are_enough(wins: int, verdict: Verdict) -> None:
    other = np.arange(40) < wins
    result = compare_paired(np.zeros(40), other)
    assert result.verdict is verdict
    assert result.p_value == pytest.approx(2 / 2**wins)
    if verdict is Verdict.NOT_SETTLED:
        assert result.reason == "too few items differ"


def test_few_clusters_settle_nothing_however_many_items_they_hold() -> None:
    base = np.zeros(500)
    other = np.ones(500)
    assert compare_paired(base, other).verdict is Verdict.BETTER
    few = compare_paired(base, other, np.arange(500) % 5)
    assert few.verdict is Verdict.NOT_SETTLED
    assert few.reason == "fewer than 6 independent groups of items"
    single = compare_paired(base, other, np.zeros(500))
    assert single.verdict is Verdict.NOT_SETTLED
    assert (single.interval.low, single.interval.high) == (-1, 1)
    assert single.smallest_effect is None
    with pytest.raises(DataError, match="all items are of one cluster"):
        single.items_to_show(0.1)


def test_items_of_one_cluster_count_as_one() -> None:
    rng = np.random.default_rng(3)
    base, other, _ = solved(rng, 0.5, 0.65, 30)
    alone = compare_paired(base, other)
    copied = compare_paired(np.repeat(base, 8), np.repeat(other, 8), np.repeat(np.arange(30), 8))
    ignored = compare_paired(np.repeat(base, 8), np.repeat(other, 8))
    width = alone.interval.high - alone.interval.low
    assert copied.interval.high - copied.interval.low == pytest.approx(width, rel=0.1)
    assert ignored.interval.high - ignored.interval.low < width / 2
    assert copied.difference == pytest.approx(alone.difference)


def test_a_worse_model_is_called_worse_and_a_lower_loss_better() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(2.0, 0.5, size=80)
    other = base - 0.2 + rng.normal(0, 0.3, size=80)
    assert compare_paired(base, other, largest_difference=None).verdict is Verdict.WORSE
    loss = compare_paired(base, other, largest_difference=None, higher_is_better=False)
    assert loss.verdict is Verdict.BETTER
    assert loss.table is None


def test_mcnemar_agrees_with_the_published_example() -> None:
    # Agresti (1990), Categorical Data Analysis, table 10.1: approval in two surveys of the same 1,600 voters.
    base = np.repeat([1, 1, 0, 0], [794, 150, 86, 570])
    other = np.repeat([1, 0, 1, 0], [794, 150, 86, 570])
    result = compare_paired(base, other)
    assert result.table is not None
    assert (result.table.both, result.table.base_only, result.table.other_only) == (794, 150, 86)
    assert result.difference == pytest.approx(-0.04)
    assert result.p_value == pytest.approx(stats.binomtest(86, 236).pvalue)
    # The book gives -0.040 +- 1.96 * 0.0095.
    assert (result.interval.low, result.interval.high) == pytest.approx((-0.0587, -0.0213), abs=0.001)
    assert result.verdict is Verdict.WORSE
    assert result.base_share is not None
    reference = stats.binomtest(944, 1600).proportion_ci(0.95, "wilson")
    assert result.base_share.interval.low == pytest.approx(reference.low)


def test_the_randomisation_test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(5)
    for count in (9, 40):
        differences = rng.normal(0.3, 1, size=count)
        reference = stats.permutation_test(
            (differences, np.zeros(count)),
            lambda first, second, axis: np.mean(first - second, axis=axis),
            permutation_type="samples",
            n_resamples=20_000,
            vectorized=True,
            rng=np.random.default_rng(6),
        )
        ours = randomisation_p(differences, np.arange(count), np.random.default_rng(7))
        assert ours == pytest.approx(reference.pvalue, abs=1e-9 if count == 9 else 0.01)


def test_for_many_items_the_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(8)
    base = rng.random(400)
    other = np.clip(base + rng.normal(0.02, 0.2, size=400), 0, 1)
    reference = stats.ttest_rel(other, base).confidence_interval(0.95)
    interval = compare_paired(base, other).interval
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=0.003)


def test_a_seed_repeats_the_result() -> None:
    rng = np.random.default_rng(9)
    base, other = rng.random((2, 30))
    np.random.seed(0)
    first = compare_paired(base, other, seed=5)
    np.random.seed(1)
    assert compare_paired(base, other, seed=5) == first
    assert compare_paired(base, other, seed=6).interval != first.interval


def test_more_items_are_asked_for_a_smaller_effect() -> None:
    rng = np.random.default_rng(10)
    base, other, _ = solved(rng, 0.6, 0.7, 100)
    result = compare_paired(base, other)
    assert result.smallest_effect is not None
    assert result.items_to_show(result.smallest_effect) == 100
    assert result.items_to_show(result.smallest_effect / 2) == 400
    with pytest.raises(DataError, match="effect = 0"):
        result.items_to_show(0)


def test_scores_that_cannot_be_paired_are_an_error() -> None:
    with pytest.raises(DataError, match=r"scores of shape \(2,\) and \(3,\)"):
        compare_paired([0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="one score of each model"):
        compare_paired([], [])
    with pytest.raises(DataError, match="not finite"):
        compare_paired([0, math.nan], [0, 1])
    with pytest.raises(DataError, match="2 cluster labels for 3 items"):
        compare_paired([0, 1, 1], [0, 1, 1], ["a", "b"])
    with pytest.raises(DataError, match="one item differs by 3"):
        compare_paired([0, 1, 1], [3, 1, 1])
