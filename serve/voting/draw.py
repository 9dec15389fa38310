"""Draws who judges what: N reviews for each comparison, spread over the raters, with sides, order and hidden checks.

The study's seed decides everything but the ids of the assignments, which nobody can guess.
"""

import random
import secrets
from collections import Counter
from collections.abc import Sequence

from ft_service.errors import UsageError
from serve.voting.files import Assignment, Comparison, Kind

REPEAT_GAP = 10
"""So many others come between a comparison and its repeat, where the rater has that many."""


def draw_assignments(
    comparisons: Sequence[Comparison],
    raters: Sequence[str],
    *,
    votes_per_item: int,
    repeats: float,
    controls: float,
    seed: int,
) -> list[Assignment]:
    """Each rater's assignments in their order.

    A real comparison goes to `votes_per_item` different raters, those with the fewest so far. A rater gets `repeats`
    of their real ones a second time with the sides swapped, as many controls as `controls` of their real ones, rounded
    but at least one if the share is not 0, and every attention item. Each model stands on each side equally often.

    Raises `UsageError` if there are fewer raters than votes for a comparison.
    """
    if votes_per_item > len(raters):
        raise UsageError(
            f"--votes-per-item = {votes_per_item}: a rater judges a comparison once, and there are {len(raters)} "
            "raters. Name more raters, or ask for fewer votes."
        )
    draw = random.Random(f"assignments {seed}")
    real = [one for one in comparisons if one.kind == "real"]
    pool = [one for one in comparisons if one.kind == "control"]
    attention = [one for one in comparisons if one.kind == "attention"]
    assignments = []
    for rater, own in _spread(real, raters, votes_per_item, draw).items():
        few = draw.sample(pool, min(len(pool), _number(controls, len(own))))
        order = [*own, *few, *attention]
        draw.shuffle(order)
        is_left = _sides(order, draw)
        places: list[tuple[float, Kind, Comparison, bool]] = [
            (place, one.kind, one, is_left[one.id]) for place, one in enumerate(order)
        ]
        for place in _repeated(order, _number(repeats, len(own)), draw):
            later = draw.uniform(min(place + _gap(order), len(order) - 1), len(order)) + 0.5
            places.append((later, "repeat", order[place], not is_left[order[place].id]))
        for position, (_, kind, one, first_is_left) in enumerate(sorted(places, key=lambda at: at[0])):
            assignments.append(
                Assignment(
                    id=secrets.token_hex(8),
                    rater=rater,
                    comparison=one.id,
                    kind=kind,
                    position=position,
                    first_is_left=first_is_left,
                )
            )
    return assignments


def _spread(
    real: Sequence[Comparison], raters: Sequence[str], votes_per_item: int, draw: random.Random
) -> dict[str, list[Comparison]]:
    own: dict[str, list[Comparison]] = {rater: [] for rater in raters}
    for one in draw.sample(real, len(real)):
        free = draw.sample(raters, len(raters))  # a stable sort of a shuffled list breaks ties by chance
        for rater in sorted(free, key=lambda rater: len(own[rater]))[:votes_per_item]:
            own[rater].append(one)
    return own


def _number(share: float, of: int) -> int:
    return max(1, round(share * of)) if share and of else 0


def _sides(order: Sequence[Comparison], draw: random.Random) -> dict[str, bool]:
    """Comparison -> whether its first answer stands left: in half of those of the same two models, by chance."""
    is_left: dict[str, bool] = {}
    groups = Counter((one.kind, one.first.model, one.second.model) for one in order)
    halves = {}
    for group, size in groups.items():
        extra = draw.random() < 0.5
        half = [number % 2 == int(extra) for number in range(size)]
        draw.shuffle(half)
        halves[group] = half
    for one in order:
        is_left[one.id] = halves[one.kind, one.first.model, one.second.model].pop()
    return is_left


def _gap(order: Sequence[Comparison]) -> int:
    return min(REPEAT_GAP, len(order) // 2)


def _repeated(order: Sequence[Comparison], number: int, draw: random.Random) -> list[int]:
    """Places of the comparisons that come again: those with enough others after them first."""
    real = [place for place, one in enumerate(order) if one.kind == "real"]
    early = [place for place in real if place + _gap(order) < len(order)]
    late = [place for place in real if place + _gap(order) >= len(order)]
    chosen = draw.sample(early, min(number, len(early)))
    return chosen + draw.sample(late, min(number - len(chosen), len(late)))
