"""The decision of the queue, as a pure function: who starts now, who waits for what, and who has to leave.

1. Runs start in the order of priority, then of the worker-hours that their owner has used lately, then of arrival.
2. The first run that does not fit yet has a reservation: a run behind it starts only in room that the reservation does
   not need, or, during the first hour of its wait, if it is expected to end before the reservation begins.
3. A run that waits for its owner's quota holds up no other, nor does one that does not fit the nodes that are there.

Every driver decides for itself from the same entries, and asks only what the decision means for its own run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.room import format_workers
from ft_service.text import counted

PASSING_SECONDS = 3600.0
"""After this wait of the first run, estimates no longer let another run use the room that it waits for."""

_QUOTA = "the quota of"
_TOLERANCE = 1e-6
"""Ray counts resources in ten-thousandths; their sums in floating point are a little off."""

Amounts = Mapping[str, float]
"""Resource -> amount, by Ray's names."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, or one that the autoscaler may still start."""

    id: str
    total: Amounts
    free: Amounts
    """What Ray has free."""
    is_joining: bool = False
    """The autoscaler would have to start it."""
    most: int | None = None
    """Of a node that the autoscaler starts and ends: how many such nodes it runs at once, of all types together."""


@dataclass(frozen=True)
class Limits:
    """What an owner may use. None: without limit."""

    max_runs: int | None = None
    """Runs that have workers at once."""
    max_worker_hours: float | None = None
    """Within the window of `Quotas`. GPU-hours, for runs on GPUs."""


@dataclass(frozen=True)
class Quotas:
    """The limits of each owner; those of `default` for an owner that is not listed."""

    default: Limits = Limits()
    owners: Mapping[str, Limits] = field(default_factory=dict)
    window_hours: float = 168.0

    def of(self, owner: str) -> Limits:
        return self.owners.get(owner, self.default)


@dataclass(frozen=True)
class Decision:
    """What follows from the entries of one moment."""

    order: tuple[str, ...]
    """The waiting runs."""
    starts: Mapping[str, int]
    """Run -> the number of workers with which it starts now."""
    waits_for: Mapping[str, str]
    """Run -> why it does not."""
    leaves: frozenset[str]
    """Runs that save a checkpoint and make room for the first waiting run."""
    estimated_starts: Mapping[str, datetime]
    """Waiting run -> when it is expected to start; a run is missing if that cannot be estimated."""

    def place(self, run_id: str) -> int | None:
        """From 1; None for a run that does not wait."""
        return self.order.index(run_id) + 1 if run_id in self.order else None

    def waits_for_room(self, run_id: str) -> bool:
        """Whether it waits, and not for its owner's quota."""
        return run_id in self.waits_for and not self.waits_for[run_id].startswith(_QUOTA)


class Room:
    """What is free on each node. Placing workers changes it."""

    def __init__(self, free: Mapping[str, Amounts], joining: frozenset[str] = frozenset()) -> None:
        self.free = {node: dict(amounts) for node, amounts in free.items()}
        self.joining = joining
        """Nodes that the autoscaler would have to start."""

    def copy(self) -> "Room":
        return Room(self.free, self.joining)

    def slots(self, worker: Amounts) -> int:
        """How many of these workers fit."""
        return sum(_slots(free, worker) for free in self.free.values())

    def largest(self, counts: Sequence[int], worker: Amounts) -> int:
        """The first of `counts`, largest first, that fits; 0 if none does."""
        slots = self.slots(worker)
        return next((count for count in counts if count <= slots), 0)

    def place(self, worker: Amounts, count: int, prefer: "Room | None" = None) -> dict[str, int]:
        """Take room for `count` workers, or for as many as fit: on living nodes first, on those with most room first.

        `prefer` has the room that the order of nodes follows, where it is not this one.
        """
        room = (prefer or self).free
        placed: dict[str, int] = {}
        for node in sorted(
            self.free, key=lambda node: (node in self.joining, -_slots(room.get(node, {}), worker), node)
        ):
            if count == 0:
                break
            if taken := min(count, _slots(self.free[node], worker)):
                self.add(node, worker, -taken)
                placed[node] = taken
                count -= taken
        return placed

    def add(self, node: str, worker: Amounts, count: int) -> None:
        """Free the room of `count` workers on a node; take it if negative."""
        free = self.free.get(node)
        if free is not None:  # otherwise the node has left the cluster
            for name, amount in worker.items():
                free[name] = free.get(name, 0.0) + count * amount

    def smaller(self, other: "Room") -> "Room":
        """What is free in both."""
        return Room(
            {
                node: {name: min(amount, other.free.get(node, {}).get(name, 0.0)) for name, amount in free.items()}
                for node, free in self.free.items()
            },
            self.joining,
        )


def _slots(free: Amounts, worker: Amounts) -> int:
    needed = [(name, amount) for name, amount in worker.items() if amount > 0]
    if not needed:
        return 0
    return max(min(math.floor(free.get(name, 0.0) / amount + _TOLERANCE) for name, amount in needed), 0)


