"""One-sidedness: whether few openings, templates or labels make up most of the data, with entropies."""

from collections.abc import Iterator

import numpy as np

from ft_service.data.judge.duplicates import Looks
from ft_service.data.judge.facts import Facts
from ft_service.data.judge.findings import Entropy
from ft_service.data.judge.form import Hit

FEWEST = 50
"""Records below which frequencies say little."""
DOMINANT_OPENING = 0.5
DOMINANT_TEMPLATE = 0.5
DOMINANT_LABEL = 0.8
"""Always giving this label is right four times in five."""
MOST_LABELS, LABEL_REPEATS = 100, 10
"""Answers are labels where there are at most 100 kinds, each given ten times on average."""


def judge_balance(facts: Facts, looks: Looks | None = None) -> tuple[dict[str, Entropy], list[Hit]]:
    """Entropy figures, and hits on the records of a kind that dominates. `looks` lends examples."""
    keys, train = facts["key"], ~facts["validation"]
    entropies: dict[str, Entropy] = {}
    hits: list[Hit] = []
    if not train.any():
        return entropies, hits

    def weigh(name: str, column: str) -> tuple[np.ndarray, Entropy]:
        values = facts[column][train]
        kinds, counts = np.unique(values, return_counts=True)
        largest = kinds[counts.argmax()]
        rows = np.flatnonzero(train)[values == largest]
        entropy = entropy_of(counts)
        seen = (looks.questions if column == "prompt_opening" else looks.answers) if looks is not None else {}
        entropies[name] = entropy.model_copy(update={"largest": seen.get(int(keys[rows[0]]), "")})
        return rows, entropies[name]

    def told(code: str, rows: np.ndarray, entropy: Entropy, what: str) -> Iterator[Hit]:
        detail = f"{entropy.largest_share:.0%} {what} (as varied as {entropy.effective:.1f} equal kinds)"
        yield from (Hit(code, int(keys[row]), detail) for row in rows)

    enough = int(train.sum()) >= FEWEST
    rows, outputs = weigh("outputs", "output")
    labels = outputs.kinds <= MOST_LABELS and outputs.kinds * LABEL_REPEATS <= train.sum()
    if labels:
        entropies["labels"] = outputs
        if enough and outputs.largest_share >= DOMINANT_LABEL:
            hits += told("balance.labels", rows, outputs, "of the answers are the same")
    del entropies["outputs"]
    rows, openings = weigh("answer openings", "output_opening")
    if enough and not labels and openings.largest_share >= DOMINANT_OPENING:
        hits += told("balance.openings", rows, openings, "of the answers begin alike")
    if (facts["prompt"][train] != 0).any():
        rows, templates = weigh("question openings", "prompt_opening")
        if enough and templates.largest_share >= DOMINANT_TEMPLATE:
            hits += told("balance.templates", rows, templates, "of the questions begin alike")
    return entropies, hits


def entropy_of(counts: np.ndarray) -> Entropy:
    """Shannon entropy of frequencies, in bits."""
    shares = counts / counts.sum()
    bits = float(-(shares * np.log2(shares)).sum()) + 0.0
    return Entropy(bits=bits, effective=2**bits, kinds=len(counts), largest_share=float(shares.max()))
