"""The strength of several models from pairwise votes: Bradley-Terry, with raters and items resampled and refitted.

evalica fits the strengths. Two things are ours. Each pair that has votes gets one more draw: without it, the fit of a
model that wins everything has no maximum, and evalica returns equal strengths for a sweep of 20 to 0. And evalica's own
bootstrap resamples votes, as if each came from another person; here whole raters and whole items are resampled, and the
refits run all at once.

Letters in shapes: M models, P pairs of models, G clusters (raters or items), B resamples.

Sources:
    Bradley and Terry (1952), Rank analysis of incomplete block designs, Biometrika 39.
    Newman (2023), Efficient computation of rankings from pairwise comparisons, JMLR 24: the iteration of evalica.
    Cameron, Gelbach and Miller (2011), JBES 29: variance with two clusterings = one + the other - that of votes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import evalica
import numpy as np
from scipy import special, stats

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import (
    LEVEL,
    Floats,
    Integers,
    Interval,
    check_level,
    codes_of,
    effective_clusters,
)
from ft_service.evaluate.statistics.votes import Vote, models_of, scores_for

RESAMPLES = 1_000
PSEUDO_DRAWS = 1.0
_TOLERANCE = 1e-8
_LIMIT = 10_000
_NEWTON_LIMIT = 100
_LARGEST_STEP = 2.0


@dataclass(frozen=True)
class Strength:
    """`expected_share`: the win share that a model is expected to have against the others, averaged over them."""

    model: str
    expected_share: float
    interval: Interval


@dataclass(frozen=True)
class ExpectedShare:
    """The win share of `first` against `second` that the strengths imply, also for a pair without votes of its own."""

    first: str
    second: str
    share: float
    interval: Interval


@dataclass(frozen=True)
class Strengths:
    """Models by falling expected share, and all pairs of them in that order."""

    models: tuple[Strength, ...]
    pairs: tuple[ExpectedShare, ...]


def bradley_terry(
    votes: Sequence[Vote], *, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> Strengths:
    """Fits strengths to all votes that compare two models. Ties and both bad count half for each.

    Intervals are symmetric in log-odds: estimate +- t * standard error, with t at the smallest effective number of
    raters or items minus one. The variance is that of refits over raters (times G / (G - 1)) plus that over items less
    that over votes, and never below that of independent votes in the model, which is not zero for a sweep.

    Raises DataError for no votes, and where the votes fall into groups of models that were never compared.
    """
    check_level(level)
    comparing = [vote for vote in votes if vote.compares]
    if not comparing:
        raise DataError("no vote compares two different models. Collect votes first.")
    names = models_of(comparing)
    _check_connected(names, comparing)
    cells, pairs = _cells(names, comparing)
    counts = np.bincount(cells, minlength=3 * len(pairs)).astype(np.float64)
    logs = fit(counts, pairs, len(names))
    rng = np.random.default_rng(seed)
    raters = codes_of([vote.rater for vote in comparing])
    items = codes_of([vote.item for vote in comparing])
    freedom = max(1.0, min(len(comparing), *(_groups(codes, len(comparing)) for codes in (raters, items))) - 1)
    error = _StandardError(
        raters=_refitted_covariance(cells, raters, pairs, len(names), rng, resamples),
        items=_refitted_covariance(cells, items, pairs, len(names), rng, resamples),
        votes=_refitted_covariance(cells, np.arange(len(comparing)), pairs, len(names), rng, resamples),
        independent=_independent_covariance(logs, counts, pairs),
    )
    quantile = float(stats.t.ppf((1 + level) / 2, freedom))
    shares = special.expit(logs[:, None] - logs[None, :])
    order = sorted(range(len(names)), key=lambda model: (-_average(shares, model), names[model]))
    return Strengths(
        models=tuple(_strength(model, names, shares, error, quantile, level) for model in order),
        pairs=tuple(
            _expected_share(one, two, names, logs, error, quantile, level)
            for one, two in itertools.combinations(order, 2)
        ),
    )


def _check_connected(names: Sequence[str], votes: Sequence[Vote]) -> None:
    reached = {names[0]}
    edges = {vote.pair for vote in votes}
    while grown := {model for edge in edges if reached & set(edge) for model in edge} - reached:
        reached |= grown
    apart = [name for name in names if name not in reached]
    if apart:
        raise DataError(
            f"no votes connect {', '.join(sorted(reached))} with {', '.join(apart)}: "
            "their strengths have no common scale. Collect votes on a pair of both groups."
        )


def _cells(names: Sequence[str], votes: Sequence[Vote]) -> tuple[Integers, Integers]:
    """For each vote the cell 3 * pair + (0 win of the first, 1 loss, 2 draw): (N,), and the pairs (P, 2) of models."""
    pair_names = sorted({vote.pair for vote in votes})
    number = {pair: index for index, pair in enumerate(pair_names)}
    cells = np.empty(len(votes), dtype=np.int64)
    for index, vote in enumerate(votes):
        score = scores_for(vote.pair[0], [vote])[0]
        cells[index] = 3 * number[vote.pair] + {1.0: 0, 0.0: 1, 0.5: 2}[score]
    return cells, np.array([[names.index(first), names.index(second)] for first, second in pair_names])


def fit(counts: Floats, pairs: Integers, models: int) -> Floats:
    """Log strengths (M,), centred, of counts (3 P,) in the order of `_cells`.

    A pair whose votes are all left out of a resample keeps its pseudo-draw, so no model drops out of the fit.
    """
    weights = counts.reshape(-1, 3) + np.array([0.0, 0.0, PSEUDO_DRAWS])
    result = evalica.bradley_terry(
        np.repeat(pairs[:, 0], 3).tolist(),
        np.repeat(pairs[:, 1], 3).tolist(),
        [evalica.Winner.X, evalica.Winner.Y, evalica.Winner.Draw] * len(pairs),
        weights=weights.ravel().tolist(),
        tolerance=_TOLERANCE,
        limit=_LIMIT,
    )
    if result.iterations >= _LIMIT:
        raise DataError(f"the strengths do not converge in {_LIMIT} iterations. Collect votes on more pairs of models.")
    logs = np.log(result.scores.reindex(range(models)).to_numpy(dtype=np.float64))
    centred: Floats = logs - logs.mean()
    return centred


def _refitted_covariance(
    cells: Integers, clusters: Integers, pairs: Integers, models: int, rng: np.random.Generator, resamples: int
) -> Floats:
    """Covariance (M, M) of log strengths over refits with clusters (N,) resampled, times G / (G - 1)."""
    groups = int(clusters.max()) + 1
    if groups < 2:
        return np.zeros((models, models))
    table = np.zeros((groups, 3 * len(pairs)))
    np.add.at(table, (clusters, cells), 1)
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    refits = refit(drawn @ table, pairs, models)
    return np.cov(refits, rowvar=False) * groups / (groups - 1)


def refit(counts: Floats, pairs: Integers, models: int) -> Floats:
    """Log strengths (B, M), centred, of many counts (B, 3 P) at once, by Newton's method.

    The same maximum as `fit`, which takes about 2 ms for each: too long for hundreds of resamples.
    """
    cells = counts.reshape(len(counts), -1, 3) + np.array([0.0, 0.0, PSEUDO_DRAWS])
    wins = cells[..., 0] + cells[..., 2] / 2
    votes = cells.sum(axis=-1)
    contrasts = _contrasts(pairs, models)
    logs = np.zeros((len(counts), models))
    for _ in range(_NEWTON_LIMIT):
        share = special.expit(logs @ contrasts.T)
        slope = (wins - votes * share) @ contrasts
        curvature = np.einsum("bp,pm,pn->bmn", votes * share * (1 - share), contrasts, contrasts)
        # Strengths have a scale, not a zero: the constant added keeps their mean at 0 and the matrix invertible.
        step = np.linalg.solve(curvature + 1 / models, slope[..., None])[..., 0]
        logs += np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        if np.abs(step).max() < _TOLERANCE:
            return logs - logs.mean(axis=1, keepdims=True)
    raise DataError(f"the strengths do not converge in {_NEWTON_LIMIT} steps. Collect votes on more pairs of models.")


def _contrasts(pairs: Integers, models: int) -> Floats:
    """For each pair 1 at its first model and -1 at its second: (P, M)."""
    contrasts = np.zeros((len(pairs), models))
    contrasts[np.arange(len(pairs)), pairs[:, 0]] = 1
    contrasts[np.arange(len(pairs)), pairs[:, 1]] = -1
    return contrasts


def _independent_covariance(logs: Floats, counts: Floats, pairs: Integers) -> Floats:
    """Covariance (M, M) of log strengths if votes are independent: the inverse of n p (1 - p) over all pairs."""
    votes = counts.reshape(-1, 3).sum(axis=1) + PSEUDO_DRAWS
    share = special.expit(logs[pairs[:, 0]] - logs[pairs[:, 1]])
    weight = votes * share * (1 - share)
    contrasts = _contrasts(pairs, len(logs))
    return np.linalg.pinv(contrasts.T @ (weight[:, None] * contrasts))


def _groups(clusters: Integers, votes: int) -> float:
    """A single cluster limits nothing: what it cannot show is the caller's to say."""
    return effective_clusters(clusters) if clusters.max() > 0 else float(votes)


