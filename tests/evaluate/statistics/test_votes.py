"""What votes say: how outcomes count, sides, controls, verdicts that need evidence, and missing votes."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import Verdict, clopper_pearson
from ft_service.evaluate.statistics.votes import (
    Outcome,
    Vote,
    control_result,
    more_votes_needed,
    pair_results,
    side_result,
)
from tests.evaluate.statistics.simulate import Design, counted_votes, simulate


def test_two_models_with_independent_votes_get_the_exact_interval_and_test() -> None:
    (pair,) = pair_results(counted_votes("adapter", "base", wins=64, losses=36))
    exact = clopper_pearson(64, 100)
    assert pair.share.value == pytest.approx(0.64)
    assert (pair.share.interval.low, pair.share.interval.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert pair.interval_if_independent == exact
    assert pair.p_value == pytest.approx(stats.binomtest(64, 100).pvalue)
    assert pair.verdict is Verdict.BETTER
    assert pair.more_votes == 0


def test_the_first_model_named_is_the_one_the_result_is_about() -> None:
    votes = counted_votes("adapter", "base", wins=64, losses=36)
    (pair,) = pair_results(votes, models=["base", "adapter"])
    assert (pair.first, pair.wins, pair.verdict) == ("base", 36, Verdict.WORSE)


def test_the_side_a_model_stood_on_does_not_matter() -> None:
    votes = counted_votes("adapter", "base", wins=30, losses=20)
    swap = {Outcome.LEFT: Outcome.RIGHT, Outcome.RIGHT: Outcome.LEFT}
    swapped = [
        dataclasses.replace(vote, left=vote.right, right=vote.left, outcome=swap[vote.outcome]) if index % 2 else vote
        for index, vote in enumerate(votes)
    ]
    assert pair_results(swapped) == pair_results(votes)


def test_both_bad_counts_half_and_is_not_left_out() -> None:
    votes = counted_votes("adapter", "base", wins=10, losses=0)
    votes += [Vote(f"b{index}", f"b{index}", "adapter", "base", Outcome.BOTH_BAD) for index in range(90)]
    (pair,) = pair_results(votes)
    assert pair.share.value == pytest.approx(0.55)
    assert (pair.wins, pair.ties, pair.both_bad, pair.votes) == (10, 0, 90, 100)


def test_repeats_controls_and_attention_items_enter_no_win_share() -> None:
    votes = counted_votes("adapter", "base", wins=30, losses=20)
    hidden = [
        Vote("r0", "q0", "adapter", "base", Outcome.LEFT, repeat=True),
        Vote("r0", "c1", "base", "base", Outcome.LEFT),
        Vote("r0", "a1", "adapter", "base", Outcome.LEFT, expected=Outcome.RIGHT),
    ]
    assert pair_results(votes + hidden) == pair_results(votes)


@pytest.mark.parametrize("raters", [1, 2])
def test_one_or_two_raters_settle_nothing(raters: int) -> None:
    votes = [Vote(f"r{index % raters}", f"q{index}", "adapter", "base", Outcome.LEFT) for index in range(60)]
    (pair,) = pair_results(votes)
    assert pair.verdict is Verdict.NOT_SETTLED
    assert pair.reason == "fewer than 3 raters"


def test_ties_alone_and_half_settle_nothing() -> None:
    (ties,) = pair_results(counted_votes("adapter", "base", wins=0, losses=0, ties=80))
    assert ties.verdict is Verdict.NOT_SETTLED
    assert ties.share.interval.low < 0.5 < ties.share.interval.high
    assert ties.interval_if_independent is None
    (half,) = pair_results(counted_votes("adapter", "base", wins=40, losses=40))
    assert half.verdict is Verdict.NOT_SETTLED
    assert half.more_votes is None


def test_five_wins_among_many_ties_are_too_few() -> None:
    (five,) = pair_results(counted_votes("adapter", "base", wins=5, losses=0, ties=60))
    assert five.verdict is Verdict.NOT_SETTLED


def test_a_verdict_needs_the_exact_test_of_the_decisive_votes_too() -> None:
    (pair,) = pair_results(counted_votes("adapter", "base", wins=34, losses=19, ties=200))
    assert pair.share.interval.low > 0.5
    assert pair.p_value == pytest.approx(stats.binomtest(34, 53).pvalue) == pytest.approx(0.053, abs=5e-4)
    assert pair.verdict is Verdict.NOT_SETTLED
    assert pair.reason == "too few votes prefer one of the two"


def test_raters_who_agree_with_themselves_alone_widen_the_interval() -> None:
    alone = counted_votes("adapter", "base", wins=60, losses=40)
    # Ten raters with ten votes each: six always prefer the adapter, four the base.
    loyal = [
        Vote(f"r{index // 10}", f"q{index}", "adapter", "base", Outcome.LEFT if index < 60 else Outcome.RIGHT)
        for index in range(100)
    ]
    (independent,) = pair_results(alone)
    (clustered,) = pair_results(loyal)
    assert independent.share.value == clustered.share.value == pytest.approx(0.6)
    ten = clopper_pearson(6, 10)
    assert clustered.share.interval.low <= ten.low + 0.02
    assert clustered.share.interval.high >= ten.high - 0.02
    assert clustered.share.effective_count < 11


def test_with_several_pairs_a_verdict_needs_evidence_for_all_of_them_together() -> None:
    votes = counted_votes("a", "b", wins=61, losses=39)
    (alone,) = pair_results(votes)
    assert alone.verdict is Verdict.BETTER
    others = counted_votes("a", "c", wins=50, losses=50, start=200) + counted_votes("b", "c", 50, 50, start=400)
    first, *_ = pair_results(votes + others)
    assert (first.first, first.second) == ("a", "b")
    assert first.share == alone.share
    assert first.verdict is Verdict.NOT_SETTLED


def test_the_number_of_missing_votes_settles_the_share() -> None:
    (pair,) = pair_results(counted_votes("adapter", "base", wins=55, losses=45))
    assert pair.verdict is Verdict.NOT_SETTLED
    missing = more_votes_needed(pair.share)
    assert missing == pair.more_votes
    assert missing is not None
    total = 100 + missing
    rng = np.random.default_rng(2)
    wins = rng.binomial(total, 0.55, size=400)
    settled = [clopper_pearson(int(count), total).low > 0.5 for count in wins]
    assert 0.72 <= np.mean(settled) <= 0.86
    # Formula: (1.96 + 0.84)**2 * 0.55 * 0.45 / 0.05**2 = 777 votes.
    assert total == pytest.approx(777, abs=1)


def test_a_side_that_raters_prefer_is_seen() -> None:
    rng = np.random.default_rng(3)
    fair = side_result(simulate(Design(0.8), rng))
    assert fair.preferred is None
    assert fair.share is not None
    assert fair.share.interval.low < 0.5 < fair.share.interval.high
    biased = side_result(simulate(Design(0.8, kinds=(0.4, 0.0, 0.6)), rng))
    assert biased.preferred is Outcome.LEFT
    assert biased.left_wins > biased.right_wins


def test_controls_show_who_sees_a_difference_where_there_is_none() -> None:
    votes = [
        Vote(f"r{rater}", f"c{item}", "base", "base", Outcome.TIE if (rater + item) % 4 else Outcome.LEFT)
        for rater in range(10)
        for item in range(4)
    ]
    controls = control_result(votes)
    assert controls.votes == 40
    assert controls.decided is not None
    assert controls.decided.value == pytest.approx(0.25)
    assert controls.sides.preferred is Outcome.LEFT
    assert control_result([]).decided is None
    assert side_result([]).share is None


def test_votes_that_compare_nothing_are_an_error() -> None:
    with pytest.raises(DataError, match="no vote compares two different models"):
        pair_results([Vote("r", "q", "base", "base", Outcome.TIE)])
    with pytest.raises(DataError, match="votes on base, which the study does not name"):
        pair_results(counted_votes("adapter", "base", 1, 1), models=["adapter", "other"])
