"""One root that every machine sees: a folder, NFS, or an ``s3://`` / ``gs://`` URI. Nothing else is shared.

Writes are atomic: a file or a folder exists completely or not at all. On a file system that is a rename; an object
store shows an object only once it is whole, so there a folder's *marker* file, named by the caller, is written last.

A storage that does not answer is asked again for as long as the one who opened it has patience. What waiting cannot
mend (no such folder or bucket, no right, no space) is told at once.
"""

import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast

import pyarrow
from pyarrow import fs

from ft_service.errors import StorageError, UnreachableError

RUN_PATIENCE_SECONDS = 300.0
"""Of a run's driver and workers: what is away for a few minutes ends no run."""

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
_COPY_CHUNK_BYTES = 16 * 1024 * 1024

# No such thing, no right, no space, or no such operation.
_PERMANENT = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.ENOSYS,
}
# What pyarrow says of an object store has no error number. Of the 4xx, 408 and 429 ask to come again.
_PERMANENT_TEXT = re.compile(
    r"AWS Error (NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|ACCESS_DENIED|INVALID_\w+|INCOMPLETE_SIGNATURE|"
    r"SIGNATURE_DOES_NOT_MATCH|MISSING_\w+|UNRECOGNIZED_CLIENT|OPT_IN_REQUIRED|VALIDATION)"
    r"|HTTP status (?!408|429)[34]\d\d|Bucket '[^']*' not found|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND"
)

