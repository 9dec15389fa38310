"""What the tests of the queue share: entries and nodes, and a cluster that a test changes."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ft_service.cluster.queue.board import Board, read_entry
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.schedule import Node
from ft_service.cluster.queue.turn import Turn
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import Lease
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
GPU = {"CPU": 1.0, "GPU": 1.0}


def entry(run_id: str, size: int | list[int] = 1, arrived: float = 0.0, **changes: Any) -> Entry:
    """A waiting run that entered the queue `arrived` seconds after NOW."""
    counts = size if isinstance(size, list) else [size]
    time = NOW + timedelta(seconds=arrived)
    values: dict[str, Any] = {
        "run_id": run_id,
        "driver": f"{run_id}-driver",
        "owner": "ann",
        "priority": "normal",
        "preemptible": False,
        "state": "waiting",
        "arrival": time,
        "since": time,
        "worker_counts": counts,
        "worker_resources": GPU,
        **changes,
    }
    return Entry(**values)


def running(run_id: str, nodes: dict[str, int], started: float = -3600.0, **changes: Any) -> Entry:
    """A run whose workers were placed `started` seconds after NOW."""
    count = sum(nodes.values())
    values = {
        "state": "running",
        "nodes": nodes,
        "workers": count,
        "started": NOW + timedelta(seconds=started),
        **changes,
    }
    return entry(run_id, count, started, **values)


def node(name: str, gpus: int, free: int | None = None) -> Node:
    """A node with as many CPUs as GPUs."""
    left = gpus if free is None else free
    return Node(name, {"CPU": gpus, "GPU": gpus}, {"CPU": left, "GPU": left})


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@dataclass
class FakeCluster:
    """A cluster as the queue sees it."""

    id: str = "cluster-1"
    living: list[Node] = field(default_factory=lambda: [Node("n", {"CPU": 4.0}, {"CPU": 4.0})])
    is_open: bool = False
    looks: int = 0

    def nodes(self) -> list[Node]:
        self.looks += 1
        return self.living

    def may_grow_beyond(self) -> bool:
        return self.is_open

    def node_name(self, node_id: str) -> str:
        return node_id


class Gave(Exception):
    """A test has looked long enough."""


class World:
    """Drivers that share a storage and a cluster; all of them are this process."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.storage = Storage(str(root))
        self.cluster = FakeCluster()
        self.logged: list[str] = []
        self._stack = stack

    def driver(self, run_id: str, workers: Any = 1, seconds: float | None = None, **queue: Any) -> Turn:
        """A driver that holds the lease of its run, and has not entered the queue."""
        spec = RunSpec.model_validate(
            {
                "name": "r",
                "model": {"base": "b"},
                "data": {"train": [{"path": "p"}]},
                "train": {"global_batch_size": 24},
                "parallel": {"use_gpu": False, "num_workers": workers},
                "queue": {"owner": "ann", **queue},
                "storage": self.storage.root,
            }
        )
        run = RunFolder(self.storage, run_id)
        lease = self._stack.enter_context(Lease(run, self.logged.append))
        return Turn(run, spec, {"CPU": 1.0}, lease.token, self.cluster, self.logged.append, lambda count: seconds)

    def entries(self) -> dict[str, Entry]:
        folder = Board(self.storage, self.cluster.id).folder
        found = [read_entry(self.storage, f"{folder}/{name}") for name in self.storage.files(folder)]
        return {entry.run_id: entry for entry in found if entry is not None}


def never() -> None:
    raise AssertionError("the run waits")


def looks(count: int) -> Callable[[], None]:
    """A check that gives up after so many looks."""
    left = [count]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Gave

    return check
