"""Simulated studies of two or more models whose true win shares are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ft_service.evaluate.statistics.votes import Outcome, Vote

CAREFUL, RANDOM, LEFT_ONLY = range(3)


@dataclass(frozen=True)
class Design:
    """A study of `adapter` against `base`.

    `win_share` is the share of items times votes that careful raters give to the adapter. With `consensus` (above 1/2)
    each item has a better answer, and a careful rater names it with that probability; None makes all votes of careful
    raters independent. `kinds` are the probabilities that a rater is careful, random, or always presses left.
    """

    win_share: float
    raters: int = 20
    votes_each: int = 15
    items: int = 60
    consensus: float | None = None
    kinds: Sequence[float] = (1.0, 0.0, 0.0)
    ties: float = 0.0

    @property
    def true_share(self) -> float:
        """Of the population that the raters are drawn from."""
        share = self.kinds[CAREFUL] * self.win_share + (1 - self.kinds[CAREFUL]) / 2
        return (1 - self.ties) * share + self.ties / 2


def simulate(
    design: Design, rng: np.random.Generator, kinds: Sequence[int] | None = None, repeats: int = 0
) -> list[Vote]:
    """The votes of one study. `kinds` sets the kind of each rater; otherwise they are drawn. Each rater sees `repeats`
    of their items again."""
    drawn = np.asarray(kinds) if kinds is not None else rng.choice(3, size=design.raters, p=design.kinds)
    good = _adapter_is_better(design, rng)
    votes = []
    for rater, kind in enumerate(drawn):
        items = rng.permutation(design.items)[: design.votes_each]
        for index, item in enumerate([*items, *items[:repeats]]):
            adapter_left = rng.random() < 0.5
            outcome = _outcome(design, kind, bool(good[item]), adapter_left, rng)
            left, right = ("adapter", "base") if adapter_left else ("base", "adapter")
            votes.append(Vote(f"r{rater:02d}", f"q{item}", left, right, outcome, repeat=index >= len(items)))
    return votes


def _adapter_is_better(design: Design, rng: np.random.Generator) -> np.ndarray:
    if design.consensus is None:
        return np.zeros(design.items)
    share = (design.win_share - (1 - design.consensus)) / (2 * design.consensus - 1)
    return rng.random(design.items) < share


def _outcome(design: Design, kind: int, better: bool, adapter_left: bool, rng: np.random.Generator) -> Outcome:
    if kind == LEFT_ONLY:
        return Outcome.LEFT
    if rng.random() < design.ties:
        return Outcome.TIE
    if kind == RANDOM:
        return Outcome.LEFT if rng.random() < 0.5 else Outcome.RIGHT
    chance = design.win_share
    if design.consensus is not None:
        chance = design.consensus if better else 1 - design.consensus
    return Outcome.LEFT if (rng.random() < chance) == adapter_left else Outcome.RIGHT


def counted_votes(first: str, second: str, wins: int, losses: int, ties: int = 0, *, start: int = 0) -> list[Vote]:
    """Votes with these counts, each of a rater and an item of its own: independent."""
    outcomes = [Outcome.LEFT] * wins + [Outcome.RIGHT] * losses + [Outcome.TIE] * ties
    return [
        Vote(f"r{start + index}", f"q{start + index}", first, second, outcome) for index, outcome in enumerate(outcomes)
    ]
