"""Results in plain words: what is said, and which words are not used."""

import re

import numpy as np

from ft_service.evaluate.statistics import sentences
from ft_service.evaluate.statistics.agreement import rater_reports, votes_alpha
from ft_service.evaluate.statistics.flips import count_flips
from ft_service.evaluate.statistics.intervals import Interval
from ft_service.evaluate.statistics.paired import compare_paired
from ft_service.evaluate.statistics.strengths import bradley_terry
from ft_service.evaluate.statistics.study import summarise
from ft_service.evaluate.statistics.votes import Outcome, Vote, control_result, pair_results, side_result
from tests.evaluate.statistics.simulate import CAREFUL, LEFT_ONLY, Design, counted_votes, simulate

JARGON = re.compile(
    r"bootstrap|p-value|confidence|\balpha\b|bradley|degenerate|significan|binomial|variance|mcnemar|null|cluster|nan\b|None",
    re.IGNORECASE,
)


def test_a_win_share_reads_as_a_sentence() -> None:
    (pair,) = pair_results(counted_votes("adapter", "base", wins=128, losses=72))
    assert sentences.pair_words(pair) == (
        "adapter wins 64 % of comparisons with base, 57 to 71 % (200 votes of 200 raters). Verdict: adapter is better."
    )


def test_what_is_not_settled_says_why_and_what_is_missing() -> None:
    votes = counted_votes("adapter", "base", wins=50, losses=44, ties=6)
    votes += [Vote("r", "b", "adapter", "base", Outcome.BOTH_BAD)]
    (pair,) = pair_results(votes)
    words = sentences.pair_words(pair)
    assert 'Counted as half a win for each: 6 ties and 1 times "both bad".' in words
    assert "Not settled: chance alone could explain the difference. About 1,965 more votes, from more raters, " in words
    assert words.endswith("would settle it if the share stays as it is.")
    assert sentences.more_votes_words(None) == "At exactly half, no number of votes settles it."
    assert sentences.more_votes_words(123_456) == "More than 10,000 further votes are needed to settle it."


def test_rounding_moves_no_bound_onto_half() -> None:
    assert sentences.percent(0.6, Interval(0.504, 0.69)) == "60.0 %, 50.4 to 69.0 %"
    assert sentences.percent(0.6, Interval(0.45, 0.74), "votes") == "60 % of votes, 45 to 74 %"
    assert sentences.percent(0.99, Interval(0.96, 0.998)) == "99.0 %, 96.0 to 99.8 %"


def test_a_paired_comparison_says_better_only_if_it_is_settled() -> None:
    base = np.arange(200) % 2
    better = np.where(np.arange(200) < 30, 1, base)
    words = sentences.paired_words(compare_paired(base, better))
    assert words.startswith("On 200 items adapter scores 57.5 % and base 50.0 %: a difference of +7.5 points, +")
    assert words.endswith("Verdict: adapter is better.")
    equal = sentences.paired_words(compare_paired(base, base), other="adapter 7")
    assert "better" not in equal
    assert "Not settled: no item differs. With such items, a true difference of " in equal
    loss = compare_paired([2.0, 2.1, 2.3, 2.2], [1.9, 2.2, 2.1, 2.0], largest_difference=None, higher_is_better=False)
    assert "adapter scores 2.050 and base 2.150: a difference of -0.100, " in sentences.paired_words(
        loss, percentages=False
    )


def test_every_result_has_words_without_jargon() -> None:
    rng = np.random.default_rng(1)
    votes = simulate(Design(0.8, votes_each=40, consensus=0.95), rng, [CAREFUL] * 8 + [LEFT_ONLY], repeats=8)
    controls = [Vote(f"r0{rater}", f"c{rater}", "base", "base", Outcome.LEFT) for rater in range(8)]
    study = summarise(votes + controls)
    several = bradley_terry(counted_votes("a", "b", 30, 10) + counted_votes("b", "c", 9, 8, start=100), resamples=20)
    words = [
        *(sentences.pair_words(pair) for pair in study.everyone.pairs),
        *(sentences.rater_words(rater) for rater in study.raters),
        *(sentences.strength_words(strength) for strength in several.models),
        *(sentences.expected_share_words(pair) for pair in several.pairs),
        sentences.random_raters_words(study),
        sentences.alpha_words(study.everyone.alpha),
        sentences.alpha_words(votes_alpha([])),
        sentences.side_words(study.everyone.sides),
        sentences.side_words(side_result([])),
        sentences.control_words(study.everyone.controls),
        sentences.control_words(control_result([])),
        sentences.flip_words(count_flips([["a", "b"], ["a", "a"], ["a", None]])),
        sentences.paired_words(compare_paired([0, 1], [0, 1], ["x", "x"])),
    ]
    for text in words:
        assert not JARGON.search(text), text
        assert text.endswith("."), text
        assert "  " not in text


def test_a_one_sided_rater_is_named_with_the_count() -> None:
    votes = simulate(Design(0.8, votes_each=40, consensus=0.95), np.random.default_rng(1), [CAREFUL] * 8 + [LEFT_ONLY])
    report = rater_reports(votes)[-1]
    words = sentences.rater_words(report)
    assert words.startswith("r08, 40 votes: looks random; agrees with the other raters ")
    assert words.endswith("(clicking without reading: 50 %). Prefers the left side: 40 of 40 times.")


def test_random_raters_are_named_and_the_share_without_them_is_given() -> None:
    votes = simulate(Design(0.8, votes_each=40, consensus=0.95), np.random.default_rng(1), [CAREFUL] * 8 + [LEFT_ONLY])
    words = sentences.random_raters_words(summarise(votes))
    assert words.startswith("1 of 9 raters looks random (r08). Without them: adapter wins ")
    assert words.endswith("The main result includes them.")
    assert sentences.random_raters_words(summarise(counted_votes("a", "b", 3, 2))) == "No rater looks random."
