"""Everything that the votes of a study show, with and without raters who look random."""

from collections.abc import Sequence
from dataclasses import dataclass

from ft_service.errors import DataError
from ft_service.evaluate.statistics.agreement import (
    Alpha,
    RaterReport,
    RaterVerdict,
    rater_reports,
    self_agreement,
    votes_alpha,
)
from ft_service.evaluate.statistics.intervals import LEVEL, Share
from ft_service.evaluate.statistics.strengths import Strengths, bradley_terry
from ft_service.evaluate.statistics.votes import (
    ControlResult,
    PairResult,
    SideResult,
    Vote,
    control_result,
    pair_results,
    side_result,
)


@dataclass(frozen=True)
class VoteSummary:
    """Results of one set of votes. `strengths` is None for two models, whose win share says it all, and where
    `no_strengths_because` says why."""

    pairs: tuple[PairResult, ...]
    strengths: Strengths | None
    no_strengths_because: str
    sides: SideResult
    controls: ControlResult
    alpha: Alpha
    self_agreement: Share | None


@dataclass(frozen=True)
class StudyResult:
    """`everyone` is the result. `without_random` is the same without the raters of `looks_random`, or None if nobody
    looks random or nobody else voted. It is shown beside the result and never replaces it: raters who look random are
    chosen by their votes."""

    everyone: VoteSummary
    raters: tuple[RaterReport, ...]
    looks_random: tuple[str, ...]
    without_random: VoteSummary | None


def summarise(
    votes: Sequence[Vote], *, models: Sequence[str] | None = None, level: float = LEVEL, seed: int = 0
) -> StudyResult:
    """All results of the votes of a study. `models` orders the names, see `votes.pair_results`.

    Raises DataError for no votes that compare two models, and for a rater who voted twice on the same item and pair
    without the mark of a repeat.
    """
    _check_repeats(votes)
    raters = rater_reports(votes, level=level)
    random = tuple(rater.rater for rater in raters if rater.verdict is RaterVerdict.RANDOM)
    others = [vote for vote in votes if vote.rater not in random]
    remaining = bool(random) and any(vote.compares for vote in others)
    return StudyResult(
        everyone=_summary(votes, models, level, seed),
        raters=raters,
        looks_random=random,
        without_random=_summary(others, models, level, seed) if remaining else None,
    )


def _check_repeats(votes: Sequence[Vote]) -> None:
    seen: set[tuple[str, str, tuple[str, str]]] = set()
    for vote in votes:
        key = (vote.rater, vote.item, vote.pair)
        if vote.compares and key in seen:
            raise DataError(
                f"rater {vote.rater} voted twice on item {vote.item} with {' and '.join(vote.pair)}. "
                "Keep the last vote, or mark the second as a repeat."
            )
        if vote.compares:
            seen.add(key)


def _summary(votes: Sequence[Vote], models: Sequence[str] | None, level: float, seed: int) -> VoteSummary:
    pairs = pair_results(votes, models=models, level=level)
    strengths, reason = _strengths(votes, level, seed)
    return VoteSummary(
        pairs=pairs,
        strengths=strengths,
        no_strengths_because=reason,
        sides=side_result(votes, level=level),
        controls=control_result(votes, level=level),
        alpha=votes_alpha(votes, level=level, seed=seed),
        self_agreement=self_agreement(votes, level=level),
    )


def _strengths(votes: Sequence[Vote], level: float, seed: int) -> tuple[Strengths | None, str]:
    if len({model for vote in votes if vote.compares for model in vote.pair}) == 2:
        return None, "two models need no ranking: their win share says it all"
    try:
        return bradley_terry(votes, level=level, seed=seed), ""
    except DataError as error:
        return None, str(error)
