"""Data files on object storage: each process that reads one has a copy on its machine until it ends."""

import functools
import tempfile
import threading
from pathlib import Path

from ft_service.errors import DataError
from ft_service.storage.storage import Storage

_copies: dict[str, Path] = {}
_copying = threading.Lock()


def is_remote(path: str) -> bool:
    """Whether the path of a source is on object storage (``s3://``, ``gs://``, ``az://``)."""
    return "://" in path


def missing_error(uri: str) -> DataError | None:
    """What is wrong with the URI of a file that does not exist; None if it does. Raises `StorageError`."""
    storage, name = _place(uri)
    if storage.size(name) is not None:
        return None
    return DataError(f"{uri}: no such file. On object storage name a file; folders are not read there.")


def local_copy(uri: str) -> Path:
    """A copy of the file, made once in a process; its name is that of the URI.

    Raises `DataError` if there is no such file, and `StorageError`.
    """
    if (error := missing_error(uri)) is not None:
        raise error
    storage, name = _place(uri)
    with _copying:
        copy = _copies.get(uri)
        if copy is None or not copy.is_file():
            copy = Path(tempfile.mkdtemp(dir=_folder().name), name)
            storage.download(name, copy)
            _copies[uri] = copy
    return copy


def delete_copies() -> None:
    """Of this process, for one that lives long. Nothing may be reading them."""
    with _copying:
        for copy in _copies.values():
            copy.unlink(missing_ok=True)
            copy.parent.rmdir()
        _copies.clear()


def _place(uri: str) -> tuple[Storage, str]:
    """The folder of a file on object storage, and the file's name."""
    path, mark, options = uri.partition("?")
    folder, _, name = path.rpartition("/")
    return Storage(f"{folder}{mark}{options}"), name


@functools.cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="ft-data-")
