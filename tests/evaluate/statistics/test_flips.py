"""Flips: which items change their answer over variants."""

import numpy as np
import pytest

from ft_service.errors import DataError
from ft_service.evaluate.statistics.flips import count_flips
from ft_service.evaluate.statistics.intervals import clopper_pearson


def test_flipped_items_are_those_whose_answers_differ() -> None:
    answers: list[list[object]] = [
        ["4", "4", "4"],
        ["4", "5", "4"],
        ["a", None, "b"],
        [None, None, "c"],
        [{"k": [1]}, {"k": [1]}, None],
    ]
    result = count_flips(answers)
    assert result.flipped_items == (1, 2)
    assert (result.items, result.variants, result.left_out) == (4, 3, 1)
    assert result.flipped.value == pytest.approx(2 / 4)
    # Of 3 pairs of the second item one agrees; of the third none.
    assert result.agreement.value == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)


def test_the_share_of_independent_items_has_the_exact_interval() -> None:
    answers = [["a", "b"] if index < 12 else ["a", "a"] for index in range(100)]
    exact = clopper_pearson(12, 100)
    interval = count_flips(answers).flipped.interval
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))


def test_no_flip_does_not_mean_that_none_can_happen() -> None:
    result = count_flips([["a", "a"]] * 30)
    assert result.flipped.value == 0
    assert result.flipped.interval.high > 0.1
    assert result.agreement.interval.low < 0.9


def test_items_of_one_cluster_widen_the_interval() -> None:
    answers = [["a", "b"] if index // 10 % 2 else ["a", "a"] for index in range(100)]
    alone = count_flips(answers).flipped.interval
    clustered = count_flips(answers, [index // 10 for index in range(100)]).flipped.interval
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_more_variants_flip_more_items_but_agree_as_often() -> None:
    rng = np.random.default_rng(1)
    answers = np.where(rng.random((2_000, 10)) < 0.9, "usual", "other").tolist()
    two = count_flips([row[:2] for row in answers])
    ten = count_flips(answers)
    assert ten.flipped.value > 3 * two.flipped.value
    assert ten.agreement.value == pytest.approx(two.agreement.value, abs=0.03)
    assert two.agreement.value == pytest.approx(0.82, abs=0.03)


def test_answers_that_cannot_be_compared_are_an_error() -> None:
    with pytest.raises(DataError, match="no item has two answers"):
        count_flips([["a", None], [None, None]])
    with pytest.raises(DataError, match="different numbers of variants"):
        count_flips([["a", "b"], ["a"]])
    with pytest.raises(DataError, match="1 cluster labels for 2 items"):
        count_flips([["a", "b"], ["a", "b"]], ["x"])
