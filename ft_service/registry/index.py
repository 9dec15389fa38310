"""The index of what is published: one read lists every record, on a folder and on an object store.

    <storage>/index/<kind>.index       compressed by gzip: a header, then a line for each record: id, tab, JSON
    <storage>/index/changes/<kind>/<time>~<change>~<id>   a change that the index may lack

The folders with their `record.json` are the truth, and looking up an id reads its record. The index is a copy of all
records in one object, for listing.

Neither a file system shared over a network nor an object store offers a lock or a conditional write that works on both,
so two publishers may overwrite each other's index. Nothing is lost by that:

- Before a change, its publisher writes a small object of its own: the announcement. Nobody else writes it.
- After the change, it brings the index up to date with *all* announced changes, and reads it back.
- An announcement is deleted only when it is an hour old and the index agrees with the record. An update that began
  before the announcement has ended by then (it gives up after 15 minutes), and every later one includes the change.
  That is why an update lists the announcements before it reads the index.

A crash between a record and the index leaves the announcement, so the next publisher, or `settle`, completes the index.
`reconcile` finds what was never announced: folders that were copied, or published by version 0.1.0.
"""

import gzip
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Literal

from ft_service.errors import StorageError, UnreachableError
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

INDEX = "index"
Change = Literal["published", "hidden"]

_SETTLED_SECONDS = 3600.0
_LONGEST_UPDATE_SECONDS = 900.0
_TRIES = 5
_SIZE = re.compile(rb'"size": ?(\d+)')
_READERS = 16
"""Records that are read at the same time, for a new index."""


class IndexHeader(StoredFile):
    """The first line of an index."""

    kind: str


class RecordIndex:
    """The index of one kind of record. `read_line` gives the line of an id as its folder is now, None without one."""

    def __init__(self, storage: Storage, kind: str, read_line: Callable[[str], bytes | None]) -> None:
        self._storage = storage
        self._kind = kind
        self._read_line = read_line
        self._path = f"{INDEX}/{kind}.index"
        self._changes = f"{INDEX}/changes/{kind}"
        self._updating = threading.Lock()

    def read(self) -> dict[str, bytes]:
        """Id -> line, of every record: one read. A missing or damaged index is made from the folders, and written."""
        lines = self._read()
        if lines is not None:
            return lines
        lines = self._from_folders()
        if lines:
            with suppress(StorageError):  # a reader without permission to write
                self.settle()
        return lines

    @contextmanager
    def changing(self, record_id: str, change: Change) -> Iterator[None]:
        """Make a record appear or disappear within the block; the index knows it once the block has ended."""
        started = time.monotonic()
        self._announce(record_id, change)
        yield
        if time.monotonic() - started > _LONGEST_UPDATE_SECONDS:
            self._announce(record_id, change)  # the upload took so long that others may take the first one for settled
        self.settle(record_id)

    def settle(self, record_id: str | None = None, other_ids: Collection[str] = ()) -> None:
        """Bring the index up to date with all announced changes, and with the records `other_ids`.

        With `record_id`, until the index that is read back has that record as it is now.
        """
        ids = {*other_ids, record_id} if record_id is not None else set(other_ids)
        with self._updating:  # threads of one process need not compete
            for _ in range(_TRIES):
                changed = self._update(ids)
                if record_id not in changed:
                    return

    def reconcile(self) -> None:
        """Compare the index with the folders, by name, and correct it. For what was not announced."""
        lines = self._read()
        if lines is None:
            self.read()
            return
        names = set(self._storage.folders(f"{self._kind}s"))
        doubtful = {name for name, line in lines.items() if name in names and self._is_doubtful(name, line)}
        self.settle(other_ids=(names ^ set(lines)) | doubtful)

    def _announce(self, record_id: str, change: Change) -> None:
        self._storage.write_bytes(f"{self._changes}/{time.time():.3f}~{change}~{record_id}", b"\n")

    # -- updating --------------------------------------------------------------------------------------------------

    def _update(self, other_ids: Collection[str]) -> set[str]:
        """One update. Returns the ids whose lines it changed."""
        started = time.monotonic()
        changes = self._announced()  # before the index is read
        lines = self._read()
        changed: set[str] = set()
        if lines is None:
            lines = self._from_folders()
            changed.update(lines, other_ids)
        doubtful = {change.record_id for change in changes if not change.agrees_with(lines)}
        # Published and hidden within an hour: the clocks of two machines do not tell which came last.
        kinds = {(change.record_id, change.what) for change in changes}
        doubtful |= {record_id for record_id, what in kinds if what == "hidden" and (record_id, "published") in kinds}
        for record_id, line in self._read_lines({*doubtful, *other_ids}):
            if lines.get(record_id) != line:
                changed.add(record_id)
                if line is None:
                    lines.pop(record_id, None)
                else:
                    lines[record_id] = line
        if changed:
            if time.monotonic() - started > _LONGEST_UPDATE_SECONDS:
                raise StorageError(f"{self._storage.uri(self._path)}: updating it took too long. Try again.")
            self._write(lines)
            return changed
        for change in changes:
            if change.is_old():
                self._storage.delete(f"{self._changes}/{change.name}")
        return set()

    def _announced(self) -> list["_Announcement"]:
        return [_Announcement(name) for name in self._storage.files(self._changes) if name.count("~") == 2]

    def _is_doubtful(self, record_id: str, line: bytes) -> bool:
        """Whether a record may have changed: on a file system its size tells, elsewhere only a known problem."""
        if b'"problem":' in line:
            return True
        if not self._storage.is_local:
            return False
        size = _SIZE.search(line)
        return size is None or self._storage.size(f"{self._kind}s/{record_id}/record.json") != int(size[1])

    def _from_folders(self) -> dict[str, bytes]:
        names = self._storage.folders(f"{self._kind}s")
        return {record_id: line for record_id, line in self._read_lines(names) if line is not None}

    def _read_lines(self, record_ids: Collection[str]) -> Iterable[tuple[str, bytes | None]]:
        if len(record_ids) < 2:
            return [(record_id, self._read_line(record_id)) for record_id in record_ids]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="index") as pool:
            return list(zip(record_ids, pool.map(self._read_line, record_ids), strict=True))

    # -- the object ------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, bytes] | None:
        """Id -> line; None if there is no index, or one that this version cannot read."""
        try:
            content = gzip.decompress(self._storage.read_bytes(self._path))
            header, *lines = content.splitlines()
            IndexHeader.parse(header, self._storage.uri(self._path))
            return dict(self._split(line) for line in lines)
        except UnreachableError:
            raise
        except (StorageError, OSError, EOFError, ValueError):
            return None

    @staticmethod
    def _split(line: bytes) -> tuple[str, bytes]:
        record_id, separator, entry = line.partition(b"\t")
        if not separator:
            raise ValueError("a line without an id")
        return record_id.decode(), entry

    def _write(self, lines: dict[str, bytes]) -> None:
        header = IndexHeader(kind=self._kind).model_dump_json().encode()
        content = b"\n".join([header, *(record_id.encode() + b"\t" + line for record_id, line in lines.items()), b""])
        self._storage.write_bytes(self._path, gzip.compress(content, compresslevel=1, mtime=0))


class _Announcement:
    """An object in the folder of changes; its name says everything."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._time, self.what, self.record_id = name.split("~", 2)

    def agrees_with(self, lines: dict[str, bytes]) -> bool:
        return (self.record_id in lines) == (self.what == "published")

    def is_old(self) -> bool:
        try:
            return time.time() - float(self._time) > _SETTLED_SECONDS
        except ValueError:
            return False