@dataclass
class _Cluster:
    """The room of a moment, and where each run holds workers."""

    room: Room
    placed: dict[str, dict[str, int]]
    """Run -> node -> workers."""

    def release(self, room: Room, entry: Entry) -> None:
        for node, count in self.placed[entry.run_id].items():
            room.add(node, entry.worker_resources, count)


def _cluster(nodes: Sequence[Node], entries: Sequence[Entry]) -> _Cluster:
    """Free room: what Ray has free, less what entries hold or claim and Ray does not show yet.

    Workers that have just died hold room that Ray has freed already, and claimed workers are not placed yet.
    """
    holders = sorted((entry for entry in entries if entry.holds_workers), key=lambda entry: entry.by_arrival)
    room = Room({node.id: node.total for node in nodes}, frozenset(node.id for node in nodes if node.is_joining))
    placed = {entry.run_id: dict(entry.nodes) for entry in holders}
    for entry in holders:
        for node, count in entry.nodes.items():
            room.add(node, entry.worker_resources, -count)
    room = room.smaller(Room({node.id: node.free for node in nodes}))
    for entry in holders:
        missing = entry.workers - sum(entry.nodes.values())
        if missing > 0 and could_ever_fit(entry, nodes) >= entry.fewest_workers:  # otherwise it waits for nodes
            for node, count in room.place(entry.worker_resources, missing).items():
                placed[entry.run_id][node] = placed[entry.run_id].get(node, 0) + count
    return _Cluster(room, placed)


def decide(
    entries: Sequence[Entry],
    nodes: Sequence[Node],
    quotas: Quotas,
    used_hours: Mapping[str, float],
    now: datetime,
) -> Decision:
    """Decide for all entries of one cluster. `used_hours` has each owner's worker-hours in runs that have ended."""
    hours = dict(used_hours)
    running: dict[str, int] = {}
    for entry in entries:
        hours[entry.owner] = hours.get(entry.owner, 0.0) + entry.worker_hours(now)
        running[entry.owner] = running.get(entry.owner, 0) + entry.holds_workers
    order = in_order((entry for entry in entries if not entry.holds_workers), hours)
    cluster = _cluster(nodes, entries)
    room = cluster.room.copy()
    starts: dict[str, int] = {}
    waits_for: dict[str, str] = {}
    reservation: _Reservation | None = None
    first: Entry | None = None
    for entry in order:
        if reason := _quota(entry, quotas, hours, running):
            waits_for[entry.run_id] = reason
            continue
        count = room.largest(entry.worker_counts, entry.worker_resources)
        if count and reservation is not None:
            count = reservation.largest(entry, room, now)
        if count:
            starts[entry.run_id] = count
            running[entry.owner] = running.get(entry.owner, 0) + 1
            room.place(entry.worker_resources, count)
            continue
        if reservation is None:
            reservation = _reserve(entry, entries, cluster, room, now)
            if reservation is not None:
                first = entry
        waits_for[entry.run_id] = _room_needed(entry, entries, room, first)
    return Decision(
        order=tuple(entry.run_id for entry in order),
        starts=starts,
        waits_for=waits_for,
        leaves=_victims(first, entries, cluster, room) if first is not None else frozenset(),
        estimated_starts=_estimated_starts(order, entries, cluster, waits_for, now),
    )


def in_order(waiting: Iterable[Entry], hours: Mapping[str, float]) -> list[Entry]:
    """The order in which runs start. `hours` has the worker-hours that each owner used lately."""
    return sorted(waiting, key=lambda entry: (-entry.rank, hours.get(entry.owner, 0.0), *entry.by_arrival))


def _quota(entry: Entry, quotas: Quotas, hours: Mapping[str, float], running: Mapping[str, int]) -> str:
    """Why its owner's quota does not let it start; empty if it does."""
    limits = quotas.of(entry.owner)
    if limits.max_runs is not None and running.get(entry.owner, 0) >= limits.max_runs:
        return f"{_QUOTA} {entry.owner}: {counted(limits.max_runs, 'run')} at once"
    if limits.max_worker_hours is not None and hours.get(entry.owner, 0.0) >= limits.max_worker_hours:
        window = f"{quotas.window_hours / 24:g} days"
        return f"{_QUOTA} {entry.owner}: {limits.max_worker_hours:g} GPU-hours in {window}"
    return ""


@dataclass
class _Reservation:
    """Room that the first waiting run will have at `time`."""

    holder: Entry
    time: datetime | None
    """None: unknown, because nobody knows when the runs before it end."""
    spare: Room
    """What it does not need at that time."""

    def largest(self, entry: Entry, room: Room, now: datetime) -> int:
        """The largest number of workers with which a run behind the first one may start now; 0: none."""
        is_quick = (
            self.time is not None
            and entry.expected_seconds is not None
            and now + timedelta(seconds=entry.expected_seconds) <= self.time
            and (now - self.holder.since).total_seconds() < PASSING_SECONDS
        )
        if is_quick:
            return room.largest(entry.worker_counts, entry.worker_resources)
        common = room.smaller(self.spare)
        count = common.largest(entry.worker_counts, entry.worker_resources)
        if count:
            for node, taken in common.place(entry.worker_resources, count).items():
                self.spare.add(node, entry.worker_resources, -taken)
        return count


