"""What a job waits for, as its row keeps it and as clients read it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ft_service.text import format_duration
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.wire import Waiting

_STATES = ("validating_files", "queued")
_BEFORE_THE_QUEUE = {"validating_files": "the check of its files", "queued": "its driver to start"}
_IN_THE_QUEUE = "its turn in the queue"
PREPARATION = "its data to be prepared"


def in_queue(place: int | None, waits_for: str, estimated_start: datetime | None) -> dict[str, Any]:
    """What a job's row keeps. `waits_for` is the rest of a sentence."""
    start = None if estimated_start is None else int(estimated_start.timestamp())
    return {"place": place, "waits_for": waits_for, "estimated_start": start}


def queue_text(waiting: Mapping[str, Any]) -> str:
    """The place in the queue and what is waited for, in a sentence."""
    place = f"Place {waiting['place'] or '?'} in the queue of the cluster"
    return f"{place}; waits for {waiting['waits_for']}." if waiting["waits_for"] else f"{place}."


def waiting_reply(job: Job) -> Waiting | None:
    """What a job waits for, since when, and when it is expected to start; None if it does not wait."""
    if job.wish is not None:
        return Waiting(waits_for=f"its run to save a checkpoint and stop ({job.wish})", since=_seconds(job.since))
    kept = job.waiting or {}
    if job.state not in _STATES and not kept:
        return None  # a running job waits if its run was preempted, or if its full model has no room
    return Waiting(
        place=kept.get("place"),
        waits_for=kept.get("waits_for") or _BEFORE_THE_QUEUE.get(job.state, _IN_THE_QUEUE),
        since=kept.get("since") or _seconds(job.since),
        estimated_start=kept.get("estimated_start"),
    )


def status_details(job: Job, now: datetime) -> str | None:
    """In sentences, why the status of a job is what it is, and since when; None if there is nothing to add."""
    if job.trouble is not None:
        return f"Held up: {job.trouble}"
    waiting = waiting_reply(job)
    if waiting is None:
        return None
    waited = format_duration(max(int(now.timestamp()) - waiting.since, 0))
    place = f"Place {waiting.place} in the queue. " if waiting.place else ""
    details = f"{place}Waits for {waiting.waits_for}; for {waited} so far."
    if waiting.estimated_start is not None:
        details += f" Expected to start at {_clock(waiting.estimated_start)}."
    return details


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _clock(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
