"""Intervals of shares: published values, scipy's, and clusters that add no evidence."""

import numpy as np
import pytest
from scipy import stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import (
    clopper_pearson,
    clustered_share,
    effective_clusters,
    holm,
    variance_of_mean,
    wilson,
)

# Newcombe (1998), Two-sided confidence intervals for the single proportion, Statistics in Medicine 17, table I.
NEWCOMBE = [
    (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
    (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
    (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
    (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
]


@pytest.mark.parametrize(("hits", "trials", "by_wilson", "by_clopper_pearson"), NEWCOMBE)
def test_intervals_are_those_of_newcombe(
    hits: int, trials: int, by_wilson: tuple[float, float], by_clopper_pearson: tuple[float, float]
) -> None:
    score = wilson(hits, trials)
    exact = clopper_pearson(hits, trials)
    assert (score.low, score.high) == pytest.approx(by_wilson, abs=6e-5)
    assert (exact.low, exact.high) == pytest.approx(by_clopper_pearson, abs=6e-5)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (3, 7), (199, 200)])
def test_intervals_are_those_of_scipy(hits: int, trials: int, level: float) -> None:
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        reference = stats.binomtest(hits, trials).proportion_ci(level, method)
        interval = ours(hits, trials, level)
        assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_an_interval_of_nothing_is_an_error() -> None:
    for interval in (wilson, clopper_pearson):
        with pytest.raises(DataError, match="0 of 0 is no share"):
            interval(0, 0)
        with pytest.raises(DataError, match="3 of 2 is no share"):
            interval(3, 2)
    with pytest.raises(DataError, match="a share of 0 values"):
        clustered_share([])
    with pytest.raises(DataError, match="each from 0 to 1"):
        clustered_share([0.5, 1.5])
    with pytest.raises(DataError, match="level = 95"):
        clustered_share([0.5], level=95)


@pytest.mark.parametrize("hits", [0, 1, 12, 20])
def test_independent_votes_get_the_interval_of_clopper_and_pearson(hits: int) -> None:
    values = np.arange(20) < hits
    exact = clopper_pearson(hits, 20)
    share = clustered_share(values, np.arange(20), [f"q{index}" for index in range(20)])
    assert (share.interval.low, share.interval.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert share.effective_count == pytest.approx(20)


def test_copies_of_a_vote_add_no_evidence() -> None:
    votes = np.tile([1.0, 1, 0, 1, 0, 1, 1, 1, 0, 1], 1)
    once = clustered_share(votes, np.arange(10))
    copied = clustered_share(np.repeat(votes, 10), np.repeat(np.arange(10), 10))
    assert copied.count == 100
    assert copied.effective_count <= once.effective_count
    assert copied.interval.low <= once.interval.low < once.interval.high <= copied.interval.high


def test_few_raters_cannot_show_that_they_agree() -> None:
    """Five raters of equal taste: no variance between them is seen, but five is few to see one."""
    votes = np.tile([1.0, 1, 1, 0], 50)
    few = clustered_share(votes, np.repeat(np.arange(5), 40))
    many = clustered_share(votes, np.repeat(np.arange(50), 4))
    exact = stats.t.ppf(0.975, 199)
    assert few.effective_count == pytest.approx(200 * (exact / stats.t.ppf(0.975, 4)) ** 2)
    assert many.effective_count == pytest.approx(200 * (exact / stats.t.ppf(0.975, 49)) ** 2)


def test_ties_narrow_the_interval_but_never_to_a_point() -> None:
    ties = clustered_share([0.5] * 20)
    coins = clustered_share([0.0, 1.0] * 10)
    assert ties.value == coins.value == 0.5
    assert coins.interval.low < ties.interval.low < 0.45
    assert coins.interval.high > ties.interval.high > 0.55


def test_the_variance_of_the_mean_is_that_of_cluster_means_where_clusters_are_equally_large() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((8, 5))
    expected = values.mean(axis=1).var(ddof=1) / 8
    assert variance_of_mean(values.ravel(), np.repeat(np.arange(8), 5)) == pytest.approx(expected)
    assert variance_of_mean(values[0]) == pytest.approx(stats.sem(values[0]) ** 2)


def test_one_large_cluster_counts_as_few() -> None:
    assert effective_clusters(np.repeat(np.arange(10), 3)) == pytest.approx(10)
    assert effective_clusters(np.array([0] * 91 + list(range(1, 10)))) < 1.3


def test_holm_corrects_the_example_of_its_definition() -> None:
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
