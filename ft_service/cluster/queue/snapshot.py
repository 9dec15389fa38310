"""What the waiting drivers of a long queue read instead of all its entries.

    queue/snapshots/<cluster>.json    all entries as one waiting driver, the writer, has read them last

A snapshot is only a hint for when to claim workers: a claim counts after its driver has read all entries itself
(`ft_service.cluster.queue.board`). So an old snapshot, or two writers at once, cost time and nothing else, and the file
needs no lock. A driver becomes the writer when the snapshot has not changed for a while, the first in line first.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pydantic import Field

from ft_service.cluster.queue.board import QUEUE
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.usage import QueueLimits
from ft_service.errors import StorageError, UnreachableError
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

SNAPSHOTS = f"{QUEUE}/snapshots"
SHORT_QUEUE = 8
"""Other entries that a waiting driver reads itself, without a snapshot."""
PATIENCE_SECONDS = 90.0
"""A writer looks more often than this. After a longer silence the next in line writes, and after as long again the one
behind it."""
_MOST_TURNS = 3


class Snapshot(StoredFile):
    """The entries of a queue as its writer has read them, and what decides beside them."""

    writer: str = Field(description="Name of the entry whose driver writes it; empty once that has stopped.")
    number: int = Field(description="Grows with each writing.")
    entries: list[Entry]
    used_hours: dict[str, float] = Field(description="Worker-hours of each owner in runs that have ended lately.")
    limits: QueueLimits


class Snapshots:
    """The snapshot of one cluster's queue, as one waiting driver reads and writes it. Raises `StorageError`."""

    def __init__(self, storage: Storage, cluster: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._path = f"{SNAPSHOTS}/{cluster}.json"
        self._clock = clock
        self._current: Snapshot | None = None
        self._changed_at: float | None = None

    def read(self) -> bool:
        """Read it. Returns whether it has changed since this driver read or wrote it last."""
        found = self._stored()
        if self._changed_at is not None and _version(found) == _version(self._current):
            return False
        self._current = found
        self._changed_at = self._clock()
        return True

    @property
    def current(self) -> Snapshot | None:
        """As it was read or written last; None if there is none that can be read."""
        return self._current

    def is_fresh(self) -> bool:
        """Whether somebody has written it lately. True at first sight, whatever its age."""
        silence = self._clock() - (self._changed_at or 0.0)
        return self._current is not None and self._current.writer != "" and silence < PATIENCE_SECONDS

    def is_writer(self, own: Entry) -> bool:
        return self._current is not None and self._current.writer == own.file

    def must_write(self, own: Entry, others: Sequence[Entry]) -> bool:
        """Whether this driver is the writer, or becomes it because nobody writes. Call `read` before."""
        if self.is_writer(own):
            return True
        before = sum(not other.holds_workers and other.by_arrival < own.by_arrival for other in others)
        is_written = self._current is not None and self._current.writer != ""
        turns = min(before + is_written, _MOST_TURNS)
        assert self._changed_at is not None
        return self._clock() - self._changed_at >= turns * PATIENCE_SECONDS

    def write(self, own: Entry, others: Sequence[Entry], used_hours: dict[str, float], limits: QueueLimits) -> None:
        number = 0 if self._current is None else self._current.number
        snapshot = Snapshot(
            writer=own.file, number=number + 1, entries=[own, *others], used_hours=used_hours, limits=limits
        )
        self._write(snapshot)

    def resign(self, own: Entry, entries: Sequence[Entry]) -> None:
        """Let another driver write at once, if `own` is the writer's. `entries` are those of now.

        What fails is noticed by the silence.
        """
        if self._current is not None and self.is_writer(own):
            changes = {"writer": "", "number": self._current.number + 1, "entries": list(entries)}
            with suppress(StorageError):
                self._write(self._current.model_copy(update=changes))

    def _write(self, snapshot: Snapshot) -> None:
        content = snapshot.model_dump(mode="json", exclude_defaults=True)
        self._storage.write_json(self._path, content | {"format": snapshot.format})
        self._current = snapshot
        self._changed_at = self._clock()

    def _stored(self) -> Snapshot | None:
        """None without one, and for one that is damaged or that a newer version wrote: it is written again."""
        try:
            return Snapshot.parse(self._storage.read_bytes(self._path), self._storage.uri(self._path))
        except UnreachableError:
            raise
        except StorageError:
            return None


def _version(snapshot: Snapshot | None) -> tuple[str, int] | None:
    return None if snapshot is None else (snapshot.writer, snapshot.number)
