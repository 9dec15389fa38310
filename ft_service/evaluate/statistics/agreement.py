"""Agreement of raters: of all (Krippendorff's alpha), of each with themselves and the others, of a judge with people.

Letters in shapes: R raters, U units (an item with a pair of models), C labels, N votes.

Sources:
    Krippendorff (2011), Computing Krippendorff's alpha-reliability, University of Pennsylvania: nominal, missing data.
    Hoeffding (1956), On the distribution of the number of successes in independent trials, Annals of Mathematical
        Statistics 27: the binomial with the mean probability has heavier tails than trials of unequal probability.
    Holm (1979), see `intervals`.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import (
    LEVEL,
    Floats,
    Integers,
    Interval,
    Share,
    check_level,
    clopper_pearson,
    clustered_share,
    holm,
)
from ft_service.evaluate.statistics.votes import Outcome, Vote

RESAMPLES = 2_000


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for what chance gives, below 0 for less than that.

    None where it is not defined: no unit has two labels, or all labels are the same, so that nothing can disagree.
    """

    value: float | None
    interval: Interval | None
    units: int
    raters: int


class RaterVerdict(StrEnum):
    """What the evidence says of how a rater votes."""

    CONSISTENT = "consistent"
    RANDOM = "looks random"
    NOT_SETTLED = "not settled"


@dataclass(frozen=True)
class Hits:
    """How often something held, of how many times it could, with the exact interval; None without a trial."""

    hits: int
    trials: int
    interval: Interval | None


@dataclass(frozen=True)
class RaterReport:
    """One rater.

    `with_self` counts hidden repeats with the same winner, `with_others` units in which the rater agrees with the
    most frequent label of the others, `attention` attention items with the expected outcome. `chance` is the share of
    all these trials that the rater's own use of the buttons would hit without reading. `above_chance_p` and
    `below_others_p` are corrected for the number of raters. `left` counts votes for the left side among decisive ones,
    and `preferred_side` is set if they lean to one side beyond chance.
    """

    rater: str
    votes: int
    with_self: Hits
    with_others: Hits
    attention: Hits
    chance: float | None
    above_chance_p: float
    below_others_p: float
    verdict: RaterVerdict
    left: Hits
    preferred_side: Outcome | None


