"""An entry of the queue: one run that wants workers or has them.

    queue/clusters/<cluster>/<run id>~<driver>.json

Only the driver named in it writes an entry, so no two writers ever race for one file. An entry counts while its driver
holds the lease of the run (`ft_service.runs.lease`).
"""

from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field

from ft_service.spec.schema import Priority
from ft_service.storage.formats import StoredFile

PRIORITIES: dict[Priority, int] = {"low": 0, "normal": 1, "high": 2}
"""A larger number goes first."""

EntryState = Literal["waiting", "claiming", "running", "leaving"]
"""waiting: has no workers; claiming: has announced that it takes them, and they may not be placed yet; running: its
workers are placed; leaving: saves a checkpoint, for a run of higher priority."""

DRIVER_CHARACTERS = 8


class Entry(StoredFile):
    """A run in the queue."""

    run_id: str
    driver: str = Field(description="Token of the driver's lease on the run.")
    owner: str
    priority: Priority
    preemptible: bool
    state: EntryState
    arrival: datetime = Field(description="Its turn among equals. Never before that of an entry that was there first.")
    since: datetime = Field(description="When it entered the queue or returned to it, by the clock of its driver.")
    worker_counts: list[int] = Field(description="Allowed numbers of workers, largest first.")
    worker_resources: dict[str, float] = Field(description="What Ray reserves for each worker.")
    workers: int = Field(default=0, description="Workers that it claims or has.")
    nodes: dict[str, int] = Field(default_factory=dict, description="Node -> its workers there, once they are placed.")
    started: datetime | None = Field(default=None, description="Since when it has workers.")
    expected_seconds: float | None = Field(default=None, description="What the training is expected to take.")
    expected_end: datetime | None = Field(default=None, description="From measured steps; before those, from the plan.")
    place: int | None = Field(default=None, description="Place among the waiting runs, from 1.")
    waits_for: str = ""
    estimated_start: datetime | None = None

    @property
    def file(self) -> str:
        """Name of its file."""
        return file_name(self.run_id, self.driver)

    @property
    def holds_workers(self) -> bool:
        return self.state != "waiting"

    @property
    def rank(self) -> int:
        return PRIORITIES[self.priority]

    @property
    def fewest_workers(self) -> int:
        return self.worker_counts[-1]

    @property
    def by_arrival(self) -> tuple[datetime, str, str]:
        """Order of arrival."""
        return self.arrival, self.run_id, self.driver

    def ends(self, now: datetime) -> datetime | None:
        """When its workers are expected to be free; None: unknown."""
        if self.state == "leaving":
            return now
        if self.expected_end is not None:
            return max(self.expected_end, now)
        if self.started is None or self.expected_seconds is None:
            return None
        return max(self.started + timedelta(seconds=self.expected_seconds), now)

    def worker_hours(self, now: datetime) -> float:
        """Hours of its workers until now. A worker has one GPU, so of a GPU run these are GPU-hours."""
        if self.started is None or not self.holds_workers:
            return 0.0
        return self.workers * max((now - self.started).total_seconds(), 0.0) / 3600


def file_name(run_id: str, driver: str) -> str:
    return f"{run_id}~{driver[:DRIVER_CHARACTERS]}.json"


def run_of(file: str) -> str:
    """The run that a file of the queue belongs to."""
    return file.rpartition("~")[0]
