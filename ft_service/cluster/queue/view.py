"""Reading the queue from anywhere that reaches the storage, without Ray: `ft queue`, `ft runs`, the fine-tuning API.

Every waiting driver writes its place, what it waits for and its estimated start into its entry. A call reads the active
entries of the queue, or one of them; none reads the runs that have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ft_service.cluster.queue.board import CLUSTERS, read_entry
from ft_service.cluster.queue.entry import Entry, run_of
from ft_service.cluster.queue.schedule import Node, decide
from ft_service.cluster.queue.usage import read_limits, used_hours
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage


@dataclass(frozen=True)
class Listed:
    """An entry of the queue, and the cluster whose queue it is."""

    cluster: str
    entry: Entry


@dataclass(frozen=True)
class Forecast:
    """What would happen to a run that entered the queue now."""

    place: int
    """Among the waiting runs, from 1; 0: it would start at once."""
    waits_for: str
    estimated_start: datetime | None
    """None: unknown."""


def read_queue(storage: Storage, cluster: str | None = None) -> list[Listed]:
    """The runs that have workers or wait for them, on one cluster or on all: by state, then in the order of the queue.

    Left out are entries whose driver has not renewed its lease, by the clocks of both machines.
    """
    clusters = storage.folders(CLUSTERS) if cluster is None else [cluster]
    listed = [
        Listed(name, entry)
        for name in clusters
        for file in storage.files(f"{CLUSTERS}/{name}")
        if (entry := _live_entry(storage, name, file)) is not None
    ]
    return sorted(listed, key=_place_in_list)


def find(storage: Storage, run_id: str) -> Entry | None:
    """The entry of a run; None if it neither waits nor has workers."""
    for cluster in storage.folders(CLUSTERS):
        for file in storage.files(f"{CLUSTERS}/{cluster}"):
            if run_of(file) == run_id and (entry := _live_entry(storage, cluster, file)) is not None:
                return entry
    return None


def place(storage: Storage, run_id: str) -> int | None:
    """The place of a run among those that wait on its cluster, from 1; None if it does not wait."""
    entry = find(storage, run_id)
    return None if entry is None or entry.holds_workers else entry.place


def waiting_for(storage: Storage, run_id: str) -> str | None:
    """What a run waits for, as the rest of a sentence; None if it does not wait."""
    entry = find(storage, run_id)
    return None if entry is None or entry.holds_workers else entry.waits_for


def estimate(
    storage: Storage,
    run: Entry,
    entries: Sequence[Entry],
    nodes: Sequence[Node] | None = None,
    now: datetime | None = None,
) -> Forecast:
    """The place and the start of a run that entered the queue of a cluster now. Writes nothing.

    `entries` are those of that cluster (`read_queue`), and runs that will enter it before this one. Without the
    cluster's `nodes` (`ft_service.cluster.queue.capacity.RayNodes`), the start is known only if there are none.
    """
    now = now or datetime.now(UTC)
    limits = read_limits(storage)
    used = used_hours(storage, now, limits.window_hours)
    decision = decide([*entries, run], nodes or [], limits.quotas(), used, now)
    if nodes is None:
        waits = bool(entries)
        return Forecast(decision.place(run.run_id) or 1 if waits else 0, "", None if waits else now)
    if run.run_id in decision.starts:
        return Forecast(0, "", now)
    start = decision.estimated_starts.get(run.run_id)
    return Forecast(decision.place(run.run_id) or 1, decision.waits_for.get(run.run_id, ""), start)


def _live_entry(storage: Storage, cluster: str, file: str) -> Entry | None:
    if not file.endswith(".json"):
        return None
    entry = read_entry(storage, f"{CLUSTERS}/{cluster}/{file}")
    if entry is None:
        return None
    holder = RunFolder(storage, entry.run_id).lease_holder()
    return entry if holder is not None and holder.token == entry.driver and not holder.is_expired() else None


def _place_in_list(item: Listed) -> tuple[str, bool, int, int, tuple[datetime, str, str]]:
    """Two runs may have the same place for a moment: each has it from its driver's last look."""
    entry = item.entry
    return item.cluster, not entry.holds_workers, entry.place or 0, -entry.rank, entry.by_arrival
