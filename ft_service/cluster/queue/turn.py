"""A run's turn: its driver enters the queue before it asks Ray for workers, and leaves it when the run ends."""

import getpass
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from ft_service.cluster.queue.board import Board, Left
from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.schedule import Decision, Limits, Node, Quotas, could_ever_fit, decide, room_for
from ft_service.cluster.queue.snapshot import SHORT_QUEUE, Snapshots
from ft_service.cluster.queue.usage import QueueLimits, forget_usage, read_limits, record_usage, used_hours
from ft_service.cluster.room import format_workers
from ft_service.errors import Problem, SpecError, StorageError
from ft_service.runs.events import EventLog, Queued
from ft_service.runs.folder import RunFolder
from ft_service.runs.progress import Log
from ft_service.spec.schema import RunSpec
from ft_service.text import format_duration

POLL_SECONDS = 1.0
_FIRST_POLL_SECONDS = 0.1
_LOCAL_SECONDS_PER_ENTRY = 0.05
"""Also on an object store, where a long queue has a snapshot."""
_REMOTE_SECONDS_PER_ENTRY = 0.25
_LONGEST_POLL_SECONDS = 60.0
_USAGE_SECONDS = 30.0
_REPORT_SECONDS = 30.0
"""A run reports a new place at once, and another reason for waiting after this time at the earliest."""
_ESTIMATE_CHANGE_SECONDS = 60.0
"""A smaller change of the estimated start is not written to storage."""

EstimateSeconds = Callable[[int], float | None]
"""Number of workers -> seconds that the training is expected to take with them; None: unknown."""


