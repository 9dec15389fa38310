"""One root that every machine sees: a folder, NFS, or an ``s3://`` / ``gs://`` URI. Nothing else is shared.

Writes are atomic: a file or a folder exists completely or not at all. On a file system that is a rename; an object
store shows an object only once it is whole, so there a folder's *marker* file, named by the caller, is written last.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow
from pyarrow import fs

from ft_service.errors import StorageError

_COPY_CHUNK_BYTES = 16 * 1024 * 1024


class Storage:
    """Files under one root, by relative POSIX path (``runs/r1/plan.json``). Picklable: only the root travels.

    Every method raises `StorageError` when the root cannot be reached or written.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            if "://" in root:
                self._fs, self._base = fs.FileSystem.from_uri(root)
            else:
                self._fs, self._base = fs.LocalFileSystem(), str(Path(root).expanduser().absolute())
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(
                f"storage = {root!r}: not a usable root ({error}). Use a folder, s3:// or gs://."
            ) from None

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.root,)

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

    def exists(self, path: str) -> bool:
        return self._info(path).type != fs.FileType.NotFound

    def read_bytes(self, path: str) -> bytes:
        try:
            with self._fs.open_input_file(self._full(path)) as stream:
                return stream.read()
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"{self.uri(path)}: cannot be read ({error}).") from None

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        info = self._info(path)
        return info.size if info.type == fs.FileType.File else None

    def read_range(self, path: str, start: int, nbytes: int) -> bytes:
        """`nbytes` of a file from byte `start` on; raises `StorageError` if it ends before."""
        try:
            with self._fs.open_input_file(self._full(path)) as stream:
                content: bytes = stream.read_at(nbytes, start)
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"{self.uri(path)}: cannot be read ({error}).") from None
        if len(content) != nbytes:
            raise StorageError(f"{self.uri(path)}: ends too early.")
        return content

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.uri(path)}: damaged, not JSON ({error}).") from None

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly in `path`, sorted; those that start with a dot are unfinished and left out."""
        selector = fs.FileSelector(self._full(path), allow_not_found=True)
        try:
            infos = self._fs.get_file_info(selector)
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"{self.uri(path)}: cannot be listed ({error}).") from None
        names = (info.base_name for info in infos if info.type == fs.FileType.Directory)
        return sorted(name for name in names if not name.startswith("."))

    def local_folder(self, path: str, cache: Path | None = None) -> Path:
        """A folder of this machine that holds `path`: the folder itself, or a download of it.

        A download lands under `cache` (default ``~/.cache/ft_service``) and is kept: what is fetched this way is
        content-addressed, so it never goes stale.
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
                raise StorageError(f"{self.uri(path)}: cannot be fetched ({error}).") from None
        return target

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a file whole; a reader sees the old content or the new one."""
        if self.is_local:
            with self.writing(path) as stream:
                stream.write(content)
            return
        full = self._full(path)
        try:
            self._fs.create_dir(str(PurePosixPath(full).parent), recursive=True)
            with self._fs.open_output_stream(full) as stream:
                stream.write(content)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._not_written(path, error) from None

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A stream into a new file, which is there, and whole, once the block has ended; not if the block fails."""
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
                    partial.unlink(missing_ok=True)
                return
            try:
                with self._fs.open_output_stream(full) as stream:
                    yield cast(BinaryIO, stream)
            except BaseException:
                # Closing has made an object of what was written so far; pyarrow has no way to abort.
                self.delete(path)
                raise
        except (OSError, pyarrow.ArrowException) as error:
            raise self._not_written(path, error) from None

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def append_line(self, path: str, line: str) -> None:
        """Add a line to a log. On an object store the log is rewritten, so keep such logs small or buffered."""
        if not self.is_local:
            earlier = self.read_bytes(path) if self.exists(path) else b""
            self.write_bytes(path, earlier + line.encode() + b"\n")
            return
        full = Path(self._full(path))
        try:
            full.parent.mkdir(parents=True, exist_ok=True)
            with full.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise self._not_written(path, error) from None

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

    def delete(self, path: str) -> None:
        """Remove a file or a folder; nothing happens if it is not there."""
        info = self._info(path)
        if info.type == fs.FileType.Directory:
            self._fs.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self._fs.delete_file(info.path)

    # -- internals -------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise StorageError(f"{path!r}: leaves the storage root. Use a path below {self.root!r}.")
        return f"{self._base}/{path}" if path else self._base

    def _info(self, path: str) -> fs.FileInfo:
        try:
            return self._fs.get_file_info(self._full(path))
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"storage = {self.root!r}: does not answer ({error}).") from None

    def _not_written(self, path: str, error: Exception) -> StorageError:
        return StorageError(
            f"storage = {self.root!r}: cannot write {path} ({error}). Check that it exists, is writable and not full."
        )

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


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
