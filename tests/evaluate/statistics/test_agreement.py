"""Agreement of raters, against published examples and evalica; random and one-sided raters are found and reported."""

import re

import evalica
import numpy as np
import pandas as pd
import pytest

from ft_service.errors import DataError
from ft_service.evaluate.statistics.agreement import (
    RaterVerdict,
    judge_agreement,
    krippendorff_alpha,
    rater_reports,
    self_agreement,
    votes_alpha,
)
from ft_service.evaluate.statistics.sentences import judge_words
from ft_service.evaluate.statistics.study import summarise
from ft_service.evaluate.statistics.votes import Outcome, Vote
from tests.evaluate.statistics.simulate import CAREFUL, LEFT_ONLY, RANDOM, Design, counted_votes, simulate

KINDS = [CAREFUL] * 8 + [RANDOM] * 2 + [LEFT_ONLY]


def rows(*texts: str) -> list[list[str | None]]:
    """One rater a text, one label a character, a dot where there is none."""
    return [[None if character == "." else character for character in text] for text in texts]


def test_alpha_is_that_of_krippendorffs_examples() -> None:
    # Krippendorff (2011), Computing Krippendorff's alpha-reliability: two values, five values, missing data.
    assert krippendorff_alpha(rows("0100000000", "1110010100")).value == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha(rows("aabbdcccedda", "babbbccceddd")).value == pytest.approx(0.692, abs=5e-4)
    four = rows("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    assert krippendorff_alpha(four).value == pytest.approx(0.743, abs=5e-4)


def test_alpha_with_missing_labels_is_that_of_evalica() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        codes = rng.integers(0, 4, size=(5, 12))
        present = rng.random((5, 12)) < 0.6
        labels = [
            [f"label {c}" if there else None for c, there in zip(*row, strict=True)]
            for row in zip(codes, present, strict=True)
        ]
        frame = pd.DataFrame(np.where(present, codes.astype(float), np.nan))
        assert krippendorff_alpha(labels).value == pytest.approx(evalica.alpha(frame, distance="nominal").alpha)


def test_alpha_is_undefined_where_nothing_can_disagree() -> None:
    assert krippendorff_alpha(rows("aaa", "aaa")).value is None
    assert krippendorff_alpha(rows("a..", ".b.")).value is None
    assert krippendorff_alpha(rows("ab", "ab")).value == pytest.approx(1)
    with pytest.raises(DataError, match="different numbers of units"):
        krippendorff_alpha(rows("ab", "a"))


def test_the_interval_of_alpha_contains_it_and_repeats() -> None:
    rng = np.random.default_rng(2)
    votes = simulate(Design(0.7, raters=10, consensus=0.85), rng)
    alpha = votes_alpha(votes)
    assert alpha.value is not None and alpha.interval is not None
    assert alpha.interval.low < alpha.value < alpha.interval.high
    assert votes_alpha(votes) == alpha
    # Two raters who each name the better answer with probability 0.85 agree in 0.745 of units.
    assert alpha.value == pytest.approx(0.4, abs=0.15)


def test_coins_agree_no_better_than_chance() -> None:
    alpha = votes_alpha(simulate(Design(0.5, raters=20), np.random.default_rng(3)))
    assert alpha.interval is not None
    assert alpha.interval.low < 0 < alpha.interval.high


def test_a_label_is_the_model_and_not_the_side() -> None:
    votes = [
        Vote("r0", "q0", "adapter", "base", Outcome.LEFT),
        Vote("r1", "q0", "base", "adapter", Outcome.RIGHT),
        Vote("r0", "q1", "adapter", "base", Outcome.TIE),
        Vote("r1", "q1", "base", "adapter", Outcome.TIE),
    ]
    assert votes_alpha(votes).value == pytest.approx(1)


def test_agreement_with_oneself_compares_repeats_with_the_first_vote() -> None:
    votes = [
        Vote("r0", "q0", "adapter", "base", Outcome.LEFT),
        Vote("r0", "q0", "base", "adapter", Outcome.RIGHT, repeat=True),
        Vote("r1", "q0", "adapter", "base", Outcome.LEFT),
        Vote("r1", "q0", "adapter", "base", Outcome.RIGHT, repeat=True),
        Vote("r1", "q9", "adapter", "base", Outcome.RIGHT, repeat=True),
    ]
    share = self_agreement(votes)
    assert share is not None
    assert (share.value, share.count) == (0.5, 2)
    assert self_agreement(votes[:1]) is None


def test_raters_who_click_at_random_are_found_and_reported() -> None:
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(10):
        votes = simulate(Design(0.7, votes_each=40, consensus=0.9), rng, KINDS, repeats=8)
        reports = {report.rater: report for report in rater_reports(votes)}
        assert len(reports) == len(KINDS)
        found += sum(reports[name].verdict is RaterVerdict.RANDOM for name in ("r08", "r09", "r10"))
        assert all(reports[f"r{index:02d}"].verdict is RaterVerdict.CONSISTENT for index in range(8))
        assert reports["r10"].preferred_side is Outcome.LEFT
        assert reports["r10"].left.hits == reports["r10"].left.trials == 48
    assert found >= 24


def test_no_rater_is_called_random_where_the_models_are_equal_or_votes_are_few() -> None:
    rng = np.random.default_rng(5)
    called = 0
    for _ in range(20):
        equal = rater_reports(simulate(Design(0.5, raters=10, votes_each=30), rng, repeats=5))
        few = rater_reports(simulate(Design(0.7, raters=10, votes_each=5, consensus=0.9), rng, repeats=1))
        called += any(report.verdict is RaterVerdict.RANDOM for report in (*equal, *few))
    assert called <= 3


def test_failed_attention_items_tell_a_random_rater_without_any_overlap() -> None:
    def votes_of(rater: str, right: int) -> list[Vote]:
        sides = [Outcome.LEFT, Outcome.RIGHT]
        return [
            Vote(
                rater,
                f"{rater}-{index}",
                "good",
                "nonsense",
                sides[(index + (index >= right)) % 2],
                expected=sides[index % 2],
            )
            for index in range(20)
        ]

    votes = [vote for rater in "abcd" for vote in votes_of(rater, 19)] + votes_of("e", 9)
    verdicts = {report.rater: report.verdict for report in rater_reports(votes)}
    assert verdicts == {**dict.fromkeys("abcd", RaterVerdict.CONSISTENT), "e": RaterVerdict.RANDOM}


def test_random_raters_stay_in_the_result_and_a_second_one_is_shown_without_them() -> None:
    votes = simulate(Design(0.8, votes_each=40, consensus=0.95), np.random.default_rng(6), KINDS, repeats=8)
    result = summarise(votes)
    assert set(result.looks_random) <= {"r08", "r09", "r10"}
    assert result.looks_random
    assert result.everyone.pairs[0].raters == 11
    assert result.without_random is not None
    assert result.without_random.pairs[0].raters == 11 - len(result.looks_random)
    assert result.without_random.pairs[0].share.value > result.everyone.pairs[0].share.value
    assert result.everyone.strengths is None
    assert len(result.raters) == 11


def test_a_study_of_careful_raters_has_one_result() -> None:
    result = summarise(simulate(Design(0.8, votes_each=30, consensus=0.95), np.random.default_rng(7)))
    assert result.looks_random == ()
    assert result.without_random is None


def test_three_models_are_ranked_unless_they_were_never_compared() -> None:
    votes = counted_votes("a", "b", 30, 10) + counted_votes("b", "c", 30, 10, start=100)
    result = summarise(votes).everyone
    assert result.strengths is not None
    assert [strength.model for strength in result.strengths.models] == ["a", "b", "c"]
    apart = summarise(votes + counted_votes("d", "e", 30, 10, start=200)).everyone
    assert apart.strengths is None
    assert "no votes connect" in apart.no_strengths_because


def test_a_second_vote_without_the_mark_of_a_repeat_is_an_error() -> None:
    vote = Vote("r0", "q0", "adapter", "base", Outcome.LEFT)
    with pytest.raises(DataError, match="rater r0 voted twice on item q0 with adapter and base"):
        summarise([vote, vote])


def test_a_judge_is_held_against_every_vote_and_against_what_people_reach_among_themselves() -> None:
    pair = ("adapter", "base")

    def vote(rater: str, item: str, outcome: Outcome) -> Vote:
        return Vote(rater, item, "adapter", "base", outcome)

    votes = [
        vote("r1", "q1", Outcome.LEFT),
        vote("r2", "q1", Outcome.LEFT),
        vote("r3", "q1", Outcome.RIGHT),
        vote("r1", "q2", Outcome.RIGHT),
        vote("r2", "q2", Outcome.RIGHT),
        vote("r1", "q3", Outcome.TIE),
        vote("r2", "q3", Outcome.BOTH_BAD),
        vote("r1", "q4", Outcome.LEFT),  # not judged
        Vote("r1", "q1", "base", "adapter", Outcome.LEFT, repeat=True),
    ]
    verdicts = {("q1", pair): "adapter", ("q2", pair): "adapter", ("q3", pair): None}
    found = judge_agreement(votes, verdicts)
    assert found is not None
    assert found.units == 3
    assert found.with_people.value == pytest.approx(4 / 7)  # 2 of 3, 0 of 2, 2 of 2
    assert found.between_people is not None
    assert found.between_people.value == pytest.approx(3 / 5)  # 1 of 3 pairs, 1 of 1, 1 of 1
    assert found.alpha.units == 3 and found.alpha.raters == 2
    assert judge_agreement(votes, {("q9", pair): None}) is None
    words = judge_words("judge-1", found)
    assert re.match(r"judge-1 decides as people do in 57(\.1)? % of votes, ", words)
    assert re.search(r"; two people decide the same in 60(\.0)? % of cases, ", words)


def test_a_judge_that_decides_as_most_people_do_has_an_alpha_of_1() -> None:
    pair = ("adapter", "base")
    votes = []
    verdicts: dict[tuple[str, tuple[str, str]], str | None] = {}
    for number in range(12):
        outcome = Outcome.LEFT if number % 2 else Outcome.RIGHT
        votes += [Vote(f"r{rater}", f"q{number}", "adapter", "base", outcome) for rater in range(3)]
        verdicts[f"q{number}", pair] = "adapter" if number % 2 else "base"
    found = judge_agreement(votes, verdicts)
    assert found is not None and found.alpha.value == 1 and found.with_people.value == 1
