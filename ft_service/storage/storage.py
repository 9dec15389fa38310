"""One root that all machines share: a folder, NFS, or a URI of S3, Google Cloud Storage or Azure.

Writes are atomic: a file or a folder exists completely or not at all. On a file system that is a rename. An object
store shows only complete objects, so there a folder's *marker* file, named by the caller, is written last.

Calls are retried while the storage does not answer, see `ft_service.storage.retry`. A folder that was there when it was
opened, and is not there now, does not answer: it is neither taken for an empty one nor made again.
"""

import functools
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from pyarrow import fs

from ft_service.errors import StorageError, UnreachableError
from ft_service.storage.failures import STORE_ERRORS, storage_error
from ft_service.storage.object_store import ObjectStore, Version
from ft_service.storage.retry import Retries
from ft_service.storage.timing import timed

_DEFAULT_CACHE = Path("~/.cache/ft_service")

P = ParamSpec("P")
T = TypeVar("T")


def _retried(method: Callable[Concatenate["Storage", P], T]) -> Callable[Concatenate["Storage", P], T]:
    """Retry a method while the storage does not answer. The method must be safe to call again."""

    @functools.wraps(method)
    def retrying(self: "Storage", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.retry(lambda: timed(method.__name__, lambda: method(self, *args, **kwargs)))

    return retrying


@dataclass(frozen=True)
class StoredObject:
    """A file on storage. Hard links to the same bytes have the same `identity`."""

    path: str
    size: int
    """Bytes."""
    identity: str


class Storage:
    """Files under one root, by relative POSIX path (``runs/r1/plan.json``). Picklable.

    Every method raises `StorageError` when the root cannot be read or written. When the same call may succeed later,
    it is retried for `retry_seconds`, with one notice on stderr, before it raises `UnreachableError`. Only a stream
    (`writing`) fails at once, because the bytes written so far are lost; to repeat all of them, see `retry`.
    """

    def __init__(self, root: str, retry_seconds: float = 0.0) -> None:
        self.root = root
        self.retry_seconds = retry_seconds
        self._retries = Retries(f"storage = {root!r}")
        self._fs = fs.LocalFileSystem()
        self._objects: ObjectStore | None = None
        self._was_there = False
        if "://" in root:
            self._objects = self.retry(self._open)  # a URI without a region makes it ask the bucket
            self._base = self._objects.place
        else:
            self._base = str(Path(root).expanduser().absolute())
        self._was_there = self.is_local and os.path.isdir(self._base)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, float]]:
        return Storage, (self.root, self.retry_seconds)

    def without_retries(self) -> "Storage":
        """The same storage, where every call fails at once, for callers that must not block."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, retry_seconds=0.0)
        return other

    def retry(self, function: Callable[[], T], clock: Callable[[], float] | None = None) -> T:
        """Call `function`, again while it raises `UnreachableError`, until `retry_seconds` after its first failure.

        Pass a `clock` that shows several processes the same time if they must give up together. A call within another
        one, in the same thread, is not retried, because the outer one is. An object store's client itself repeats a
        request for some seconds, and gives up after a minute if the server accepts it and never answers.
        """
        return self._retries.call(function, self.retry_seconds, clock)

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine's file system, which includes NFS."""
        return self._objects is None

    def uri(self, path: str) -> str:
        """Where `path` is: a local path, or a URI with the options of the root's (``?region=...``)."""
        if self.is_local:
            return f"{self._base}/{path}"
        place, mark, options = self.root.partition("?")
        return f"{place.rstrip('/')}/{path}{mark}{options}"

    def arrow(self, path: str) -> tuple[fs.FileSystem | None, str]:
        """`path` for a library that writes through pyarrow: its file system and the path there; None for a folder."""
        if self._objects is None:
            return None, self.uri(path)
        return self._objects.arrow(), f"{self._base}/{path}"

    def check_writable(self) -> None:
        """Write and delete a probe file. Raises `StorageError` now instead of after hours of training."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    # -- reading ---------------------------------------------------------------------------------------------------

    @_retried
    def exists(self, path: str) -> bool:
        if self._objects is None:
            return self._info(path).type != fs.FileType.NotFound
        with self._raising(f"{self.uri(path)}: cannot be looked up"):
            return self._objects.size(self._key(path)) is not None or self._objects.has_folder(path)

    @_retried
    def read_bytes(self, path: str) -> bytes:
        full = self._full(path)
        with self._raising(f"{self.uri(path)}: cannot be read"):
            if self._objects is not None:
                return self._objects.read(path)
            with self._fs.open_input_file(full) as stream:
                content: bytes = stream.read()
        return content

    @_retried
    def read_versioned(self, path: str) -> tuple[bytes, Version | None] | None:
        """A file with what `write_if` needs to replace it; None if there is none. A file system has no versions."""
        if self._objects is None:
            return (self.read_bytes(path), None) if self.exists(path) else None
        with self._raising(f"{self.uri(path)}: cannot be read"):
            try:
                return self._objects.read_versioned(self._key(path))
            except FileNotFoundError:
                return None

    @_retried
    def size(self, path: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        if self._objects is not None:
            with self._raising(f"{self.uri(path)}: cannot be looked up"):
                return self._objects.size(self._key(path))
        info = self._info(path)
        return info.size if info.type == fs.FileType.File else None

    @_retried
    def read_range(self, path: str, start: int, nbytes: int) -> bytes:
        """`nbytes` of a file from byte `start` on. Raises `StorageError` if the file is shorter."""
        full = self._full(path)
        with self._raising(f"{self.uri(path)}: cannot be read"):
            if self._objects is not None:
                content = self._objects.read_range(path, start, nbytes)
            else:
                with self._fs.open_input_file(full) as stream:
                    content = stream.read_at(nbytes, start)
        if len(content) != nbytes:
            raise StorageError(f"{self.uri(path)}: is too short.")
        return content

    @_retried
    def download(self, path: str, target: Path) -> None:
        """Copy a file to `target` on this machine, in blocks. `target` may be left in part if that fails."""
        full = self._full(path)
        with self._raising(f"{self.uri(path)}: cannot be read"):
            if self._objects is not None:
                self._objects.download([(path, target)])
            else:
                shutil.copyfile(full, target)

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.uri(path)}: is damaged, not JSON ({error}).") from None

    @_retried
    def folders(self, path: str) -> list[str]:
        """Names of the folders directly in `path`, sorted. Names that start with a dot are unfinished, and left out."""
        return [name for name in self._names(path, fs.FileType.Directory) if not name.startswith(".")]

    @_retried
    def files(self, path: str) -> list[str]:
        """Names of the files directly in `path`, sorted; empty if the folder does not exist."""
        return self._names(path, fs.FileType.File)

    @_retried
    def tree(self, path: str = "") -> list[StoredObject]:
        """Every file below `path`, at any depth, sorted by path. A file deleted meanwhile is left out."""
        full = self._full(path)
        with self._raising(f"{self.uri(path)}: cannot be listed"):
            if self._objects is None:
                found = list(self._local_tree(Path(full)))
            else:
                found = [StoredObject(each.path, each.size, each.path) for each in self._objects.tree(path)]
        return sorted(found, key=lambda file: file.path)

    @_retried
    def local_folder(self, path: str, cache: Path | None = None) -> Path:
        """A local folder with the content of `path`: the folder itself, or a download of it.

        A download is kept under `cache` (default ``~/.cache/ft_service``). Use this only for content-addressed folders,
        which never become stale. Do not cache both a folder and one inside it: the cached inner folder would pass
        for the complete outer one.
        """
        full = self._full(path)
        if self._objects is None:
            return Path(full)
        cache = cache or _DEFAULT_CACHE.expanduser()
        target = cache / self._base / path
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
        try:
            files = [each.path for each in self._objects.tree(path)]
            if not files:
                raise FileNotFoundError("no such folder")
            self._objects.download((file, partial / file.removeprefix(f"{path}/")) for file in files)
            partial.rename(target)
        except STORE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.exists():  # otherwise another process of this machine has fetched it
                raise storage_error(f"{self.uri(path)}: cannot be fetched", error) from None
        return target

    # -- writing ---------------------------------------------------------------------------------------------------

    @_retried
    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a whole file. A reader sees either the old or the new content."""
        objects, key = self._objects, self._key(path)
        if objects is None:
            with self.writing(path) as stream:
                stream.write(content)
            return
        with self._writing_raises(path):
            _uninterrupted(lambda: objects.write(key, content))

    @_retried
    def write_if(self, path: str, content: bytes, version: Version | None) -> bool:
        """Write a file unless another process has written it since `read_versioned` returned `version`.

        Returns whether it was written. With None for `version` no file may be there. `content` must differ from what
        others write. A file system has no such condition and writes in any case: read the file again after a while to
        see who wrote last.
        """
        if self._objects is None:
            self.write_bytes(path, content)
            return True
        with self._writing_raises(path):
            return self._objects.write_if(self._key(path), content, version)

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A stream into a new file. The file exists, complete, once the block ends; not if the block fails.

        A failed stream is not retried, because the bytes written so far are lost. A caller that can write all of them
        again uses `retry`.
        """
        full = self._full(path)
        self._check_is_there()
        with self._writing_raises(path):
            if self._objects is not None:
                with self._objects.writing(path) as stream:
                    yield stream
                return
            self._fs.create_dir(str(PurePosixPath(full).parent), recursive=True)
            partial = Path(f"{full}.{uuid.uuid4().hex}.partial")
            try:
                with partial.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, full)
                self._was_there = True
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @_retried
    def append_line(self, path: str, line: str) -> None:
        """Add a line to a log. An object store rewrites the whole log: use one writer there, and buffer lines."""
        if not self.is_local:
            earlier = self.read_bytes(path) if self.exists(path) else b""
            self.write_bytes(path, earlier + line.encode() + b"\n")
            return
        full = Path(self._full(path))
        self._check_is_there()
        with self._writing_raises(path):
            full.parent.mkdir(parents=True, exist_ok=True)
            _append(full, line.encode() + b"\n")

    @_retried
    def put_folder(self, source: Path, path: str, marker: str) -> None:
        """Publish the folder `source` as `path`, atomically. An existing complete folder is not changed.

        `marker` is the file whose presence means that the folder is complete.
        """
        if self._is_complete(path, marker):
            return
        full = self._full(path)
        try:
            if self._objects is None:
                target = Path(full)
                partial = target.parent / f".{target.name}-{uuid.uuid4().hex}"
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copytree(source, partial)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                return
            files = [(file, f"{path}/{file.relative_to(source).as_posix()}") for file in _files(source)]
            self._objects.upload(pair for pair in files if pair[1] != f"{path}/{marker}")
            self._objects.upload([(source / marker, f"{path}/{marker}")])
        except STORE_ERRORS as error:
            if not self._is_complete(path, marker):  # otherwise another writer has published the same content
                raise self._write_error(path, error) from None

    @_retried
    def publish_within(
        self, source: str, names: Iterable[str], path: str, added: Mapping[str, bytes], marker: str
    ) -> None:
        """Publish the files `names` of the folder `source`, and the files `added`, as the folder `path`, atomically.

        No bytes pass through this machine: a file system makes hard links, an object store copies on its side.
        `marker`, one of `added`, means that the folder is complete; a complete folder is not changed.
        """
        if self._is_complete(path, marker):
            return
        if self.is_local:
            target = PurePosixPath(path)
            destination = str(target.parent / f".{target.name}-{uuid.uuid4().hex}")
        else:
            destination = path
        try:
            if self.is_local:
                self._fs.create_dir(self._full(destination), recursive=True)
            for name in names:
                self._copy(f"{source}/{name}", f"{destination}/{name}")
            for name in sorted(added, key=lambda name: name == marker):
                self.write_bytes(f"{destination}/{name}", added[name])
            if self.is_local:
                Path(self._full(destination)).rename(self._full(path))
        except STORE_ERRORS as error:
            if not self._is_complete(path, marker):  # otherwise another writer has published the same content
                raise self._write_error(path, error) from None
        finally:
            if self.is_local:
                shutil.rmtree(self._full(destination), ignore_errors=True)

    @_retried
    def move(self, source: str, path: str) -> None:
        """Rename a file within the storage, in place of a file that is there. An object store copies on its side."""
        full = self._full(path)
        with self._raising(f"{self.uri(source)}: cannot be moved to {path}"):
            if self._objects is None:
                self._check_is_there()
                Path(full).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._full(source), full)
            else:
                self._objects.copy(self._key(source), self._key(path))
                self._objects.delete(self._key(source))

    @_retried
    def delete(self, path: str) -> None:
        """Delete a file or a folder, if it exists."""
        if self._objects is not None:
            with self._raising(f"{self.uri(path)}: cannot be deleted"):
                self._objects.delete(self._key(path))
            return
        info = self._info(path)
        with self._raising(f"{self.uri(path)}: cannot be deleted"):
            if info.type == fs.FileType.Directory:
                self._fs.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self._fs.delete_file(info.path)

    @_retried
    def delete_folder(self, path: str, marker: str) -> None:
        """Delete a folder that has a marker file, such that nobody ever sees it complete with files missing.

        A file system renames it to a hidden name first; on an object store the marker goes first.
        """
        if not self.is_local:
            self.delete(f"{path}/{marker}")
            self.delete(path)
            return
        source = Path(self._full(path))
        hidden = source.with_name(f".{source.name}-{uuid.uuid4().hex}")
        with self._raising(f"{self.uri(path)}: cannot be deleted"):
            try:
                source.rename(hidden)
            except FileNotFoundError:
                return
            shutil.rmtree(hidden)

    @_retried
    def delete_if_empty(self, path: str) -> None:
        """Delete a folder that contains no file. A folder with a file is kept."""
        if not self.tree(path):
            self.delete(path)

    def delete_local_copy(self, path: str) -> None:
        """Delete this machine's download of `path`, if `local_folder` has made one."""
        if not self.is_local:
            shutil.rmtree(_DEFAULT_CACHE.expanduser() / self._base / path, ignore_errors=True)

    # -- internals -------------------------------------------------------------------------------------------------

    def _open(self) -> ObjectStore:
        with self._raising(f"storage = {self.root!r}: does not answer"):
            return ObjectStore(self.root)

    def _key(self, path: str) -> str:
        """`path` itself, once it is known to be inside the root."""
        self._full(path)
        return path

    def _full(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise StorageError(f"{path!r}: is outside the storage root. Use a path below {self.root!r}.")
        return f"{self._base}/{path}" if path else self._base

    def _info(self, path: str) -> fs.FileInfo:
        with self._raising(f"storage = {self.root!r}: does not answer"):
            info = self._fs.get_file_info(self._full(path))
        if info.type == fs.FileType.NotFound:
            self._check_is_there()
        return info

    def _is_complete(self, path: str, marker: str) -> bool:
        return self.size(f"{path}/{marker}") is not None

    def _check_is_there(self) -> None:
        """Raise `UnreachableError` if the root is a folder that has gone, as a file system does that is unmounted."""
        if self._was_there and not os.path.isdir(self._base):
            raise UnreachableError(f"storage = {self.root!r}: the folder is gone. Check that it is mounted.")

    def _names(self, path: str, kind: fs.FileType) -> list[str]:
        if self._objects is not None:
            with self._raising(f"{self.uri(path)}: cannot be listed"):
                files, folders = self._objects.names(self._key(path))
            return sorted(files if kind == fs.FileType.File else folders)
        selector = fs.FileSelector(self._full(path), allow_not_found=True)
        with self._raising(f"{self.uri(path)}: cannot be listed"):
            try:
                infos = self._fs.get_file_info(selector)
            except FileNotFoundError:  # another process deleted the folder after pyarrow had found it
                infos = []
        if not infos:
            self._check_is_there()
        return sorted(info.base_name for info in infos if info.type == kind)

    def _local_tree(self, folder: Path) -> Iterator[StoredObject]:
        root = Path(self._base)
        for place, _, names in os.walk(folder):
            for name in names:
                file = Path(place, name)
                with suppress(FileNotFoundError):
                    stat = file.lstat()
                    identity = f"{stat.st_dev}:{stat.st_ino}"
                    yield StoredObject(file.relative_to(root).as_posix(), stat.st_size, identity)

    @contextmanager
    def _raising(self, problem: str) -> Iterator[None]:
        try:
            yield
        except STORE_ERRORS as error:
            self._check_is_there()
            raise storage_error(problem, error) from None

    @contextmanager
    def _writing_raises(self, path: str) -> Iterator[None]:
        try:
            yield
        except STORE_ERRORS as error:
            raise self._write_error(path, error) from None

    def _write_error(self, path: str, error: Exception) -> StorageError:
        self._check_is_there()
        problem = f"storage = {self.root!r}: cannot write {path}"
        return storage_error(problem, error, "Check that it exists, is writable and not full.")

    def _copy(self, source: str, path: str) -> None:
        """Link or copy a file within the storage."""
        if self._objects is not None:
            self._objects.copy(source, path)
            return
        try:
            os.link(self._full(source), self._full(path))
        except OSError:  # some file systems have no hard links
            shutil.copyfile(self._full(source), self._full(path))


def _append(file: Path, line: bytes) -> None:
    """Add the whole line or nothing. Starts a new line after an incomplete one left by a process that died."""
    with file.open("ab+", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        if before:
            stream.seek(before - 1)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        written = 0
        try:
            while written < len(line):
                written += stream.write(line[written:]) or 0
        except OSError:
            with suppress(OSError):
                if os.fstat(stream.fileno()).st_size == before + written:  # otherwise another writer has appended since
                    stream.truncate(before)
            raise


def _uninterrupted(function: Callable[[], None]) -> None:
    """Run the function to its end, even if a signal handler raises meanwhile.

    Signal handlers run only in the main thread, where an exception in the middle would close the stream and so make an
    object of half the content.
    """
    if threading.current_thread() is not threading.main_thread():
        function()
        return
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, name="writing")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