@dataclass(frozen=True)
class _StandardError:
    """Of a linear combination (M,) of log strengths, from four covariances (M, M)."""

    raters: Floats
    items: Floats
    votes: Floats
    independent: Floats

    def of(self, gradient: Floats) -> float:
        raters, items, votes, independent = (
            float(gradient @ covariance @ gradient)
            for covariance in (self.raters, self.items, self.votes, self.independent)
        )
        return math.sqrt(max(raters + items - votes, raters, items, independent))


def _expected_share(
    one: int, two: int, names: Sequence[str], logs: Floats, error: _StandardError, quantile: float, level: float
) -> ExpectedShare:
    gradient = np.zeros(len(names))
    gradient[one] = 1
    gradient[two] = -1
    difference = logs[one] - logs[two]
    low, high = special.expit(difference + np.array([-1, 1]) * quantile * error.of(gradient))
    interval = Interval(float(low), float(high), level)
    return ExpectedShare(names[one], names[two], float(special.expit(difference)), interval)


def _average(shares: Floats, model: int) -> float:
    """The mean share of a model against the others, of shares (M, M)."""
    return float((shares[model].sum() - 0.5) / (len(shares) - 1))


def _strength(
    model: int, names: Sequence[str], shares: Floats, error: _StandardError, quantile: float, level: float
) -> Strength:
    """The interval is made in log-odds of the average share by the delta method."""
    average = _average(shares, model)
    slopes = shares[model] * (1 - shares[model]) / (len(names) - 1)
    gradient = -slopes
    gradient[model] = slopes.sum() - slopes[model]
    gradient /= average * (1 - average)
    low, high = special.expit(special.logit(average) + np.array([-1, 1]) * quantile * error.of(gradient))
    return Strength(names[model], average, Interval(float(low), float(high), level))
