"""Strengths of several models: against an independent fit, through sweeps, and with raters as the unit of evidence."""

import itertools

import numpy as np
import pytest
from scipy import optimize, special, stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.strengths import bradley_terry, fit, refit
from ft_service.evaluate.statistics.votes import Outcome, Vote
from tests.evaluate.statistics.simulate import counted_votes

STUDIES = 100


def share_of(votes: list[Vote], first: str, second: str, **settings: int) -> tuple[float, float, float]:
    """Expected share of `first` against `second` with its interval."""
    for pair in bradley_terry(votes, **settings).pairs:
        if (pair.first, pair.second) == (first, second):
            return pair.share, pair.interval.low, pair.interval.high
        if (pair.first, pair.second) == (second, first):
            return 1 - pair.share, 1 - pair.interval.high, 1 - pair.interval.low
    raise AssertionError(f"no pair {first}, {second}")


def test_a_sweep_of_two_models_does_not_become_half() -> None:
    share, low, high = share_of(counted_votes("adapter", "base", wins=20, losses=0), "adapter", "base")
    assert share == pytest.approx(20.5 / 21, abs=1e-5)
    assert 0.6 < low < 0.85
    assert high > 0.99


def test_a_sweep_of_one_of_three_models_leaves_the_others_apart() -> None:
    votes = counted_votes("a", "b", 20, 0) + counted_votes("a", "c", 20, 0, start=100)
    votes += counted_votes("b", "c", 15, 5, start=200)
    fit = bradley_terry(votes)
    assert [strength.model for strength in fit.models] == ["a", "b", "c"]
    assert fit.models[0].expected_share > 0.95
    share, low, high = share_of(votes, "b", "c")
    assert share == pytest.approx(0.74, abs=0.03)
    assert low < 0.75 < high


def test_the_fit_has_the_largest_likelihood() -> None:
    counts = {("a", "b"): (14, 6, 2), ("a", "c"): (11, 3, 0), ("b", "c"): (9, 8, 4), ("c", "d"): (5, 1, 1)}
    votes = [
        vote
        for index, (pair, numbers) in enumerate(counts.items())
        for vote in counted_votes(*pair, *numbers, start=100 * index)
    ]

    def minus_log_likelihood(free: np.ndarray) -> float:
        strength = dict(zip("abcd", (0.0, *free), strict=True))
        total = 0.0
        for (first, second), (wins, losses, ties) in counts.items():
            difference = strength[first] - strength[second]
            half = (ties + 1) / 2  # a tie, and the one pseudo-draw of the pair
            total += (wins + half) * np.log(special.expit(difference))
            total += (losses + half) * np.log(special.expit(-difference))
        return -total

    best = dict(zip("abcd", (0.0, *optimize.minimize(minus_log_likelihood, np.zeros(3), tol=1e-12).x), strict=True))
    fit = bradley_terry(votes, resamples=10)
    for pair in fit.pairs:
        assert pair.share == pytest.approx(special.expit(best[pair.first] - best[pair.second]), abs=1e-4)
    for strength in fit.models:
        others = [special.expit(best[strength.model] - best[other]) for other in "abcd" if other != strength.model]
        assert strength.expected_share == pytest.approx(np.mean(others), abs=1e-4)


def test_refits_are_those_of_evalica() -> None:
    rng = np.random.default_rng(22)
    pairs = np.array([[0, 1], [0, 2], [1, 2], [2, 3]])
    counts = rng.poisson(rng.choice([0.3, 4, 30], size=(40, 12))).astype(float)
    counts[0] = 0
    counts[1] = [20, 0, 0] * 4
    counts[2] = [300, 0, 0, 0, 300, 0, 50, 50, 0, 0, 0, 9]
    for one, logs in zip(counts, refit(counts, pairs, 4), strict=True):
        assert logs == pytest.approx(fit(one, pairs, 4), abs=1e-4)


def test_votes_of_one_rater_count_as_one_persons() -> None:
    def study(votes_each: int) -> list[Vote]:
        # Each of ten raters has a favourite and prefers it in every vote: 7 of them model a, 3 model b.
        return [
            Vote(f"r{rater}", f"q{rater}-{index}", "a", "b", Outcome.LEFT if rater < 7 else Outcome.RIGHT)
            for rater in range(10)
            for index in range(votes_each)
        ]

    _, low, high = share_of(study(1), "a", "b")
    _, low_of_many, high_of_many = share_of(study(30), "a", "b")
    assert high_of_many - low_of_many > 0.8 * (high - low)


def test_intervals_cover_the_true_shares() -> None:
    truth = {"a": 0.8, "b": 0.0, "c": -0.5}
    normal_quantiles = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    rng = np.random.default_rng(21)
    covered = []
    for _ in range(STUDIES):
        votes = []
        for rater in range(12):
            taste = {model: strength + rng.normal(0, 0.4) for model, strength in truth.items()}
            for item, (first, second) in itertools.product(range(4), itertools.combinations("abc", 2)):
                wins = rng.random() < special.expit(taste[first] - taste[second])
                votes.append(
                    Vote(f"r{rater}", f"q{rater}-{item}", first, second, Outcome.LEFT if wins else Outcome.RIGHT)
                )
        for pair in bradley_terry(votes, resamples=200).pairs:
            # The win share over all raters: their tastes in a pair differ by 0.4 * sqrt(2) in log-odds.
            difference = truth[pair.first] - truth[pair.second]
            share = special.expit(difference + 0.4 * np.sqrt(2) * normal_quantiles).mean()
            covered.append(pair.interval.low <= share <= pair.interval.high)
    assert np.mean(covered) >= 0.92


def test_a_seed_repeats_the_result() -> None:
    votes = counted_votes("a", "b", 14, 6) + counted_votes("b", "c", 9, 8, start=100)
    first = bradley_terry(votes, seed=3, resamples=50)
    np.random.seed(7)
    assert bradley_terry(votes, seed=3, resamples=50) == first
    assert bradley_terry(votes, seed=4, resamples=50) != first


def test_models_that_were_never_compared_have_no_common_scale() -> None:
    votes = counted_votes("a", "b", 5, 5) + counted_votes("c", "d", 5, 5, start=100)
    with pytest.raises(DataError, match="no votes connect a, b with c, d"):
        bradley_terry(votes)
    with pytest.raises(DataError, match="no vote compares"):
        bradley_terry([])