class Turn:
    """The entry of one run, which leaves the queue when the block ends. Used by one thread of its driver."""

    def __init__(
        self,
        run: RunFolder,
        spec: RunSpec,
        worker_resources: Mapping[str, float],
        driver: str,
        cluster: ClusterNodes,
        log: Log,
        expected_seconds: EstimateSeconds = lambda count: None,
    ) -> None:
        """`driver` is the token of the run's lease, which must be held as long as this is used."""
        self._run = run
        self._cluster = cluster
        self._log = log
        self._expected_seconds = expected_seconds
        self._events = EventLog(run.storage.without_retries(), run.run_id)
        self._spec = spec
        self._worker_resources = dict(worker_resources)
        self._driver = driver
        # Workers, and a person who stops a waiting run, must not wait for a storage that does not answer.
        self._quick_run = RunFolder(run.storage.without_retries(), run.run_id)
        self._patient_board = Board(run.storage, cluster.id)
        self._quick_board = Board(self._quick_run.storage, cluster.id)
        self._board = self._patient_board
        self._snapshots = Snapshots(self._quick_run.storage, cluster.id)
        self._known: list[Entry] = []
        """The other entries, as this driver has seen them last."""
        self._entry: Entry | None = None
        self._is_unsure = False
        """Whether a write failed, so that storage may have it or not."""
        self._stored_limits = QueueLimits()
        self._limits = Quotas()
        self._used: tuple[float, dict[str, float]] | None = None
        self._reported: int | None = None
        self._reported_at = 0.0

    def __enter__(self) -> "Turn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # -- the driver's calls --------------------------------------------------------------------------------------

    def take(self, check: Callable[[], None]) -> int:
        """Wait for the turn of this run. Returns the largest number of workers that it may ask for.

        The first call enters the queue. A call of a run that has its turn already, whose workers have ended, returns at
        once. `check` is called between two looks at the queue, and may raise to stop waiting. Raises `SpecError`
        for a run that could never fit the cluster.
        """
        self._board = self._patient_board
        try:
            return self._take(check)
        finally:
            self._board = self._quick_board

    def _take(self, check: Callable[[], None]) -> int:
        if self._entry is None:
            nodes = self._cluster.nodes()
            self._enter(nodes)
            others = self._arrive()
            self._limits = read_limits(self._run.storage).quotas()
            if not others and self._may_start_alone(nodes):
                return self._own.workers
            return self._wait(check, others)
        if self.has_begun:
            return self._take_again()
        if self._entry.state == "leaving":
            self._give_back()
        return self._wait(check, self._others())

    def _may_start_alone(self, nodes: Sequence[Node]) -> bool:
        """Whether nothing but its own size decides, and it fits. An elastic run sees later how many workers fit."""
        return self._limits.of(self._own.owner) == Limits() and room_for(self._own, [], nodes) > 0

    def placed(self, nodes: Sequence[str], expected_seconds: float | None) -> None:
        """Record the node of each worker, once all of them have one, and what the plan expects the training to take."""
        if self._entry is not None:
            counts = dict(Counter(self._cluster.node_name(node) for node in nodes))
            self._write(state="running", workers=len(nodes), nodes=counts, expected_seconds=expected_seconds)

    @property
    def has_begun(self) -> bool:
        """Whether the run has its turn, and does not give it up."""
        return self._entry is not None and self._entry.state in ("claiming", "running")

    @property
    def is_placed(self) -> bool:
        return self._entry is not None and self._entry.state in ("running", "leaving")

    def expect_end(self, seconds_left: float) -> None:
        """Record when the training is expected to end. Also renews an entry that others have removed."""
        if self._entry is not None:
            self._write(expected_end=datetime.now(UTC) + timedelta(seconds=seconds_left))

    def must_leave(self) -> bool:
        """Whether a run of higher priority needs the workers of this one. Records that they leave."""
        if self._entry is None or not self._entry.preemptible or self._entry.state != "running":
            return False
        if self._snapshot_shows(lambda others: not self._is_wanted(others)) or not self._is_wanted(self._others()):
            return False
        self._write(state="leaving")
        return True

    def _give_back(self) -> None:
        """Return to the queue, after the workers have left for another run."""
        record_usage(self._run.storage, self._own, datetime.now(UTC))
        self._reported = None
        now = datetime.now(UTC)
        self._write(state="waiting", workers=0, nodes={}, started=None, expected_end=None, since=now)

    def may_grow(self) -> bool:
        """Whether no other run waits for the room that more workers of this one would take."""
        if self._snapshot_shows(lambda others: any(not other.holds_workers for other in others)):
            return False
        return all(other.holds_workers for other in self._others())

    def _is_wanted(self, others: Sequence[Entry]) -> bool:
        """Whether a waiting run needs the workers of this one."""
        entry = self._own
        if not any(other.rank > entry.rank and not other.holds_workers for other in others):
            return False
        return entry.run_id in self._decide([entry, *others]).leaves

    def _snapshot_shows(self, holds: Callable[[Sequence[Entry]], bool]) -> bool:
        """Whether the snapshot of a long queue shows something, so that this driver need not read all entries."""
        if len(self._known) <= SHORT_QUEUE:
            return False
        self._snapshots.read()
        snapshot = self._snapshots.current
        return snapshot is not None and self._snapshots.is_fresh() and holds(self._without_own(snapshot.entries))

    def leave(self) -> None:
        """Leave the queue. A storage error here must not hide how the run ends."""
        if self._entry is None:
            return
        entry = self._entry
        self._entry = None
        self._snapshots.resign(entry, self._known)
        try:
            if entry.started is not None:
                now = datetime.now(UTC)
                record_usage(self._run.storage, entry, now)
                forget_usage(self._run.storage, now, self._limits.window_hours)
        except StorageError as error:
            self._log(f"The queue has no record of what this run used: {error}")
        try:
            self._patient_board.delete(entry)
        except StorageError as error:
            self._log(f"The run's entry stays in the queue until its lease has expired: {error}")

    # -- waiting -------------------------------------------------------------------------------------------------

    def _enter(self, nodes: Sequence[Node]) -> None:
        """Claim the workers at once: a run that is alone needs no second write."""
        now = datetime.now(UTC)
        counts = self._spec.worker_counts()
        queue = self._spec.queue
        entry = Entry(
            run_id=self._run.run_id,
            driver=self._driver,
            owner=queue.owner or user_name(),
            priority=queue.priority,
            preemptible=queue.preemptible,
            state="claiming",
            arrival=now,
            since=now,
            worker_counts=counts,
            worker_resources=self._worker_resources,
            workers=counts[0],
            started=now,
        )
        self._refuse_if_it_never_fits(entry, nodes)
        self._entry = entry
        self._board.write(entry)

    def _arrive(self) -> list[Entry]:
        """The other entries. This run comes after all of them, also if its clock is behind theirs."""
        others = self._others()
        if others:
            latest = max(other.arrival for other in others) + timedelta(microseconds=1)
            self._entry = self._own.model_copy(update={"arrival": max(self._own.arrival, latest)})
        return others

    def _refuse_if_it_never_fits(self, entry: Entry, nodes: Sequence[Node]) -> None:
        slots = could_ever_fit(entry, nodes)
        if slots >= entry.fewest_workers or self._cluster.may_grow_beyond():
            return
        problem = (
            f"needs {format_workers(entry.fewest_workers, entry.worker_resources)}, and this cluster has room for "
            f"{slots}, also when it is empty and its autoscaler has started all nodes that it may"
        )
        cure = "Use fewer workers, or smaller ones, or add nodes."
        raise SpecError([Problem("parallel.num_workers", self._spec.parallel.min_workers, problem, cure)])

    def _wait(self, check: Callable[[], None], first_others: list[Entry]) -> int:
        entry = self._own
        if entry.expected_seconds is None:
            expected = self._expected_seconds(entry.worker_counts[0])
            self._entry = entry.model_copy(update={"expected_seconds": expected})
        others: list[Entry] | None = first_others
        self._board = self._quick_board
        is_storage_away = False
        for look in itertools.count():
            try:
                if others is None:
                    others = self._others_while_waiting()
                if (count := self._look(others)) is not None:
                    return count
                is_storage_away = False
            except StorageError as error:
                if not is_storage_away:
                    self._log(f"Cannot read the queue: {error}")
                is_storage_away = True
            check()
            time.sleep(self._pause(len(others or ()), look))
            others = None
        raise AssertionError

    def _look(self, others: Sequence[Entry]) -> int | None:
        """One look at the queue. Returns the number of workers if the run starts."""
        self._write()
        while True:
            entry = self._own
            decision = self._decide([_as_waiting(entry), *others])
            count = decision.starts.get(entry.run_id, 0)
            if not count and self._may_ask_for_nodes(decision, others):
                count = entry.fewest_workers
            if entry.state == "claiming":
                if count:
                    workers = min(count, entry.workers)
                    self._write(workers=workers, place=None, waits_for="", estimated_start=None)
                    self._snapshots.resign(self._own, [self._own, *others])
                    if self._reported is not None:
                        self._log(f"The run starts after {self._waited()} in the queue.")
                    return workers
                self._write(state="waiting", workers=0, started=None)
                self._report(decision)
                return None
            if not count:
                self._report(decision)
                return None
            now = datetime.now(UTC)
            self._write(state="claiming", workers=count, started=now)
            others = self._others()  # a claim counts only if it was written before the others were read

    def _may_ask_for_nodes(self, decision: Decision, others: Sequence[Entry]) -> bool:
        """Whether this is the run that asks an autoscaler of unknown limits for nodes: one at a time."""
        is_first = decision.place(self._run.run_id) == 1 and decision.waits_for_room(self._run.run_id)
        return is_first and self._cluster.may_grow_beyond() and all(other.state != "claiming" for other in others)

    def _take_again(self) -> int:
        """Keep the room of the workers that have ended for those that replace them; more only if nobody waits."""
        entry = self._own
        others = self._others()
        if not others:
            workers = entry.worker_counts[0]
        elif self._can_grow(entry, others):
            workers = max(entry.workers, room_for(entry, others, self._cluster.nodes()))
        else:
            workers = entry.workers
        self._write(state="claiming", workers=workers, nodes={}, expected_end=None)
        if workers > entry.workers and (others := self._others()):
            fitting = room_for(entry, others, self._cluster.nodes())
            if fitting < workers:
                workers = entry.workers
                self._write(workers=workers)
        return workers

    def _can_grow(self, entry: Entry, others: Sequence[Entry]) -> bool:
        return entry.workers < entry.worker_counts[0] and all(other.holds_workers for other in others)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def _own(self) -> Entry:
        assert self._entry is not None, "the run is not in the queue"
        return self._entry

    def _write(self, **changes: Any) -> None:
        """Change the entry and write it, if that changes anything."""
        entry = self._own
        changed = entry.model_copy(update=changes)
        if changed != entry or self._is_unsure:
            self._is_unsure = True
            self._board.write(changed)
            self._is_unsure = False
            self._entry = changed

    def _others(self) -> list[Entry]:
        others, left = self._board.others(self._own)
        for gone in left:
            self._remove(gone)
        self._known = others
        return others

    def _others_while_waiting(self) -> list[Entry]:
        """What a waiting run decides on: in a long queue the snapshot, so that its length does not make a look dearer.

        A snapshot without the own entry is older than that entry, or does not know it any more.
        """
        if len(self._known) <= SHORT_QUEUE and not self._snapshots.is_writer(self._own):
            return self._others()
        is_new = self._snapshots.read()
        if self._snapshots.must_write(self._own, self._known):
            others = self._others()
            hours = self._used_hours(datetime.now(UTC))
            self._snapshots.write(self._own, others, hours, self._stored_limits)
            return others
        snapshot = self._snapshots.current
        if is_new and snapshot is not None:
            if any(entry.file == self._own.file for entry in snapshot.entries):
                self._known = self._without_own(snapshot.entries)
                self._stored_limits = snapshot.limits
                self._limits = snapshot.limits.quotas()
                self._used = (time.monotonic(), snapshot.used_hours)
            else:
                self._board.keep(self._own)
        return self._known

    def _without_own(self, entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.run_id != self._run.run_id]

    def _remove(self, gone: Left) -> None:
        """Remove the entry of a driver that is gone, and record what it used until its last sign of life."""
        if gone.holder is not None:
            record_usage(self._quick_run.storage, gone.entry, gone.holder.time)
        self._board.delete(gone.entry)

    def _decide(self, entries: Sequence[Entry]) -> Decision:
        now = datetime.now(UTC)
        used = self._used_hours(now)  # which also reads the limits again
        return decide(entries, self._cluster.nodes(), self._limits, used, now)

    def _used_hours(self, now: datetime) -> dict[str, float]:
        if self._used is None or time.monotonic() - self._used[0] > _USAGE_SECONDS:
            storage = self._quick_run.storage
            self._stored_limits = read_limits(storage)
            self._limits = self._stored_limits.quotas()
            self._used = (time.monotonic(), used_hours(storage, now, self._limits.window_hours))
        return self._used[1]

    # -- reporting -----------------------------------------------------------------------------------------------

    def _report(self, decision: Decision) -> None:
        """Record what the run waits for. Event and log get a line when that changes, not at every look."""
        entry = self._own
        place = decision.place(entry.run_id)
        now = time.monotonic()
        if self._reported == place and now - self._reported_at < _REPORT_SECONDS:
            return
        reason = decision.waits_for.get(entry.run_id, "")
        start = decision.estimated_starts.get(entry.run_id)
        is_new = self._reported is None or (place, reason) != (entry.place, entry.waits_for)
        if is_new or _differ(start, entry.estimated_start):
            self._write(place=place, waits_for=reason, estimated_start=start)
        if not is_new:
            return
        self._reported = place
        self._reported_at = now
        expected = "" if start is None else f" Expected to start in {_until(start)}."
        message = f"Place {place} in the queue: waits for {reason}.{expected}"
        self._quick_run.set_state("queued", message)
        self._events.emit(
            Queued(
                message=message, place=place, waits_for=reason, estimated_start=start, waited_seconds=self._seconds()
            )
        )
        self._log(f"{message} It has waited {self._waited()}.")

    def _seconds(self) -> float:
        return max((datetime.now(UTC) - self._own.since).total_seconds(), 0.0)

    def _waited(self) -> str:
        return format_duration(self._seconds())

    def _pause(self, num_entries: int, look: int) -> float:
        """More runs that wait look less often, so that all of them together do not burden the storage.

        The first looks are quick: Ray frees the resources of tasks and workers that have just ended with a delay.
        """
        is_quick = self._run.storage.is_local or num_entries > SHORT_QUEUE
        per_entry = _LOCAL_SECONDS_PER_ENTRY if is_quick else _REMOTE_SECONDS_PER_ENTRY
        pause = min(max(POLL_SECONDS, per_entry * num_entries), _LONGEST_POLL_SECONDS)
        pause = min(pause, _FIRST_POLL_SECONDS * 2.0 ** min(look, 10))
        return pause * random.uniform(0.8, 1.2)  # two runs that withdraw their claims do not meet again


def _as_waiting(entry: Entry) -> Entry:
    return entry.model_copy(update={"state": "waiting", "workers": 0, "nodes": {}, "started": None})


def _differ(start: datetime | None, earlier: datetime | None) -> bool:
    if start is None or earlier is None:
        return start is not earlier
    return abs((start - earlier).total_seconds()) >= _ESTIMATE_CHANGE_SECONDS


def _until(time: datetime) -> str:
    return format_duration(max((time - datetime.now(UTC)).total_seconds(), 0.0))


def user_name() -> str:
    """The name of the user who runs this process, in the characters of an owner."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        return "unknown"
    return re.sub(r"[^A-Za-z0-9._@+-]", "_", name)[:64] or "unknown"
