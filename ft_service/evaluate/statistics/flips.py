"""Stability: how often the answer to the same item changes over variants (seeds, temperatures, paraphrases, batches).

Letters in shapes: N items, V variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ft_service.errors import DataError
from ft_service.evaluate.statistics.intervals import LEVEL, Share, clustered_share


@dataclass(frozen=True)
class FlipResult:
    """`flipped` is the share of items whose answers are not all the same. It grows with the number of variants, so
    compare only results with equal `variants`. `agreement` is the probability that two answers to the same item are the
    same, averaged over items; it does not grow. `flipped_items` are indices, `left_out` counts items with fewer than
    two answers."""

    items: int
    variants: int
    flipped: Share
    agreement: Share
    flipped_items: tuple[int, ...]
    left_out: int


def count_flips(
    answers: Sequence[Sequence[object]], clusters: ArrayLike | None = None, *, level: float = LEVEL
) -> FlipResult:
    """Flips of answers (N, V), of any kind that can be compared; None where a variant has no answer.

    Give what should be stable: the text, the extracted answer, or right and wrong. Cluster labels (N,) name items that
    share a passage or a template. Raises DataError if the rows differ in length, and if no item has two answers.
    """
    if len({len(row) for row in answers}) > 1:
        raise DataError("items have different numbers of variants. Give None where a variant has no answer.")
    given = [[answer for answer in row if answer is not None] for row in answers]
    kept = [index for index, row in enumerate(given) if len(row) > 1]
    if not kept:
        raise DataError("no item has two answers. Ask at least two variants of each item.")
    labels = np.arange(len(answers)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(answers):
        raise DataError(f"{len(labels)} cluster labels for {len(answers)} items: give one label an item.")
    agreement = np.array([_pairs_agree(given[index]) for index in kept])
    return FlipResult(
        items=len(kept),
        variants=len(answers[0]),
        flipped=clustered_share(agreement < 1, labels[kept], level=level),
        agreement=clustered_share(agreement, labels[kept], level=level),
        flipped_items=tuple(index for index, share in zip(kept, agreement, strict=True) if share < 1),
        left_out=len(answers) - len(kept),
    )


def _pairs_agree(row: Sequence[object]) -> float:
    """The share of pairs of answers that are equal. Answers need not be hashable: parsed JSON is compared too."""
    pairs = [row[one] == row[two] for one in range(len(row)) for two in range(one)]
    return sum(pairs) / len(pairs)