def _reserve(
    first: Entry, entries: Sequence[Entry], cluster: _Cluster, room: Room, now: datetime
) -> _Reservation | None:
    """The reservation of the first run that does not fit; None if it does not fit even when all others have ended."""
    future = room.copy()
    holders = [entry for entry in entries if entry.holds_workers]
    for entry in sorted(holders, key=lambda entry: _end_order(entry, now)):
        cluster.release(future, entry)
        if future.slots(first.worker_resources) >= first.fewest_workers:
            future.place(first.worker_resources, first.fewest_workers, prefer=room)
            return _Reservation(first, entry.ends(now), future)
    return None


def _end_order(entry: Entry, now: datetime) -> tuple[bool, datetime, tuple[datetime, str, str]]:
    """Runs whose end is unknown come last, those that began first before the others."""
    end = entry.ends(now)
    return end is None, end or entry.started or entry.arrival, entry.by_arrival


def _room_needed(entry: Entry, entries: Sequence[Entry], room: Room, first: Entry | None) -> str:
    slots = room.slots(entry.worker_resources)
    if slots >= entry.fewest_workers and first is not None:
        return f"run {first.run_id}, which is before it and needs that room"
    workers = format_workers(entry.fewest_workers, entry.worker_resources)
    needed = f"room for {workers}; there is room for {slots}"
    holders = sorted((other for other in entries if other.holds_workers), key=lambda other: other.by_arrival)
    if not holders:
        return f"{needed}, and other work than training has the rest"
    names = ", ".join(f"{other.run_id} ({counted(other.workers, 'worker')})" for other in holders[:3])
    more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
    return f"{needed}; running: {names}{more}"


def _victims(first: Entry, entries: Sequence[Entry], cluster: _Cluster, room: Room) -> frozenset[str]:
    """The fewest preemptible runs of lower priority whose end makes room: lowest priority first, then the newest."""
    future = room.copy()
    for entry in entries:
        if entry.state == "leaving":
            cluster.release(future, entry)
    candidates = [
        entry for entry in entries if entry.state == "running" and entry.preemptible and entry.rank < first.rank
    ]
    candidates.sort(key=lambda entry: (-entry.rank, entry.started or entry.arrival, entry.run_id))
    chosen: list[Entry] = []
    while future.slots(first.worker_resources) < first.fewest_workers:
        if not candidates:
            return frozenset()
        chosen.append(candidates.pop())
        cluster.release(future, chosen[-1])
    for entry in tuple(chosen):  # the last ones may have made the first ones unnecessary
        for node, count in cluster.placed[entry.run_id].items():
            future.add(node, entry.worker_resources, -count)
        if future.slots(first.worker_resources) >= first.fewest_workers:
            chosen.remove(entry)
        else:
            cluster.release(future, entry)
    return frozenset(entry.run_id for entry in chosen)


def _estimated_starts(
    order: Sequence[Entry],
    entries: Sequence[Entry],
    cluster: _Cluster,
    waits_for: Mapping[str, str],
    now: datetime,
) -> dict[str, datetime]:
    """Starts in order, none passing another, as the running ones end. Stops at the first unknown end."""
    room = cluster.room.copy()
    placed = dict(cluster.placed)
    ends: list[tuple[datetime, Entry]] = []
    for entry in entries:
        if entry.holds_workers and (end := entry.ends(now)) is not None:
            ends.append((end, entry))
    estimates: dict[str, datetime] = {}
    time = now
    for entry in order:
        if waits_for.get(entry.run_id, "").startswith(_QUOTA):
            continue
        while room.slots(entry.worker_resources) < entry.fewest_workers:
            if not ends:
                return estimates
            ends.sort(key=lambda item: (item[0], item[1].run_id))
            time, ended = ends.pop(0)
            for node, count in placed[ended.run_id].items():
                room.add(node, ended.worker_resources, count)
        estimates[entry.run_id] = time
        count = room.largest(entry.worker_counts, entry.worker_resources)
        placed[entry.run_id] = room.place(entry.worker_resources, count)
        if entry.expected_seconds is not None:
            ends.append((time + timedelta(seconds=entry.expected_seconds), entry))
    return estimates


def room_for(entry: Entry, others: Sequence[Entry], nodes: Sequence[Node]) -> int:
    """The largest number of workers with which `entry` fits beside what the others hold; 0 if it does not fit."""
    return _cluster(nodes, others).room.largest(entry.worker_counts, entry.worker_resources)


def could_ever_fit(entry: Entry, nodes: Sequence[Node]) -> int:
    """How many of its workers fit these nodes when they are empty, and the autoscaler runs those on which most fit."""
    slots = [(node.most, _slots(node.total, entry.worker_resources)) for node in nodes]
    autoscaled = sorted((count for most, count in slots if most is not None), reverse=True)
    limit = min((most for most, _ in slots if most is not None), default=0)
    return sum(count for most, count in slots if most is None) + sum(autoscaled[:limit])
