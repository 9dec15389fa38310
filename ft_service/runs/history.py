"""What a run lived through, from its events: each attempt of its workers, how it ended, and what was done twice."""

from collections.abc import Iterable
from datetime import datetime

from pydantic import BaseModel, Field

from ft_service.runs.metrics import Event

_ENDINGS = {"recovering", "moving", "stopped", "failed", "published"}


class Attempt(BaseModel):
    """One group of workers, from its first step on."""

    time: datetime | None = Field(description="When it began, UTC.")
    step: int = Field(description="Completed steps that it went on from.")
    workers: int
    hosts: list[str]
    repeated: int = Field(description="Steps that the attempt before had made, and that this one makes again.")
    ended: str = Field(default="", description="Why it ended; empty while it trains.")


def attempts(events: Iterable[Event]) -> list[Attempt]:
    """The attempts of a run, oldest first."""
    found: list[Attempt] = []
    for event in events:
        is_open = bool(found) and not found[-1].ended
        if event.type == "training":
            if is_open:  # nobody was there to say why
                found[-1].ended = "The job's driver died."
            data = event.model_dump()
            found.append(
                Attempt(
                    time=event.time,
                    step=data["step"],
                    workers=len(data["workers"]),
                    hosts=sorted({place["host"] for place in data["workers"]}),
                    repeated=data.get("repeated", 0),
                )
            )
        elif event.type in _ENDINGS and is_open:
            found[-1].ended = "Complete." if event.type == "published" else event.message
    return found


def wasted_steps(found: Iterable[Attempt]) -> int:
    """Steps that were made more than once."""
    return sum(attempt.repeated for attempt in found)
