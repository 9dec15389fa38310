"""The queue's files: its entries, and which of them still have a driver.

A run starts in two steps. It writes that it claims workers, and then reads all entries: it starts if its workers fit
beside every other claim, and otherwise withdraws the claim. Of two claims at the same moment at least one is written
before the other's driver reads, so both start only if both fit. That needs a storage that shows a finished write to
every later listing: a file system, S3, GCS and Azure do; NFS does without attribute caching (`actimeo=0`). Where a
claim is overlooked, the order suffers and nothing else, because Ray gives no resource twice.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ft_service.cluster.queue.entry import Entry, run_of
from ft_service.errors import NewerFormatError, StorageError
from ft_service.runs.folder import LEASE_SECONDS, LeaseHolder, RunFolder
from ft_service.runs.lease import may_be_alive
from ft_service.storage.storage import Storage

QUEUE = "queue"
CLUSTERS = f"{QUEUE}/clusters"
_LIVENESS_SECONDS = 5.0
"""Time between two looks at the lease of an entry's driver."""


@dataclass(frozen=True)
class _Seen:
    """A lease as it was read last."""

    holder: LeaseHolder
    changed_at: float
    read_at: float


@dataclass(frozen=True)
class Left:
    """An entry whose driver is gone, with the last sign of life of that driver."""

    entry: Entry
    holder: LeaseHolder | None


class Board:
    """Reads and writes the entries of one cluster's queue. Raises `StorageError`.

    A driver counts as gone when its run has no lease or that of another driver, when it was a process of this machine
    that has ended, or when it has not renewed its lease for `LEASE_SECONDS` of this process's own clock. Clocks of
    different machines are compared only for leases that are minutes old.
    """

    def __init__(self, storage: Storage, cluster: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self.folder = f"{CLUSTERS}/{cluster}"

    def write(self, entry: Entry) -> None:
        self._storage.write_json(f"{self.folder}/{entry.file}", entry.model_dump(mode="json"))

    def delete(self, entry: Entry) -> None:
        self._storage.delete(f"{self.folder}/{entry.file}")

    def keep(self, own: Entry) -> None:
        """Write `own` again if it is missing: another driver removes it after a pause in which no lease was renewed."""
        if not self._storage.exists(f"{self.folder}/{own.file}"):
            self.write(own)

    def others(self, own: Entry) -> tuple[list[Entry], list[Left]]:
        """The entries of other runs: those with a live driver, and those whose driver is gone.

        Writes `own` again if it is missing, as `keep` does.
        """
        alive: list[Entry] = []
        left: list[Left] = []
        names = self._storage.files(self.folder)
        if own.file not in names:
            self.write(own)
        for name in names:
            if name == own.file or not name.endswith(".json"):
                continue
            entry = read_entry(self._storage, f"{self.folder}/{name}")
            if entry is None:
                continue
            holder = None if run_of(name) == own.run_id else self._holder(entry)
            if holder is None or not self._is_alive(entry, holder):
                self._seen.pop(name, None)
                left.append(Left(entry, holder))
            else:
                alive.append(entry)
        return alive, left

    def _holder(self, entry: Entry) -> LeaseHolder | None:
        """The lease of the entry's driver; None if it has none any more."""
        seen = self._seen.get(entry.file)
        if seen is not None and self._clock() - seen.read_at < _LIVENESS_SECONDS:
            return seen.holder
        holder = RunFolder(self._storage, entry.run_id).lease_holder()
        return holder if holder is not None and holder.token == entry.driver else None

    def _is_alive(self, entry: Entry, holder: LeaseHolder) -> bool:
        now = self._clock()
        seen = self._seen.get(entry.file)
        if seen is None or seen.holder != holder:
            seen = _Seen(holder, now, now)
        elif now - seen.read_at >= _LIVENESS_SECONDS:
            seen = _Seen(holder, seen.changed_at, now)
        self._seen[entry.file] = seen
        return may_be_alive(holder) and now - seen.changed_at < LEASE_SECONDS


def read_entry(storage: Storage, path: str) -> Entry | None:
    """An entry; None if it has left meanwhile, or a newer version wrote it."""
    try:
        return Entry.parse(storage.read_json(path), storage.uri(path))
    except NewerFormatError:
        return None
    except StorageError:
        if storage.exists(path):
            raise
        return None
