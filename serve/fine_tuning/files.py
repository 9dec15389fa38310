"""Contents of files on storage.

<storage>/files/content/<sha256>        a content, complete; several files may share it
                incoming/<id>           a content that is still arriving
                parts/<upload>/<part>   parts of an upload
                errors/<file>.jsonl     everything that is wrong with a training file

An interrupted arrival leaves at most a hidden or incoming file, which `leftovers` finds by the time in its name.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ft_service.errors import StorageError
from ft_service.storage.failures import STORE_ERRORS
from ft_service.storage.storage import Storage
from serve.fine_tuning.paging import time_of

CONTENT = "files/content"
INCOMING = "files/incoming"
PARTS = "files/parts"
ERRORS = "files/errors"
BLOCK_BYTES = 2**20
LEFTOVER_SECONDS = 24 * 3600.0
"""An arrival that is older is not going on any more."""
_ID_CHARACTERS = 24

logger = logging.getLogger(__name__)


class Arrival:
    """A file on storage that is being written. It exists once `finish` returns, and never in part.

    Use it from one thread at a time. Every call raises `StorageError` when the storage fails; then nothing is left.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._writing = storage.writing(path)
        self._stream = self._writing.__enter__()

    @property
    def digest(self) -> str:
        """SHA-256 of what was written."""
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()

    def write(self, data: bytes) -> None:
        try:
            self._stream.write(data)
        except STORE_ERRORS as error:
            self._writing.__exit__(type(error), error, None)  # raises `StorageError`
            raise
        self._sha256.update(data)
        self._md5.update(data)
        self.size += len(data)

    def finish(self) -> None:
        self._writing.__exit__(None, None, None)

    def abandon(self) -> None:
        """Leave nothing. Without effect after an error."""
        with suppress(_AbandonedError, StorageError, RuntimeError):
            error = _AbandonedError()
            self._writing.__exit__(_AbandonedError, error, None)


class _AbandonedError(Exception):
    pass


class FileStore:
    """Reads, publishes and deletes contents. Blocking; raises `StorageError`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def arrive(self, name: str) -> Arrival:
        return Arrival(self.storage, f"{INCOMING}/{name}")

    def arrive_part(self, upload: str, part: str) -> Arrival:
        return Arrival(self.storage, f"{PARTS}/{upload}/{part}")

    def publish(self, arrival: Arrival) -> None:
        """Make an arrival the content of its digest. The caller holds the lock of the content's row."""
        target = f"{CONTENT}/{arrival.digest}"
        if self.storage.size(target) == arrival.size:
            self.storage.delete(arrival.path)
        else:
            self.storage.move(arrival.path, target)

    def discard(self, arrival: Arrival) -> None:
        """Delete what arrived and is not wanted. What cannot be deleted now is a leftover."""
        with suppress(StorageError):
            self.storage.delete(arrival.path)

    def join(self, name: str, upload: str, parts: Iterable[tuple[str, int]]) -> Arrival:
        """The parts of an upload, one after another, as a new arrival. `parts` are ids and sizes."""
        arrival = self.arrive(name)
        try:
            for part, size in parts:
                for block in self._blocks(f"{PARTS}/{upload}/{part}", size):
                    arrival.write(block)
            arrival.finish()
        except BaseException:
            arrival.abandon()
            raise
        return arrival

    def delete_part(self, upload: str, part: str) -> None:
        self.storage.delete(f"{PARTS}/{upload}/{part}")

    def delete_parts(self, upload: str) -> None:
        self.storage.delete(f"{PARTS}/{upload}")

    def block(self, digest: str, start: int, size: int) -> bytes:
        """A block of a content of `size` bytes, from byte `start` on."""
        return self.storage.read_range(f"{CONTENT}/{digest}", start, min(BLOCK_BYTES, size - start))

    def _blocks(self, path: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, BLOCK_BYTES):
            yield self.storage.read_range(path, start, min(BLOCK_BYTES, size - start))

    def delete_content(self, digest: str) -> None:
        """The caller holds the lock of the content's row."""
        self.storage.delete(f"{CONTENT}/{digest}")

    @contextmanager
    def local(self, digest: str, size: int) -> Iterator[Path]:
        """The content as a file of this machine: itself, or a copy for as long as the block runs."""
        if self.storage.is_local:
            path = Path(self.storage.uri(f"{CONTENT}/{digest}"))
            if not path.is_file():
                raise StorageError(f"{path}: is missing.")
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="ft-file-") as folder:
            copy = Path(folder, digest)
            self.storage.download(f"{CONTENT}/{digest}", copy)
            found = copy.stat().st_size
            if found != size:
                place = self.storage.uri(f"{CONTENT}/{digest}")
                raise StorageError(f"{place}: is damaged, {found:,} bytes instead of {size:,}. Upload the file again.")
            yield copy

    # -- errors of training files --------------------------------------------------------------------------------------

    def write_errors(self, file_id: str, errors: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(error, ensure_ascii=True) + "\n" for error in errors)
        self.storage.write_bytes(f"{ERRORS}/{file_id}.jsonl", lines.encode())

    def read_errors(self, file_id: str, after: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """At most `limit` errors after number `after`, and whether more follow."""
        path = f"{ERRORS}/{file_id}.jsonl"
        if not self.storage.exists(path):
            return [], False
        lines = self.storage.read_bytes(path).splitlines()
        return [json.loads(line) for line in lines[after : after + limit]], len(lines) > after + limit

    def delete_errors(self, file_id: str) -> None:
        """What cannot be deleted now is deleted with the leftovers."""
        try:
            self.storage.delete(f"{ERRORS}/{file_id}.jsonl")
        except StorageError as error:
            logger.warning("%s: its list of errors is left (%s)", file_id, error)

    # -- what interrupted processes have left --------------------------------------------------------------------------

    def delete_old_arrivals(self, now: float) -> None:
        """Delete arrivals that began long before `now`, in seconds since 1970."""
        for name in self.storage.files(INCOMING):
            if _is_old(name, now):
                self.storage.delete(f"{INCOMING}/{name}")

    def digests(self) -> set[str]:
        """Of the contents on storage."""
        return set(self.storage.files(CONTENT))

    def uploads(self) -> set[str]:
        """Ids of uploads that have parts on storage."""
        return set(self.storage.folders(PARTS))

    def files_with_errors(self) -> set[str]:
        return {name.removesuffix(".jsonl") for name in self.storage.files(ERRORS)}


def _is_old(name: str, now: float) -> bool:
    began = time_of(name.partition("-")[2][:_ID_CHARACTERS])
    return began is not None and began < now - LEFTOVER_SECONDS
