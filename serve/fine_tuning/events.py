"""A job's events as a stream that can be resumed: server-sent events, each with its id."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve.database.tables import JobEventRow
from serve.fine_tuning.job_records import JobRecords
from serve.fine_tuning.job_states import ENDED

COMMENT = ": waiting\n\n"
LOOK_SECONDS = 1.0
QUIET_LOOKS = 15
"""After so many looks without an event a comment keeps the connection open."""
_AT_ONCE = 200

Write = Callable[[JobEventRow], dict[str, Any]]


async def event_stream(
    records: JobRecords, job_id: str, after: str | None, write: Write, is_stopping: Callable[[], bool]
) -> AsyncGenerator[str, None]:
    """All events after the one called `after`, then new ones until the job has ended; then ``[DONE]``.

    A reader that was cut off goes on with `Last-Event-ID`, and misses nothing. Ends early, without ``[DONE]``, when the
    server stops.
    """
    quiet = 0
    while True:
        job = await asyncio.to_thread(records.find, job_id)  # before its events: after the end none is added
        rows = await asyncio.to_thread(records.events_since, job_id, after, _AT_ONCE)
        for row in rows:
            after = row.id
            yield f"id: {row.id}\ndata: {json.dumps(write(row), ensure_ascii=False)}\n\n"
        if len(rows) == _AT_ONCE:
            continue
        if job is None or job.state in ENDED:
            yield "data: [DONE]\n\n"
            return
        if is_stopping():
            return
        quiet = 0 if rows else quiet + 1
        if quiet == QUIET_LOOKS:
            quiet = 0
            yield COMMENT
        await asyncio.sleep(LOOK_SECONDS)
