"""What owners may use, and what they have used lately.

    queue/limits.json                                                   the quotas, written by an administrator
    queue/usage/<day>/<owner>~<run>~<driver>~<start>~<worker-seconds>   empty; one for each time that a run had workers

The facts are in the names, so reading the usage takes one listing for each day of the window.
"""

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from ft_service.cluster.queue.board import QUEUE
from ft_service.cluster.queue.entry import DRIVER_CHARACTERS, Entry
from ft_service.cluster.queue.schedule import Limits, Quotas
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

LIMITS_FILE = f"{QUEUE}/limits.json"
USAGE = f"{QUEUE}/usage"
WINDOW_HOURS = 168.0


class OwnerLimits(BaseModel):
    """What one owner may use; null is without limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_runs: int | None = Field(default=None, ge=0, description="Runs that have workers at once.")
    max_gpu_hours: float | None = Field(default=None, ge=0, description="GPU-hours within the window.")


class QueueLimits(StoredFile):
    """The quotas of all owners (limits.json)."""

    window_hours: float = Field(default=WINDOW_HOURS, gt=0, description="Length of the window of GPU-hours.")
    default: OwnerLimits = Field(default_factory=OwnerLimits, description="Of an owner that is not listed.")
    owners: dict[str, OwnerLimits] = Field(default_factory=dict)

    def quotas(self) -> Quotas:
        return Quotas(
            default=_limits(self.default),
            owners={owner: _limits(limits) for owner, limits in self.owners.items()},
            window_hours=self.window_hours,
        )


def _limits(limits: OwnerLimits) -> Limits:
    return Limits(limits.max_runs, limits.max_gpu_hours)


def read_limits(storage: Storage) -> QueueLimits:
    """The quotas; without the file, nobody has one."""
    if not storage.exists(LIMITS_FILE):
        return QueueLimits()
    return QueueLimits.parse(storage.read_json(LIMITS_FILE), storage.uri(LIMITS_FILE))


def write_limits(storage: Storage, limits: QueueLimits) -> None:
    storage.write_json(LIMITS_FILE, limits.model_dump(mode="json"))


def record_usage(storage: Storage, entry: Entry, until: datetime) -> None:
    """Record that the workers of `entry` were in use until then. Writing the same again changes nothing."""
    if entry.started is None or entry.workers == 0 or until <= entry.started:
        return
    seconds = entry.workers * (until - entry.started).total_seconds()
    start = int(entry.started.timestamp())
    driver = entry.driver[:DRIVER_CHARACTERS]
    name = "~".join((entry.owner, entry.run_id, driver, str(start), f"{seconds:.0f}"))
    storage.write_bytes(f"{USAGE}/{until.astimezone(UTC).date()}/{name}", b"")


def used_hours(storage: Storage, now: datetime, window_hours: float = WINDOW_HOURS) -> dict[str, float]:
    """The worker-hours of each owner in runs that ended within the window, counted in whole days."""
    oldest = (now - timedelta(hours=window_hours)).astimezone(UTC).date()
    hours: dict[str, float] = defaultdict(float)
    for day in storage.folders(USAGE):
        if _day(day) < oldest:
            continue
        for name in storage.files(f"{USAGE}/{day}"):
            owner, _, rest = name.partition("~")
            seconds = rest.rpartition("~")[2]
            hours[owner] += float(seconds) / 3600 if seconds.isdigit() else 0.0
    return dict(hours)


def forget_usage(storage: Storage, now: datetime, window_hours: float = WINDOW_HOURS) -> None:
    """Delete the days that no window reaches any more."""
    oldest = (now - timedelta(hours=window_hours)).astimezone(UTC).date()
    for day in storage.folders(USAGE):
        if _day(day) < oldest:
            storage.delete(f"{USAGE}/{day}")


def _day(name: str) -> date:
    try:
        return date.fromisoformat(name)
    except ValueError:
        return date.max  # not ours: neither counted nor deleted
