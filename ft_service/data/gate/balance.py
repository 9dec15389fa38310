"""Balance: whether a few openings, templates or labels make up most of the data, with their entropies."""

from collections.abc import Iterator
from itertools import chain

import numpy as np

from ft_service.data.gate.duplicates import SecondPass
from ft_service.data.gate.facts import Facts
from ft_service.data.gate.findings import Entropy
from ft_service.data.gate.form import Hit

FEWEST = 50
"""With fewer records, frequencies mean little."""
DOMINANT = (0.5, 0.7, 0.8)
"""One opening dominates from the first of these shares of the records on, two together from the second, and so on."""
DOMINANT_LABEL = (0.8,)
"""A model that always gives this label is right four times in five."""
MOST_LABELS = 100
LABEL_REPEATS = 10
"""Answers are labels if there are at most 100 different ones, each given ten times on average."""


def check_balance(facts: Facts, second_pass: SecondPass) -> tuple[dict[str, Entropy], Iterator[Hit]]:
    """Entropies, and hits on the records of the few kinds that dominate. Examples come from `second_pass`."""
    keys = facts["key"]
    train = ~facts["validation"]
    if not train.any():
        return {}, iter(())
    rows = np.flatnonzero(train)
    outputs = _Kinds(facts["output"][train])
    labels = len(outputs.counts) <= MOST_LABELS and len(outputs.counts) * LABEL_REPEATS <= len(rows)
    checked = [("answer openings", "balance.openings", _Kinds(facts["output_opening"][train]), "answers begin")]
    if labels:
        checked.insert(0, ("labels", "balance.labels", outputs, "answers are"))
    if (facts["prompt"][train] != 0).any():
        kinds = _Kinds(facts["prompt_opening"][train])
        checked.append(("question openings", "balance.templates", kinds, "questions begin"))
    entropies = {}
    hits = []
    for name, code, kinds, what in checked:
        example = second_pass.question if code == "balance.templates" else second_pass.answer
        entropy = entropy_of(kinds.counts)
        largest = int(keys[rows[kinds.members(1)[0]]])
        entropies[name] = entropy.model_copy(update={"largest": example(largest)})
        few = kinds.dominant(DOMINANT_LABEL if name == "labels" else DOMINANT)
        if few and len(rows) >= FEWEST and not (labels and name == "answer openings"):
            ways = "the same way" if few == 1 else f"in one of {few} ways"
            members = kinds.members(few)
            share = f"{len(members) / len(rows):.0%} of the {what} {'the same' if name == 'labels' else ways}"
            detail = f"{share} (as varied as {entropy.effective:.1f} equally frequent kinds)"
            hits.append(_hits(code, keys[rows[members]], detail))
    return entropies, chain.from_iterable(hits)


class _Kinds:
    """The values of some records and their counts."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        kinds, self.counts = np.unique(values, return_counts=True)
        self._by_count = kinds[np.argsort(-self.counts, kind="stable")]

    def dominant(self, shares: tuple[float, ...]) -> int:
        """The smallest number of kinds whose total share reaches the limit for that number; 0 if none does."""
        total_shares = np.cumsum(-np.sort(-self.counts)) / len(self._values)
        reached = (
            few for few, share in enumerate(shares, 1) if few <= len(total_shares) and total_shares[few - 1] >= share
        )
        return next(reached, 0)

    def members(self, few: int) -> np.ndarray:
        """Positions of the records of the `few` most frequent kinds."""
        return np.flatnonzero(np.isin(self._values, self._by_count[:few]))


def _hits(code: str, keys: np.ndarray, detail: str) -> Iterator[Hit]:
    return (Hit(code, int(key), detail) for key in keys)


def entropy_of(counts: np.ndarray) -> Entropy:
    """Shannon entropy of counts, in bits."""
    shares = counts / counts.sum()
    bits = float(-(shares * np.log2(shares)).sum()) + 0.0
    return Entropy(bits=bits, effective=2**bits, kinds=len(counts), largest_share=float(shares.max()))
