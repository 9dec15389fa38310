"""A run's history, from its events: each attempt, how it ended, and which steps were repeated."""

from collections.abc import Iterable
from datetime import datetime

from pydantic import BaseModel, Field

from ft_service.runs.events import Event, Published, TrainingStarted

_ENDINGS = {"recovering", "moving", "stopped", "failed", "published"}


class Attempt(BaseModel):
    """One group of workers, from its first step on."""

    time: datetime | None = Field(description="When it began, UTC.")
    step: int = Field(description="Completed steps that it continued from.")
    workers: int
    hosts: list[str]
    repeated: int = Field(description="Steps of the previous attempt that this one repeats.")
    ended: str = Field(default="", description="Why it ended; empty while it trains.")


def attempts(events: Iterable[Event]) -> list[Attempt]:
    """The attempts of a run, oldest first."""
    found: list[Attempt] = []
    for event in events:
        is_open = bool(found) and not found[-1].ended
        if isinstance(event, TrainingStarted):
            if is_open:  # its driver could not record why
                found[-1].ended = "The job's driver died."
            found.append(
                Attempt(
                    time=event.time,
                    step=event.step,
                    workers=len(event.workers),
                    hosts=sorted({place.host for place in event.workers}),
                    repeated=event.repeated,
                )
            )
        elif event.type in _ENDINGS and is_open:
            found[-1].ended = "Complete." if isinstance(event, Published) else event.message
    return found


def wasted_steps(found: Iterable[Attempt]) -> int:
    """Steps that were trained more than once."""
    return sum(attempt.repeated for attempt in found)
