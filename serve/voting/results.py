"""What the votes of a study say: win shares with intervals, agreement, preference for a side, each rater.

The statistics are `ft_service.evaluate.statistics`; this turns stored votes into its input, and its results into text.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from ft_service.evaluate.statistics import sentences
from ft_service.evaluate.statistics.study import StudyResult, summarise
from ft_service.evaluate.statistics.votes import Outcome, Vote
from ft_service.text import counted
from serve.voting.export import VoteRecord

_GOOD = "the right answer of an attention item"
_BAD = "the wrong answer of an attention item"


def study_result(records: Sequence[VoteRecord], models: Sequence[str]) -> StudyResult:
    """The statistics of the votes that count. Raises `DataError` if none compares two models."""
    return summarise([as_vote(record) for record in records], models=models)


def as_vote(record: VoteRecord) -> Vote:
    left = record.left_model
    right = record.right_model
    if record.expected is not None:
        left, right = (_GOOD, _BAD) if record.expected == Outcome.LEFT else (_BAD, _GOOD)
    assert left and right
    return Vote(
        rater=record.rater,
        item=record.question_id,
        left=left,
        right=right,
        outcome=Outcome(record.outcome),
        repeat=record.kind == "repeat",
        expected=None if record.expected is None else Outcome(record.expected),
    )


def result_lines(result: StudyResult) -> list[str]:
    """The result in sentences, the most important first."""
    everyone = result.everyone
    lines = [sentences.pair_words(pair) for pair in everyone.pairs]
    if everyone.strengths is not None:
        lines += [sentences.strength_words(strength) for strength in everyone.strengths.models]
    lines += [sentences.random_raters_words(result), sentences.alpha_words(everyone.alpha)]
    if everyone.self_agreement is not None:
        lines.append(f"Raters repeat their vote in {sentences.share_words(everyone.self_agreement, 'repeats')}.")
    lines += [sentences.side_words(everyone.sides), sentences.control_words(everyone.controls)]
    return lines


def rater_lines(result: StudyResult) -> list[str]:
    """A sentence for each rater."""
    return [sentences.rater_words(report) for report in result.raters]


def axis_lines(records: Sequence[VoteRecord], models: Sequence[str]) -> list[str]:
    """For each axis and pair of models, how often each was scored higher: counts, without an interval."""
    counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    places = {model: place for place, model in enumerate(models)}
    for record in records:
        if record.kind != "real" or not record.left_model or not record.right_model:
            continue
        is_swapped = places[record.left_model] > places[record.right_model]
        pair = (record.right_model, record.left_model) if is_swapped else (record.left_model, record.right_model)
        for axis, score in record.scores.items():
            signed = -score if is_swapped else score  # above 0: the second is better
            counts[axis, *pair][0 if signed < 0 else 2 if signed > 0 else 1] += 1
    return [
        f"{axis}: {first} better {counted(better, 'time')}, the same {counted(same, 'time')}, "
        f"{second} better {counted(worse, 'time')}."
        for (axis, first, second), (better, same, worse) in sorted(counts.items())
    ]


def median_seconds(records: Sequence[VoteRecord]) -> dict[str, float]:
    """Rater -> median seconds of a vote, as their browser measured them."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.seconds is not None:
            seconds[record.rater].append(record.seconds)
    return {rater: round(statistics.median(values), 1) for rater, values in sorted(seconds.items())}
