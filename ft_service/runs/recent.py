"""The runs of a storage root by the day they began, so that the newest are found without reading all others.

    <storage>/index/runs/<YYYY-MM-DD>/<HHMMSS>~<run id>     a small file for each run, written when it begins

The folders `runs/<run id>` are the truth. A file here whose run is gone is left out, and `ft prune` deletes it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import islice

from ft_service.registry.index import INDEX
from ft_service.runs.folder import RunFolder, RunStatus
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage

RUNS_BY_DAY = f"{INDEX}/runs"
READERS = 16
"""Runs that are read at the same time."""


def newest_runs(storage: Storage, limit: int | None = None) -> list[RunStatus]:
    """The states of the `limit` runs that began last, newest first; of all runs, by id, if `limit` is None.

    With a limit: one listing of the days, one of each day that is needed, and the reads of `limit` runs. A storage root
    whose runs are not listed by day, because an earlier version wrote them, is read whole.
    """
    days = storage.folders(RUNS_BY_DAY)
    if limit is None:
        return _statuses(storage, storage.folders("runs"))
    if not days:
        statuses = _statuses(storage, storage.folders("runs"))
        return sorted(statuses, key=lambda status: status.time, reverse=True)[:limit]
    run_ids = _newest_first(storage, days)
    found: list[RunStatus] = []
    while len(found) < limit and (batch := list(islice(run_ids, limit - len(found)))):
        found += _statuses(storage, batch)
    return found


def _statuses(storage: Storage, run_ids: list[str]) -> list[RunStatus]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="runs") as pool:
        statuses = list(pool.map(lambda run_id: RunFolder(storage, run_id).status(), run_ids))
    return [status for status in statuses if status is not None]


def _newest_first(storage: Storage, days: list[str]) -> Iterator[str]:
    seen = set()
    for day in reversed(days):
        for name in reversed(storage.files(f"{RUNS_BY_DAY}/{day}")):
            run_id = name.partition("~")[2]
            if run_id and run_id not in seen:  # two drivers that start one run at once both list it
                seen.add(run_id)
                yield run_id


def begin(run: RunFolder, spec: RunSpec, now: datetime | None = None) -> None:
    """List a new run by day, and save its spec, which makes it resumable. A run with a spec stays as it is."""
    if run.has_spec():
        return
    now = now or datetime.now(UTC)
    run.storage.write_bytes(f"{RUNS_BY_DAY}/{now:%Y-%m-%d/%H%M%S}~{run.run_id}", b"\n")
    run.write_spec(spec)


def unlist_deleted_runs(storage: Storage, now: datetime | None = None) -> None:
    """Delete the files of runs that are gone. Those of the last two days stay: such a run may just begin."""
    now = now or datetime.now(UTC)
    days = [day for day in storage.folders(RUNS_BY_DAY) if day < f"{now - timedelta(days=2):%Y-%m-%d}"]
    existing = set(storage.folders("runs")) if days else set()
    for day in days:
        for name in storage.files(f"{RUNS_BY_DAY}/{day}"):
            if name.partition("~")[2] not in existing:
                storage.delete(f"{RUNS_BY_DAY}/{day}/{name}")