def krippendorff_alpha(
    labels: Sequence[Sequence[str | None]] | NDArray[np.object_],
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Alpha:
    """Krippendorff's alpha of nominal labels (R, U); None where a rater did not judge a unit.

    1 - observed / expected disagreement, both from the counts of labels in each unit with at least two of them. The
    interval is that of the percentiles over resampled units. In 400 simulations each (5 raters, 30 % of labels missing)
    it covers 85 % at 10 units and 92 to 95 % at 20 to 100.

    Raises DataError if the rows differ in length.
    """
    if len({len(row) for row in labels}) > 1:
        raise DataError("the raters have different numbers of units. Give None where a rater has no label.")
    columns = list(zip(*labels, strict=True))
    return _alpha(_label_counts(columns), len(labels), level, seed, resamples)


def votes_alpha(votes: Sequence[Vote], *, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES) -> Alpha:
    """Krippendorff's alpha of the winners that raters name; tie and both bad are labels of their own.

    The unit is an item with a pair of models. Repeats, attention items and controls are left out.
    """
    comparing = [vote for vote in votes if vote.compares]
    units: dict[tuple[str, tuple[str, str]], dict[str, str]] = defaultdict(dict)
    for vote in comparing:
        units[vote.item, vote.pair][vote.rater] = label_of(vote)
    raters = len({vote.rater for vote in comparing})
    return _alpha(_label_counts([list(unit.values()) for unit in units.values()]), raters, level, seed, resamples)


def label_of(vote: Vote) -> str:
    """The model that wins, or the outcome. The same vote has the same label, whichever side the models stood on."""
    return f"model {vote.winner}" if vote.winner is not None else vote.outcome.value


@dataclass(frozen=True)
class JudgeAgreement:
    """How far a judge decides as people do about the same two answers. A tie and "both bad" both name neither.

    `with_people` is the share of people's votes whose winner the judge names too. `between_people` is the same for two
    different people on the same answers, None where no answers have two votes: what a judge can reach at best. Both
    intervals respect items. `alpha` is Krippendorff's, of the judge and the most frequent label of the people, without
    units in which the people have no such label.
    """

    units: int
    with_people: Share
    between_people: Share | None
    alpha: Alpha


def judge_agreement(
    votes: Sequence[Vote],
    verdicts: Mapping[tuple[str, tuple[str, str]], str | None],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> JudgeAgreement | None:
    """`verdicts` are an item with a pair of models (`Vote.pair`) -> the model that the judge prefers, None for neither.

    None if no vote is about what was judged. Repeats, attention items and controls are left out.
    """
    units: dict[tuple[str, tuple[str, str]], list[str | None]] = defaultdict(list)
    for vote in votes:
        if vote.compares and (vote.item, vote.pair) in verdicts:
            units[vote.item, vote.pair].append(vote.winner)
    if not units:
        return None
    judged = [(item, label == verdicts[item, pair]) for (item, pair), labels in units.items() for label in labels]
    pairs = [
        (item, first == second)
        for (item, _), labels in units.items()
        for first, second in itertools.combinations(labels, 2)
    ]
    both = [
        (_named(most), _named(verdicts[unit]))
        for unit, labels in units.items()
        if (most := _most_frequent(labels)) != ""
    ]
    return JudgeAgreement(
        units=len(units),
        with_people=_share_by_item(judged, level),
        between_people=_share_by_item(pairs, level) if pairs else None,
        alpha=krippendorff_alpha([[one[side] for one in both] for side in (0, 1)], level=level, seed=seed),
    )


def _share_by_item(values: Sequence[tuple[str, bool]], level: float) -> Share:
    return clustered_share([float(holds) for _, holds in values], [item for item, _ in values], level=level)


def _most_frequent(labels: Sequence[str | None]) -> str | None:
    """Empty if two labels are as frequent."""
    counts = Counter(labels).most_common(2)
    return "" if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]


def _named(winner: str | None) -> str:
    return "neither" if winner is None else f"model {winner}"


def _label_counts(units: Iterable[Sequence[str | None]]) -> Floats:
    """How often each label occurs in each unit with at least two labels: (U, C)."""
    counters = [Counter(label for label in unit if label is not None) for unit in units]
    counters = [counter for counter in counters if counter.total() > 1]
    names = sorted({label for counter in counters for label in counter})
    return np.array([[counter[name] for name in names] for counter in counters], dtype=np.float64)


def _alpha(counts: Floats, raters: int, level: float, seed: int, resamples: int) -> Alpha:
    check_level(level)
    units = len(counts)
    if not units:
        return Alpha(None, None, 0, raters)
    value = float(_alpha_of(counts, np.ones((1, units)))[0])
    if np.isnan(value):
        return Alpha(None, None, units, raters)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(units, np.full(units, 1 / units), size=resamples)
    # A resample in which all labels are equal has no alpha; nothing disagrees in it.
    drawn = np.nan_to_num(_alpha_of(counts, weights), nan=1.0)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Alpha(value, Interval(float(low), float(high), level), units, raters)


def _alpha_of(counts: Floats, weights: Floats | Integers) -> Floats:
    """Alpha (B,) of label counts (U, C) with units weighted (B, U); NaN where only one label occurs.

    With m labels in a unit, n of kind c, and N labels in all, n_c of kind c:
    observed = sum over units of (m**2 - sum n**2) / (m - 1), expected = (N**2 - sum n_c**2) / (N - 1).
    """
    sizes = counts.sum(axis=1)
    observed = weights @ ((sizes**2 - (counts**2).sum(axis=1)) / (sizes - 1))
    totals = weights @ counts
    number = totals.sum(axis=1)
    expected = (number**2 - (totals**2).sum(axis=1)) / (number - 1)
    return np.where(expected > 0, 1 - observed / np.where(expected > 0, expected, 1), np.nan)


def self_agreement(votes: Sequence[Vote], *, level: float = LEVEL) -> Share | None:
    """The share of hidden repeats that get the same label as the first time, over all raters; None without repeats."""
    hits = [(first.rater, first.item, float(label_of(first) == label_of(again))) for first, again in _repeats(votes)]
    if not hits:
        return None
    raters, items, same = zip(*hits, strict=True)
    return clustered_share(same, raters, items, level=level)


def _repeats(votes: Sequence[Vote]) -> list[tuple[Vote, Vote]]:
    """Each repeat with the first vote of the same rater on the same item and pair. A repeat without one is left out."""
    firsts = {(vote.rater, vote.item, vote.pair): vote for vote in reversed(votes) if vote.compares}
    again = [vote for vote in votes if vote.repeat and not vote.control and vote.expected is None]
    return [
        (firsts[vote.rater, vote.item, vote.pair], vote)
        for vote in again
        if (vote.rater, vote.item, vote.pair) in firsts
    ]


@dataclass(frozen=True)
class _Trial:
    """One chance to show that a rater reads: its kind, whether it was a hit, and how probable a blind hit is."""

    rater: str
    kind: str
    hit: bool
    chance: float


def rater_reports(votes: Sequence[Vote], *, level: float = LEVEL) -> tuple[RaterReport, ...]:
    """Every rater, sorted by name. Nobody is dropped: see `study.summarise` for results with and without somebody.

    A rater looks random if their hits are not above chance, and are fewer than those of the other raters; both are
    one-sided binomial tests over repeats, units judged by others, and attention items, at 1 - level, with Holm's
    correction over raters. The first alone would name every rater with few votes, and every rater of a study whose
    models are equally good. A blind hit is as probable as the rater's own use of the buttons makes it: sides are drawn,
    so a model is hit with half of the decisive votes.
    """
    check_level(level)
    names = sorted({vote.rater for vote in votes})
    trials: dict[str, list[_Trial]] = {name: [] for name in names}
    buttons = {name: _button_shares([vote for vote in votes if vote.rater == name]) for name in names}
    for trial in (
        *_repeat_trials(votes, buttons),
        *_majority_trials(votes, buttons),
        *_attention_trials(votes, buttons),
    ):
        trials[trial.rater].append(trial)
    above = dict(zip(names, holm([_above_chance(trials[name]) for name in names]), strict=True))
    below = dict(zip(names, holm([_below_others(name, trials) for name in names]), strict=True))
    left = {name: _left_hits(votes, name, level) for name in names}
    side_p = dict(zip(names, holm([_side_p(left[name]) for name in names]), strict=True))
    return tuple(
        RaterReport(
            rater=name,
            votes=sum(vote.rater == name for vote in votes),
            with_self=_hits(trials[name], "self", level),
            with_others=_hits(trials[name], "others", level),
            attention=_hits(trials[name], "attention", level),
            chance=float(np.mean([trial.chance for trial in trials[name]])) if trials[name] else None,
            above_chance_p=float(above[name]),
            below_others_p=float(below[name]),
            verdict=_rater_verdict(above[name], below[name], 1 - level),
            left=left[name],
            preferred_side=_preferred_side(left[name], side_p[name], 1 - level),
        )
        for name in names
    )


def _rater_verdict(above_chance: float, below_others: float, allowed: float) -> RaterVerdict:
    if above_chance <= allowed:
        return RaterVerdict.CONSISTENT
    return RaterVerdict.RANDOM if below_others <= allowed else RaterVerdict.NOT_SETTLED


def _button_shares(votes: Sequence[Vote]) -> Mapping[str, float]:
    """How often a rater presses each button; "decisive" stands for left and right together."""
    counts = Counter(vote.outcome for vote in votes)
    shares = {outcome.value: counts[outcome] / len(votes) for outcome in Outcome}
    return {**shares, "decisive": shares["left"] + shares["right"]}


def _blind_hit(buttons: Mapping[str, float], outcome: Outcome) -> float:
    """The probability that somebody who presses `buttons` without reading names this winner, its side being drawn."""
    return buttons["decisive"] / 2 if outcome in (Outcome.LEFT, Outcome.RIGHT) else buttons[outcome]


def _repeat_trials(votes: Sequence[Vote], buttons: Mapping[str, Mapping[str, float]]) -> Iterable[_Trial]:
    for first, again in _repeats(votes):
        own = buttons[again.rater]
        chance = own["decisive"] ** 2 / 2 + own["tie"] ** 2 + own["both_bad"] ** 2
        yield _Trial(again.rater, "self", label_of(first) == label_of(again), chance)


def _attention_trials(votes: Sequence[Vote], buttons: Mapping[str, Mapping[str, float]]) -> Iterable[_Trial]:
    for vote in votes:
        if vote.expected is not None:
            chance = _blind_hit(buttons[vote.rater], vote.expected)
            yield _Trial(vote.rater, "attention", vote.outcome is vote.expected, chance)


def _majority_trials(votes: Sequence[Vote], buttons: Mapping[str, Mapping[str, float]]) -> Iterable[_Trial]:
    """One trial for each unit that the others judged with one most frequent label; units with a draw of labels say
    nothing. One trial a unit, not one for each of the others: those would not be independent."""
    units: dict[tuple[str, tuple[str, str]], list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.compares:
            units[vote.item, vote.pair].append(vote)
    for unit in units.values():
        counts = Counter(label_of(vote) for vote in unit)
        outcome_of = {label_of(vote): vote.outcome for vote in unit}
        for vote in unit:
            others = (counts - Counter([label_of(vote)])).most_common(2)
            if others and (len(others) == 1 or others[0][1] > others[1][1]):
                label = others[0][0]
                chance = _blind_hit(buttons[vote.rater], outcome_of[label])
                yield _Trial(vote.rater, "others", label_of(vote) == label, chance)


def _above_chance(trials: Sequence[_Trial]) -> float:
    if not trials:
        return 1.0
    hits = sum(trial.hit for trial in trials)
    return float(stats.binom.sf(hits - 1, len(trials), np.mean([trial.chance for trial in trials])))


def _below_others(name: str, trials: Mapping[str, Sequence[_Trial]]) -> float:
    """p-value of as few hits, if this rater hits each kind of trial as often as all other raters together do."""
    rates = _hit_rates(trial for other, own in trials.items() if other != name for trial in own)
    compared = [trial for trial in trials[name] if trial.kind in rates]
    if not compared:
        return 1.0
    expected = float(np.mean([rates[trial.kind] for trial in compared]))
    return float(stats.binom.cdf(sum(trial.hit for trial in compared), len(compared), expected))


def _hit_rates(trials: Iterable[_Trial]) -> dict[str, float]:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for trial in trials:
        by_kind[trial.kind].append(trial.hit)
    return {kind: sum(hits) / len(hits) for kind, hits in by_kind.items()}


def _hits(trials: Sequence[_Trial], kind: str, level: float) -> Hits:
    hits = [trial.hit for trial in trials if trial.kind == kind]
    return _counted(sum(hits), len(hits), level)


def _counted(hits: int, trials: int, level: float) -> Hits:
    return Hits(hits, trials, clopper_pearson(hits, trials, level) if trials else None)


def _left_hits(votes: Sequence[Vote], name: str, level: float) -> Hits:
    own = [vote for vote in votes if vote.rater == name and vote.expected is None]
    decisive = [vote for vote in own if vote.outcome in (Outcome.LEFT, Outcome.RIGHT)]
    return _counted(sum(vote.outcome is Outcome.LEFT for vote in decisive), len(decisive), level)


def _side_p(left: Hits) -> float:
    return float(stats.binomtest(left.hits, left.trials).pvalue) if left.trials else 1.0


def _preferred_side(left: Hits, p_value: float, allowed: float) -> Outcome | None:
    if p_value > allowed:
        return None
    return Outcome.LEFT if 2 * left.hits > left.trials else Outcome.RIGHT
