"""When a job would start and end: what the cluster's queue says of a run that is not in it yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ft_service.cluster.queue.board import CLUSTERS
from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.schedule import Node, could_ever_fit
from ft_service.cluster.queue.view import estimate, read_queue
from ft_service.cluster.room import room_per_worker
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from ft_service.text import counted
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.known_nodes import KnownNodes
from serve.fine_tuning.waiting import in_queue


@dataclass(frozen=True)
class JobForecast:
    """What would happen to a job that was created now."""

    runs_waiting: int
    runs_with_workers: int
    place: int | None
    """Among the waiting runs, from 1; 0: it would start at once. None: the cluster is unknown."""
    waits_for: str
    estimated_start: datetime | None
    estimated_finish: datetime | None
    """By the plan. None: unknown."""
    warning: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For the reply to an estimate."""
        return {
            "runs_waiting": self.runs_waiting,
            "runs_with_workers": self.runs_with_workers,
            **in_queue(self.place, self.waits_for, self.estimated_start),
            "estimated_finish": None if self.estimated_finish is None else int(self.estimated_finish.timestamp()),
        }


class Forecasts:
    """Asks the queue for a job that is not in it. Thread-safe."""

    def __init__(self, storage: Storage, cluster: ClusterNodes | None = None) -> None:
        """`cluster` trains the jobs. None: its nodes are unknown here, because it is not the one that serves.

        Without nodes the start is known only of an empty queue.
        """
        self._storage = storage
        self._cluster = cluster
        self._known = KnownNodes(cluster)

    def of(
        self, run_id: str, spec: RunSpec, seconds: float | None, others: Sequence[Job], now: datetime
    ) -> JobForecast:
        """`seconds` is what the plan expects of the run; `others` are the jobs that have not ended.

        Writes nothing. Raises `StorageError`.
        """
        listed = read_queue(self._storage)
        entries = {one.entry.run_id: one.entry for one in listed}
        coming = [job for job in others if job.state in ("validating_files", "queued") and job.run_id not in entries]
        run = _entry(run_id, spec, seconds, now)
        nodes = self._known.nodes()
        place: int | None = None
        waits_for = ""
        start: datetime | None = None
        if (cluster := self._cluster_id({one.cluster for one in listed})) is not None:
            ahead = [_entry_of(job) for job in coming if job.resolved is not None]
            active = [one.entry for one in listed if one.cluster == cluster]
            forecast = estimate(self._storage, run, [*active, *ahead], nodes, now)
            place = forecast.place
            waits_for = forecast.waits_for
            start = forecast.estimated_start
        return JobForecast(
            runs_waiting=sum(not entry.holds_workers for entry in entries.values()) + len(coming),
            runs_with_workers=sum(entry.holds_workers for entry in entries.values()),
            place=place,
            waits_for=waits_for,
            estimated_start=start,
            estimated_finish=None if start is None or seconds is None else start + timedelta(seconds=seconds),
            warning=self._warning(run, nodes),
        )

    def _cluster_id(self, busy: set[str]) -> str | None:
        """The cluster that trains. Where it is another one than this: the only one that has a queue."""
        if self._cluster is not None:
            return self._cluster.id
        known = busy or set(self._storage.folders(CLUSTERS))
        return known.pop() if len(known) == 1 else None if known else "none yet"

    def _warning(self, run: Entry, nodes: Sequence[Node] | None) -> str | None:
        if nodes is None or self._cluster is None or self._cluster.may_grow_beyond():
            return None
        slots = could_ever_fit(run, nodes)
        if slots >= run.fewest_workers:
            return None
        return (
            f"The run needs {counted(run.fewest_workers, 'worker')}, and the cluster has room for {slots}, also when "
            "it is empty: it cannot start before nodes are added."
        )


def _entry(run_id: str, spec: RunSpec, seconds: float | None, arrival: datetime) -> Entry:
    return Entry(
        run_id=run_id,
        driver="",
        owner=spec.queue.owner or "",
        priority=spec.queue.priority,
        preemptible=spec.queue.preemptible,
        state="waiting",
        arrival=arrival,
        since=arrival,
        worker_counts=spec.worker_counts(),
        worker_resources=room_per_worker(spec.parallel),
        expected_seconds=seconds,
    )


def _entry_of(job: Job) -> Entry:
    """Of a job that will enter the queue."""
    resolved: Mapping[str, Any] = job.resolved or {}
    return _entry(job.run_id, RunSpec.model_validate(resolved["spec"]), resolved.get("seconds"), job.created)
