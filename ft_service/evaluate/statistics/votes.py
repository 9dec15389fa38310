"""Votes of people on pairs of answers: win shares, preference for a side, controls, and how many votes are missing.

How outcomes count. A win counts 1, a tie 1/2, and "both bad" 1/2 too, since the rater prefers neither: leaving it out
would turn 10 wins and 90 times "both bad" into a share of 100 %. Its number is reported on its own. Votes left or right
are called decisive. Repeats, attention items and comparisons of a model with itself enter no win share.

What is measured (400 simulated studies each, true shares of 80, 60, 50 and 100 %, nominal 95 %). With 20 raters of 15
votes, intervals cover the truth in 97 to 100 %: with independent votes (1.13 to 1.16 times as wide as Clopper and
Pearson's), with raters of whom 30 % press at random or one side, and with items on which raters agree. With 10 raters
of 30 votes they cover 93 to 100 % and are 1.3 times as wide. With 4 or 6 raters they are 1.5 to 2.6 times as wide,
since few raters cannot show how much raters differ. They still cover too little (77 to 88 %) in one case: all of the
few raters always prefer one model, and 30 % of the people they stand for press at random. No vote shows that.

Letters in shapes: N votes.

Sources: Clopper and Pearson (1934), Korn and Graubard (1998) and Cameron, Gelbach and Miller (2011), see `intervals`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import (
    FEWEST_RATERS_FOR_A_VERDICT,
    LEVEL,
    Floats,
    Interval,
    Share,
    Verdict,
    clopper_pearson,
    clustered_share,
)

POWER = 0.8


class Outcome(StrEnum):
    """What a rater answers."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BOTH_BAD = "both_bad"


@dataclass(frozen=True)
class Vote:
    """One answer of one rater to one item.

    `left` and `right` are the models whose answers stood there; the same model twice is a hidden control. `repeat`
    marks an item that this rater has judged before. `expected` is the right outcome of an attention item.
    """

    rater: str
    item: str
    left: str
    right: str
    outcome: Outcome
    repeat: bool = False
    expected: Outcome | None = None

    @property
    def control(self) -> bool:
        return self.left == self.right

    @property
    def compares(self) -> bool:
        """Whether the vote counts for a win share."""
        return not (self.control or self.repeat or self.expected)

    @property
    def pair(self) -> tuple[str, str]:
        """The two models in alphabetical order."""
        return (self.left, self.right) if self.left <= self.right else (self.right, self.left)

    @property
    def winner(self) -> str | None:
        """The preferred model, or None for a tie and both bad."""
        return {Outcome.LEFT: self.left, Outcome.RIGHT: self.right}.get(self.outcome)


