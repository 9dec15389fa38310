"""Intervals for shares and for means of values between 0 and 1, with clusters respected.

Letters in shapes: N values, G clusters.

Sources:
    Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22.
    Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial,
        Biometrika 26.
    Korn and Graubard (1998), Confidence intervals for proportions with small expected number of positive counts
        estimated from survey data, Survey Methodology 24.
    Cameron, Gelbach and Miller (2011), Robust inference with multiway clustering, JBES 29.
    Agresti and Min (2005), Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 24.
    Carter, Schnepel and Steigerwald (2017), Asymptotic behavior of a t-test robust to cluster heterogeneity, Review of
        Economics and Statistics 99.
    Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from ft_service.errors import DataError

LEVEL = 0.95
FEWEST_RATERS_FOR_A_VERDICT = 3
FEWEST_CLUSTERS_FOR_A_VERDICT = 6
"""Six clusters are the fewest whose signs alone can give p <= 0.05: 2 / 2**6 = 0.031."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Verdict(StrEnum):
    """What may be said of a model against another one."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SETTLED = "not settled"


@dataclass(frozen=True)
class Interval:
    """All values from `low` to `high`. `level` is the share of studies whose interval contains the truth."""

    low: float
    high: float
    level: float = LEVEL

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Share:
    """A share, or the mean of values between 0 and 1, with its interval.

    `count` is the number of values. `effective_count` is the number of independent values that carry as much
    information: fewer than `count` where values of one cluster resemble each other.
    """

    value: float
    interval: Interval
    count: int
    effective_count: float


def codes_of(labels: ArrayLike) -> Integers:
    """Labels (N,) of any kind as integers (N,) from 0."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64)


def check_level(level: float) -> None:
    """Raises DataError unless 0 < level < 1."""
    if not 0 < level < 1:
        raise DataError(f"level = {level}: a confidence level lies between 0 and 1. Use 0.95.")


def wilson(successes: float, trials: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share of independent trials."""
    _check_counts(successes, trials)
    z = stats.norm.ppf((1 + level) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # In floating point the bound at an extreme share may stop short of it by 1e-17.
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    high = 1.0 if successes == trials else min(1.0, float(centre + half))
    return Interval(low, high, level)


def clopper_pearson(successes: float, trials: float, level: float = LEVEL) -> Interval:
    """The exact interval of a share of independent trials. Counts may be fractional (Korn and Graubard 1998)."""
    _check_counts(successes, trials)
    tail = (1 - level) / 2
    failures = trials - successes
    low = special.betaincinv(successes, failures + 1, tail) if successes > 0 else 0.0
    high = special.betaincinv(successes + 1, failures, 1 - tail) if failures > 0 else 1.0
    return Interval(float(low), float(high), level)


def _check_counts(successes: float, trials: float) -> None:
    if trials <= 0 or not 0 <= successes <= trials:
        raise DataError(
            f"{successes} of {trials} is no share: give a positive number of trials and at most as many hits."
        )


def cluster_sums(values: Floats, clusters: Integers) -> Floats:
    """Sum of values (N,) in each cluster (G,). Clusters (N,) are integers from 0."""
    sums: Floats = np.bincount(clusters, weights=values).astype(np.float64)
    return sums


def variance_of_mean(values: Floats, clusters: Integers | None = None) -> float:
    """Variance of the mean of values (N,) whose clusters (N,) are independent; without clusters, of independent values.

    G / (G - 1) * sum over clusters of (sum of deviations in the cluster)**2 / N**2. 0 for a single cluster.
    """
    deviations = values - values.mean()
    sums = deviations if clusters is None else cluster_sums(deviations, clusters)
    if len(sums) < 2:
        return 0.0
    return float(len(sums) / (len(sums) - 1) * (sums**2).sum() / len(values) ** 2)


def effective_clusters(clusters: Integers) -> float:
    """The number of equally large clusters that give as good a variance: N**2 / sum of squared sizes."""
    sizes = np.bincount(clusters)
    return float(len(clusters) ** 2 / (sizes.astype(float) ** 2).sum())


def clustered_share(values: ArrayLike, *clusterings: ArrayLike, level: float = LEVEL) -> Share:
    """The mean of values (N,) between 0 and 1, and an interval that respects one or two clusterings (N,) of them.

    Korn and Graubard (1998): Clopper and Pearson's interval at the effective number of values,

        N / (variance ratio * design effect) * (t quantile at N - 1 / t quantile at the smallest G - 1)**2.

    The variance ratio compares the variance of independent values with that of zeros and ones of the same mean. Values
    of 1/2 (ties) make it smaller than 1. One extra 0 and one extra 1 keep it above 0 (Agresti and Min 2005). The design
    effect is never below 1, so a cluster never adds evidence. For two clusterings the variance is the sum of both less
    that of independent values (Cameron, Gelbach and Miller 2011), or the largest of the three if that is larger.
    G counts clusters weighted by size, see `effective_clusters`. A clustering with a single cluster cannot show how
    much clusters differ and is left out: the caller decides what may be concluded from one cluster.

    Raises DataError for no values, or values outside 0 to 1.
    """
    check_level(level)
    scores = np.asarray(values, dtype=np.float64)
    if not len(scores) or not np.all((scores >= 0) & (scores <= 1)):
        raise DataError(f"a share of {len(scores)} values: give at least one value, each from 0 to 1.")
    count = len(scores)
    groupings = [codes for codes in map(codes_of, clusterings) if codes.max() > 0]
    mean = float(scores.mean())
    effective = count / (_variance_ratio(scores) * _design_effect(scores, groupings))
    smallest = min([float(count), *map(effective_clusters, groupings)])
    if smallest < count:
        quantile = (1 + level) / 2
        effective *= float(stats.t.ppf(quantile, count - 1) / stats.t.ppf(quantile, max(1.0, smallest - 1))) ** 2
    interval = clopper_pearson(min(mean, 1.0) * effective, effective, level)
    return Share(mean, interval, count, effective)


def _variance_ratio(scores: Floats) -> float:
    smoothed = np.concatenate([scores, [0.0, 1.0]])
    mean = smoothed.mean()
    return float(smoothed.var() / (mean * (1 - mean)))


def _design_effect(scores: Floats, groupings: Sequence[Integers]) -> float:
    independent = variance_of_mean(scores)
    if independent == 0 or not groupings:
        return 1.0
    clustered = [variance_of_mean(scores, codes) for codes in groupings]
    both = sum(clustered) - (len(clustered) - 1) * independent
    return max(1.0, both / independent, *(variance / independent for variance in clustered))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values (N,): valid for all tests together, whatever their dependence."""
    raw: Any = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    adjusted = np.maximum.accumulate(raw[order] * (len(raw) - np.arange(len(raw))))
    result = np.empty(len(raw))
    result[order] = np.minimum(adjusted, 1.0)
    return result
