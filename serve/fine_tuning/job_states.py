"""The states of a fine-tuning job, and which may follow which."""

from collections.abc import Mapping
from typing import Literal, get_args

State = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wish = Literal["pause", "cancel"]
"""What a client asked for and the run has not done yet. Never a state: the run still uses its workers."""

ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: frozenset[State] = frozenset(get_args(State)) - ENDED

LEGAL: Mapping[State, frozenset[State]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "succeeded", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"validating_files", "queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""State -> the states that may follow. running -> queued: the driver was lost, and the run waits for workers again.
queued -> succeeded: a short run may train between two looks."""


def check_legal(before: State, after: State) -> None:
    """Raises `ValueError`: an illegal transition is a bug of the caller."""
    if after not in LEGAL[before]:
        raise ValueError(f"a job that is {before} cannot become {after}")