P = ParamSpec("P")
T = TypeVar("T")


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later. What is not plainly permanent may."""
    if not isinstance(error, OSError):
        return False
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    # Errors of a whole folder (shutil.Error) have the numbers of its files in their text alone.
    numbers = [error.errno] if error.errno else [int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))]
    if numbers:
        return not _PERMANENT.intersection(numbers)
    return _PERMANENT_TEXT.search(str(error)) is None


def _patient(method: Callable[Concatenate["Storage", P], T]) -> Callable[Concatenate["Storage", P], T]:
    """Make a method wait for a storage that does not answer. It must bear being called again."""

    @functools.wraps(method)
    def patiently(self: "Storage", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.patiently(lambda: method(self, *args, **kwargs))

    return patiently


class Storage:
    """Files under one root, by relative POSIX path (``runs/r1/plan.json``). Picklable: root and patience travel.

    Every method raises `StorageError` when the root cannot be read or written; it is an `UnreachableError` if that may
    pass. Then the storage is asked again for `patience` seconds first, which is told once on stderr. Only a stream
    (`writing`) is given up at once, since its bytes are gone: see `patiently`.
    """

    def __init__(self, root: str, patience: float = 0.0) -> None:
        self.root = root
        self.patience = patience
        self._waiting = _Waiting()
        self._fs, self._base = self.patiently(self._open)  # without a region in its URI, a bucket is asked for it

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, float]]:
        return Storage, (self.root, self.patience)

    def without_patience(self) -> "Storage":
        """The same storage for those who have something better to do than to wait for it."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, patience=0.0)
        return other

    def patiently(self, do: Callable[[], T], clock: Callable[[], float] | None = None) -> T:
        """Call `do`, and again while it raises `UnreachableError`, until `patience` seconds after its first failure.

        Processes that must give up together pass a `clock` that shows all of them the same. Within another such call
        of the same thread nothing waits: the outer one does. Object stores are asked several times by pyarrow itself,
        which takes up to two minutes for a server that accepts connections and says nothing.
        """
        if self.patience <= 0 or self._waiting.is_nested():
            return do()
        clock = clock or time.monotonic
        failed_at: float | None = None
        pause = _FIRST_PAUSE_SECONDS
        with self._waiting.nesting():
            while True:
                try:
                    result = do()
                except UnreachableError as error:
                    now = clock()
                    if failed_at is None:
                        failed_at = now
                        self._waiting.begin(f"{error} Waiting up to {self.patience:.0f} s for it.")
                    left = failed_at + self.patience - now
                    if left <= 0:
                        self._waiting.end("")
                        raise UnreachableError(f"{error} It was waited for {now - failed_at:.0f} s.") from None
                    time.sleep(min(pause, left))
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                except BaseException:
                    if failed_at is not None:
                        self._waiting.end("")
                    raise
                else:
                    if failed_at is not None:
                        seconds = clock() - failed_at
                        self._waiting.end(f"storage = {self.root!r}: answers again after {seconds:.0f} s.")
                    return result

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine's file system (NFS included)."""
        return isinstance(self._fs, fs.LocalFileSystem)

    def uri(self, path: str) -> str:
        """What a person can use to find `path`: a local path, or a URI."""
        return f"{self._base}/{path}" if self.is_local else f"{self.root.rstrip('/')}/{path}"

    def check_writable(self) -> None:
        """Raise `StorageError` now rather than after hours of training."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        self.delete(probe)

    # -- reading ---------------------------------------------------------------------------------------------------

    @_patient
    def exists(self, path: str) -> bool:
        return self._info(path).type != fs.FileType.NotFound

    @_patient
    def read_bytes(self, path: str) -> bytes:
        with self._telling(f"{self.uri(path)}: cannot be read"), self._fs.open_input_file(self._full(path)) as stream:
            content: bytes = stream.read()
        return content

    @_patient
    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        info = self._info(path)
        return info.size if info.type == fs.FileType.File else None

    @_patient
    def read_range(self, path: str, start: int, nbytes: int) -> bytes:
        """`nbytes` of a file from byte `start` on; raises `StorageError` if it ends before."""
        with self._telling(f"{self.uri(path)}: cannot be read"), self._fs.open_input_file(self._full(path)) as stream:
            content: bytes = stream.read_at(nbytes, start)
        if len(content) != nbytes:
            raise StorageError(f"{self.uri(path)}: ends too early.")
        return content

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.uri(path)}: damaged, not JSON ({error}).") from None

    @_patient
    def folders(self, path: str) -> list[str]:
        """Names of the folders directly in `path`, sorted; those that start with a dot are unfinished and left out."""
        return [name for name in self._names(path, fs.FileType.Directory) if not name.startswith(".")]

    @_patient
    def files(self, path: str) -> list[str]:
        """Names of the files directly in `path`, sorted; none where there is no such folder."""
        return self._names(path, fs.FileType.File)

    @_patient
    def local_folder(self, path: str, cache: Path | None = None) -> Path:
        """A folder of this machine that holds `path`: the folder itself, or a download of it.

        A download lands under `cache` (default ``~/.cache/ft_service``) and is kept: what is fetched this way is
        content-addressed, so it never goes stale. Of a folder and one inside it only one may be kept in the same
        cache: the inner one would be taken for all of the outer.
        """
        if self.is_local:
            return Path(self._full(path))
        cache = cache or Path("~/.cache/ft_service").expanduser()
        target = cache / self._base / path
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
        try:
            fs.copy_files(self._full(path), str(partial), source_filesystem=self._fs, chunk_size=_COPY_CHUNK_BYTES)
            partial.rename(target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.exists():  # otherwise another process of this machine was first
                raise _failure(f"{self.uri(path)}: cannot be fetched", error) from None
        return target

    # -- writing ---------------------------------------------------------------------------------------------------

    @_patient
    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file whole; a reader sees the old content or the new one."""
        if self.is_local:
            with self.writing(path) as stream:
                stream.write(content)
            return
        full = self._full(path)

        def write() -> None:
            self._fs.create_dir(str(PurePosixPath(full).parent), recursive=True)
            with self._fs.open_output_stream(full) as stream:
                stream.write(content)

        try:
            _undisturbed(write)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._not_written(path, error) from None

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A stream into a new file, which is there, and whole, once the block has ended; not if the block fails.

        What was written is gone when it fails, so it does not wait by itself: whoever can begin anew does
        (`patiently`).
        """
        full = self._full(path)
        try:
            self._fs.create_dir(str(PurePosixPath(full).parent), recursive=True)
            if self.is_local:
                partial = Path(f"{full}.{uuid.uuid4().hex}.partial")
                try:
                    with partial.open("wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(partial, full)
                finally:
                    with suppress(OSError):
                        partial.unlink(missing_ok=True)
                return
            try:
                with self._fs.open_output_stream(full) as stream:
                    yield cast(BinaryIO, stream)
            except BaseException:
                # Closing has made an object of what was written so far; pyarrow has no way to abort.
                with suppress(StorageError):
                    self.without_patience().delete(path)
                raise
        except (OSError, pyarrow.ArrowException) as error:
            raise self._not_written(path, error) from None

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @_patient
    def append_line(self, path: str, line: str) -> None:
        """Add a line to a log. On an object store the log is rewritten: keep it to one writer, and buffered."""
        if not self.is_local:
            earlier = self.read_bytes(path) if self.exists(path) else b""
            self.write_bytes(path, earlier + line.encode() + b"\n")
            return
        full = Path(self._full(path))
        try:
            full.parent.mkdir(parents=True, exist_ok=True)
            _append(full, line.encode() + b"\n")
        except OSError as error:
            raise self._not_written(path, error) from None

    @_patient
    def put_folder(self, source: Path, path: str, marker: str) -> None:
        """Publish the folder `source` as `path`, at once. A folder that is already there stays as it is.

        `marker` is the file whose presence says that the folder is whole.
        """
        if self.exists(f"{path}/{marker}"):
            return
        full = self._full(path)
        try:
            if self.is_local:
                target = Path(full)
                partial = target.parent / f".{target.name}-{uuid.uuid4().hex}"
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copytree(source, partial)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                return
            for file in _files(source):
                if file.name != marker:
                    self._upload(source, file, full)
            self._upload(source, source / marker, full)
        except (OSError, pyarrow.ArrowException) as error:
            if not self.exists(f"{path}/{marker}"):  # otherwise another writer of the same content was first
                raise self._not_written(path, error) from None

    @_patient
    def publish_within(
        self, source: str, names: Iterable[str], path: str, added: Mapping[str, bytes], marker: str
    ) -> None:
        """Publish the files `names` of the folder `source` as the folder `path`, at once, with the files of `added`.

        The bytes stay where they are: a file system links them to their second name, an object store copies them by
        itself. `marker`, one of `added`, says that the folder is whole; a folder that has it stays as it is.
        """
        if self.exists(f"{path}/{marker}"):
            return
        if self.is_local:
            target = PurePosixPath(path)
            place = str(target.parent / f".{target.name}-{uuid.uuid4().hex}")
        else:
            place = path
        try:
            self._fs.create_dir(self._full(place), recursive=True)
            for name in names:
                self._duplicate(self._full(f"{source}/{name}"), self._full(f"{place}/{name}"))
            for name in sorted(added, key=lambda name: name == marker):
                self.write_bytes(f"{place}/{name}", added[name])
            if self.is_local:
                Path(self._full(place)).rename(self._full(path))
        except (OSError, pyarrow.ArrowException) as error:
            if not self.exists(f"{path}/{marker}"):  # otherwise another writer of the same content was first
                raise self._not_written(path, error) from None
        finally:
            if self.is_local:
                shutil.rmtree(self._full(place), ignore_errors=True)

    @_patient
    def delete(self, path: str) -> None:
        """Remove a file or a folder; nothing happens if it is not there."""
        info = self._info(path)
        with self._telling(f"{self.uri(path)}: cannot be deleted"):
            if info.type == fs.FileType.Directory:
                self._fs.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self._fs.delete_file(info.path)

    # -- internals -------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[fs.FileSystem, str]:
        try:
            if "://" in self.root:
                filesystem, base = fs.FileSystem.from_uri(self.root)
                return filesystem, base
            return fs.LocalFileSystem(), str(Path(self.root).expanduser().absolute())
        except (OSError, pyarrow.ArrowException) as error:
            what = f"storage = {self.root!r}: not a usable root"
            raise _failure(what, error, " Use a folder, s3:// or gs://.") from None

    def _full(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise StorageError(f"{path!r}: leaves the storage root. Use a path below {self.root!r}.")
        return f"{self._base}/{path}" if path else self._base

    def _info(self, path: str) -> fs.FileInfo:
        with self._telling(f"storage = {self.root!r}: does not answer"):
            return self._fs.get_file_info(self._full(path))

    def _names(self, path: str, kind: fs.FileType) -> list[str]:
        selector = fs.FileSelector(self._full(path), allow_not_found=True)
        with self._telling(f"{self.uri(path)}: cannot be listed"):
            infos = self._fs.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == kind)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pyarrow.ArrowException) as error:
            raise _failure(what, error) from None

    def _not_written(self, path: str, error: Exception) -> StorageError:
        what = f"storage = {self.root!r}: cannot write {path}"
        return _failure(what, error, " Check that it exists, is writable and not full.")

    def _duplicate(self, source: str, target: str) -> None:
        """The same bytes under a second name, both of them full paths."""
        try:
            if self.is_local:
                os.link(source, target)
            else:
                self._fs.copy_file(source, target)
        except (OSError, pyarrow.ArrowException):
            # Some file systems have no links, and S3 copies nothing above 5 GiB by itself.
            fs.copy_files(
                source,
                target,
                source_filesystem=self._fs,
                destination_filesystem=self._fs,
                chunk_size=_COPY_CHUNK_BYTES,
            )

    def _upload(self, source: Path, file: Path, full: str) -> None:
        target = f"{full}/{file.relative_to(source).as_posix()}"
        fs.copy_files(
            str(file),
            target,
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self._fs,
            chunk_size=_COPY_CHUNK_BYTES,
        )


class _Waiting:
    """Who waits for a storage: told when the first thread of the process begins, and when the last one is through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._local = threading.local()

    def is_nested(self) -> bool:
        return getattr(self._local, "nested", False)

    @contextmanager
    def nesting(self) -> Iterator[None]:
        self._local.nested = True
        try:
            yield
        finally:
            self._local.nested = False

    def begin(self, message: str) -> None:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                print(message, file=sys.stderr, flush=True)

    def end(self, message: str) -> None:
        with self._lock:
            self._threads -= 1
            if message and self._threads == 0:
                print(message, file=sys.stderr, flush=True)


def _failure(what: str, error: Exception, cure: str = "") -> StorageError:
    if is_transient(error):
        return UnreachableError(f"{what} ({error}). Check that it is up and can be reached from here.")
    return StorageError(f"{what} ({error}).{cure}")


def _append(file: Path, line: bytes) -> None:
    """Add a whole line, or nothing. What a process that died left of one is ended first."""
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
                if os.fstat(stream.fileno()).st_size == before + written:  # otherwise another writer came after
                    stream.truncate(before)
            raise


def _undisturbed(do: Callable[[], None]) -> None:
    """Do it whole, even if a signal's handler raises meanwhile.

    Handlers run in the main thread alone; there, closing the stream would make an object of half the content.
    """
    if threading.current_thread() is not threading.main_thread():
        do()
        return
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            do()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, name="writing")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