@dataclass(frozen=True)
class PairResult:
    """Model `first` against model `second`.

    `share` is the win share of `first`, its interval respects raters and items. `p_value` is the exact two-sided
    binomial test of the decisive votes, and `interval_if_independent` the interval of Clopper and Pearson of the same
    votes; both hold if no two votes depend on each other. `verdict` is about `first`. `more_votes` estimates the
    missing votes: 0 if it is settled, None if the share is exactly one half.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int
    raters: int
    items: int
    share: Share
    p_value: float
    interval_if_independent: Interval | None
    verdict: Verdict
    reason: str
    more_votes: int | None

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad


@dataclass(frozen=True)
class SideResult:
    """How often the answer on the left wins, of all decisive votes. Sides are drawn, so without a preference it
    is half.

    `preferred` is the side that raters prefer whatever the answers, if the interval excludes one half.
    """

    left_wins: int
    right_wins: int
    share: Share | None
    preferred: Outcome | None


@dataclass(frozen=True)
class ControlResult:
    """Comparisons of a model with itself.

    `decided` is the share of them in which a rater prefers a side, so sees a difference where there is none. `sides`
    says which.
    """

    votes: int
    decided: Share | None
    sides: SideResult


def models_of(votes: Iterable[Vote]) -> tuple[str, ...]:
    """The models of all votes, sorted."""
    return tuple(sorted({model for vote in votes for model in (vote.left, vote.right)}))


def pair_results(
    votes: Sequence[Vote], *, models: Sequence[str] | None = None, level: float = LEVEL
) -> tuple[PairResult, ...]:
    """The win share of each pair of models that has votes.

    `models` is the order in which they are named: the first of a pair is the one the result is about. Without it they
    are sorted. With several pairs, each interval has the level as given, but a verdict asks for the level that holds
    for all pairs together (Bonferroni): chance settles one of them no more often than in a study of one pair.

    Raises DataError for no votes that compare two models, and for models that `models` does not name.
    """
    comparing = [vote for vote in votes if vote.compares]
    if not comparing:
        raise DataError("no vote compares two different models. Collect votes first.")
    order = tuple(models) if models is not None else models_of(comparing)
    unknown = set(models_of(comparing)) - set(order)
    if unknown:
        raise DataError(f"votes on {', '.join(sorted(unknown))}, which the study does not name. Add it to the models.")
    by_pair: dict[tuple[str, str], list[Vote]] = {}
    for vote in comparing:
        by_pair.setdefault(vote.pair, []).append(vote)
    pairs = [pair for pair in itertools.combinations(order, 2) if tuple(sorted(pair)) in by_pair]
    strict = 1 - (1 - level) / len(pairs)
    return tuple(
        _pair_result(
            first, second, by_pair[first, second] if first <= second else by_pair[second, first], level, strict
        )
        for first, second in pairs
    )


def _pair_result(first: str, second: str, votes: list[Vote], level: float, strict: float) -> PairResult:
    scores = scores_for(first, votes)
    raters = [vote.rater for vote in votes]
    items = [vote.item for vote in votes]
    share = clustered_share(scores, raters, items, level=level)
    wins = int((scores == 1).sum())
    losses = int((scores == 0).sum())
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    strict_interval = clustered_share(scores, raters, items, level=strict).interval
    verdict, reason = _verdict(strict_interval, p_value, len(set(raters)))
    return PairResult(
        first=first,
        second=second,
        wins=wins,
        losses=losses,
        ties=sum(vote.outcome is Outcome.TIE for vote in votes),
        both_bad=sum(vote.outcome is Outcome.BOTH_BAD for vote in votes),
        raters=len(set(raters)),
        items=len(set(items)),
        share=share,
        p_value=p_value,
        interval_if_independent=clopper_pearson(wins, wins + losses, level) if wins + losses else None,
        verdict=verdict,
        reason=reason,
        more_votes=0 if verdict is not Verdict.NOT_SETTLED else more_votes_needed(share, level=strict),
    )


def scores_for(model: str, votes: Sequence[Vote]) -> Floats:
    """1 where `model` wins, 0 where the other one does, 1/2 for a tie and both bad: (N,)."""
    return np.array([0.5 if vote.winner is None else float(vote.winner == model) for vote in votes])


def _verdict(interval: Interval, p_value: float, raters: int) -> tuple[Verdict, str]:
    if raters < FEWEST_RATERS_FOR_A_VERDICT:
        return Verdict.NOT_SETTLED, f"fewer than {FEWEST_RATERS_FOR_A_VERDICT} raters"
    if not interval.excludes(0.5):
        return Verdict.NOT_SETTLED, "chance alone could explain the difference"
    if p_value > 1 - interval.level:
        return Verdict.NOT_SETTLED, "too few votes prefer one of the two"
    return (Verdict.BETTER if interval.low > 0.5 else Verdict.WORSE), ""


def more_votes_needed(share: Share, *, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many more votes settle a share that stays as it is, with probability `power`; None for exactly one half.

    Normal approximation: (z((1 + level) / 2) + z(power))**2 * p (1 - p) / (p - 1/2)**2 effective votes, times the votes
    that make one effective vote now. More votes come from more raters: more votes of the same raters count for less.
    """
    if abs(share.value - 0.5) < 1e-9:
        return None
    # A sweep has no variance: one lost vote more than there is.
    spread = min(max(share.value, 0.5 / share.count), 1 - 0.5 / share.count)
    quantiles = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    effective = quantiles**2 * spread * (1 - spread) / (share.value - 0.5) ** 2
    return max(1, math.ceil(effective * share.count / share.effective_count - share.count))


def side_result(votes: Sequence[Vote], *, level: float = LEVEL) -> SideResult:
    """Whether raters prefer a side, of all decisive votes that are neither repeats nor attention items."""
    return _sides([vote for vote in votes if not vote.repeat and vote.expected is None], level)


def control_result(votes: Sequence[Vote], *, level: float = LEVEL) -> ControlResult:
    """What raters say where both answers come from the same model."""
    controls = [vote for vote in votes if vote.control and not vote.repeat and vote.expected is None]
    return ControlResult(
        votes=len(controls),
        decided=_share_by_rater(controls, lambda vote: vote.winner is not None, level),
        sides=_sides(controls, level),
    )


def _sides(votes: list[Vote], level: float) -> SideResult:
    decisive = [vote for vote in votes if vote.outcome in (Outcome.LEFT, Outcome.RIGHT)]
    left = sum(vote.outcome is Outcome.LEFT for vote in decisive)
    share = _share_by_rater(decisive, lambda vote: vote.outcome is Outcome.LEFT, level)
    preferred = None
    if share and share.interval.excludes(0.5):
        preferred = Outcome.LEFT if share.value > 0.5 else Outcome.RIGHT
    return SideResult(left, len(decisive) - left, share, preferred)


def _share_by_rater(votes: list[Vote], holds: Callable[[Vote], bool], level: float) -> Share | None:
    if not votes:
        return None
    return clustered_share([float(holds(vote)) for vote in votes], [vote.rater for vote in votes], level=level)
