"""A folder of an object store: S3, Google Cloud Storage or Azure, through one client (obstore).

The client repeats a request for some seconds after throttling, 5xx answers and broken connections. An object appears
whole or not at all, and an upload in parts that fails is aborted.

Trap: a process that forks after its first request hangs in the child. Fork before that (`ft_service.cluster.detach`),
or spawn.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import SplitResult, parse_qsl, urlsplit

import obstore
import obstore.store
import pyarrow
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from pyarrow import fs

from ft_service.errors import StorageError
from ft_service.storage.failures import http_status
from ft_service.text import first_line

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
_WITH_ACCOUNT = ("abfs", "abfss")
"""``abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/...``"""

_PART_BYTES = 16 * 1024 * 1024
_COPIED_BY_STORE_BYTES = 5 * 1024**3
"""S3 copies no larger object in one request."""
_NUM_PARTS_AT_ONCE = 4
_NUM_FILES_AT_ONCE = 8

_RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "60s"}
"""Of one request, which carries at most a part."""

_SECRET_OPTIONS = ("key", "secret", "token", "password", "sas", "signature", "credential")

Version = dict[str, str]
"""Tells one content of an object from another: its ETag or generation."""


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    path: str
    size: int
    """Bytes."""


class ObjectStore:
    """The objects below one URI; paths are relative to it. Methods raise `OSError` and obstore's `BaseError`."""

    def __init__(self, uri: str) -> None:
        """Raises `StorageError` for a URI that cannot be used."""
        parts = urlsplit(uri)
        self.place = f"{parts.netloc}{parts.path}".rstrip("/")
        """Bucket and folder."""
        self._scheme = "gs" if parts.scheme == "gcs" else parts.scheme
        self._settings = _settings(uri, parts)
        try:
            self._store: Any = obstore.store.from_url(f"{self._scheme}://{self.place}", **self._settings)
        except (BaseError, ValueError) as error:
            cure = " Add ?account_name=NAME." if "Account must be specified" in str(error) else ""
            raise StorageError(f"storage = {uri!r}: is not a usable root ({first_line(error)}).{cure}") from None

    def arrow(self) -> fs.FileSystem:
        """The same store as a file system of pyarrow, whose paths begin with the bucket. Picklable."""
        from obstore.fsspec import FsspecStore

        store = cast(Any, FsspecStore)(self._scheme, **self._settings)
        return fs.PyFileSystem(_ArrowHandler(store))

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        return self.read_versioned(path)[0]

    def read_versioned(self, path: str) -> tuple[bytes, Version]:
        result = self._store.get(path)
        return bytes(result.bytes()), _version(result.meta)

    def read_range(self, path: str, start: int, nbytes: int) -> bytes:
        """Fewer bytes than asked for if the object ends before."""
        if nbytes == 0:
            return b""
        try:
            return bytes(self._store.get_range(path, start=start, length=nbytes))
        except BaseError as error:
            if http_status(error) == 416:
                return b""
            raise

    def size(self, path: str) -> int | None:
        """Bytes of an object; None if it does not exist."""
        try:
            return cast(int, self._store.head(path)["size"])
        except FileNotFoundError:
            return None

    def has_folder(self, path: str) -> bool:
        listing = self._store.list(path or None, chunk_size=1)
        return next(iter(listing), None) is not None

    def names(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the objects and of the folders directly in `path`."""
        found = self._store.list_with_delimiter(path or None)
        objects = [each["path"] for each in found["objects"] if each["path"] not in ("", path)]
        return [_name(at) for at in objects], [_name(prefix) for prefix in found["common_prefixes"]]

    def tree(self, path: str) -> list[Listed]:
        """Every object below `path`, at any depth."""
        found = [Listed(each["path"], each["size"]) for chunk in self._store.list(path or None) for each in chunk]
        folders = {"", path, *(parent for each in found for parent in _parents(each.path))}
        return [each for each in found if each.size > 0 or self._is_empty_object(each.path, folders)]

    def _is_empty_object(self, path: str, folders: set[str]) -> bool:
        """False for an object whose name ends in a slash: other clients make one to keep an empty folder."""
        return path not in folders and self.size(path) is not None

    def download(self, files: Iterable[tuple[str, Path]]) -> None:
        """Copy objects to files of this machine, several at a time."""
        with ThreadPoolExecutor(_NUM_FILES_AT_ONCE) as pool:
            list(pool.map(lambda pair: self._download(*pair), files))

    def _download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for content in self._parts(path):
                file.write(content)

    def _parts(self, path: str) -> Iterator[Any]:
        size = self._store.head(path)["size"]
        for start in range(0, size, _PART_BYTES):
            yield self._store.get_range(path, start=start, end=min(start + _PART_BYTES, size))

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(self, path: str, content: bytes | Path) -> None:
        """Write an object from bytes or from a file of this machine."""
        self._store.put(path, content, chunk_size=_PART_BYTES, max_concurrency=_NUM_PARTS_AT_ONCE)

    def write_if(self, path: str, content: bytes, version: Version | None) -> bool:
        """Write an object only if it has `version`, or does not exist if that is None; returns whether it did.

        `content` must differ from what others write. A store without conditional writes (`conditional_put=disabled`)
        writes in any case.
        """
        try:
            self._store.put(path, content, mode=version or "create")
        except NotImplementedError:
            self._store.put(path, content)
        except (AlreadyExistsError, PreconditionError):
            # The client repeats a request whose answer was lost, and then meets what the first one wrote.
            with suppress(FileNotFoundError):
                return self.read(path) == content
            return False
        return True

    def writing(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A stream into an object, which appears when the block ends; a block that raises leaves nothing."""
        writer = obstore.open_writer(self._store, path, buffer_size=_PART_BYTES, max_concurrency=_NUM_PARTS_AT_ONCE)
        return cast(AbstractContextManager[BinaryIO], writer)

    def upload(self, files: Iterable[tuple[Path, str]]) -> None:
        """Copy files of this machine to objects, several at a time."""
        with ThreadPoolExecutor(_NUM_PARTS_AT_ONCE) as pool:
            list(pool.map(lambda pair: self.write(pair[1], pair[0]), files))

    def copy(self, source: str, path: str) -> None:
        """Copy an object on the store's side, or through this machine where the store does not copy large objects."""
        try:
            self._store.copy(source, path)
        except BaseError as error:
            if http_status(error) != 400 or (self.size(source) or 0) <= _COPIED_BY_STORE_BYTES:
                raise
            with self.writing(path) as stream:
                for content in self._parts(source):
                    stream.write(content)

    def delete(self, path: str) -> None:
        """Delete an object and everything below `path`, if it exists."""
        below = [each["path"] for chunk in self._store.list(path or None) for each in chunk]
        try:
            if below:
                self._store.delete(below)
        except FileNotFoundError:  # another process has deleted one of them
            for each in below:
                self._delete_one(each)
        self._delete_one(path)

    def _delete_one(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._store.delete(path)


class _ArrowHandler(fs.FSSpecHandler):
    """Makes up for what obstore's fsspec layer (0.12) cannot do for pyarrow."""

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing, as there are no folders; the layer would try to make a bucket."""

    def open_output_stream(self, path: str, metadata: object) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(_BytesWriter(self.fs.open(path, mode="wb")), mode="w")


class _BytesWriter:
    """pyarrow writes views of signed bytes, which obstore refuses."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: "pyarrow.lib.Buffer | bytes") -> int:
        return cast(int, self._file.write(bytes(data)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _settings(uri: str, parts: SplitResult) -> dict[str, Any]:
    """obstore's settings for the store of a URI. Raises `StorageError` for a URI that cannot be used."""
    scheme = parts.scheme.lower()
    if scheme not in SCHEMES:
        raise StorageError(f"storage = {uri!r}: is not a usable root. Use a folder, s3://, gs:// or az://.")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    names = (name.lower() for name in options if name != "skip_signature")  # of a store that needs no credentials
    has_secret = any(word in name for name in names for word in _SECRET_OPTIONS)
    if has_secret or parts.password or (parts.username and scheme not in _WITH_ACCOUNT):
        raise StorageError(
            f"storage = {scheme}://...: contains credentials, and a URI is kept in records and logs. "
            "Pass them in the environment (docs/storage.md)."
        )
    client: dict[str, Any] = dict(_TIMEOUTS)
    protocol = options.pop("scheme", "https")
    if (host := options.pop("endpoint_override", None)) is not None:
        options["endpoint"] = f"{protocol}://{host}"
    if (endpoint := options.get("endpoint")) is not None:
        client["allow_http"] = endpoint.startswith("http://")
        if scheme in ("gs", "gcs"):
            options["base_url"] = options.pop("endpoint")
    settings: dict[str, Any] = {"config": options, "client_options": client, "retry_config": _RETRIES}
    if scheme == "s3":
        settings |= _s3_credentials()
        if not {"region", "endpoint"} & set(options) and "AWS_ENDPOINT_URL" not in os.environ:
            options["region"] = _region(parts.netloc)
    return settings


def _region(bucket: str) -> str:
    """The region of a bucket. S3 answers that without credentials."""
    try:
        return cast(str, fs.resolve_s3_region(bucket))
    except OSError as error:
        if "not found" in str(error):
            raise FileNotFoundError(f"there is no bucket {bucket!r}") from None
        raise


def _s3_credentials() -> dict[str, Any]:
    """Credentials of a profile. obstore itself knows the environment, web identities, containers and machines."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or not _has_profile():
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise StorageError(
            "storage: the AWS credentials of this machine are in a profile, which needs the package boto3. Install it "
            "(pip install 'ft-service[aws]'), or export them: "
            'eval "$(aws configure export-credentials --format env)".'
        ) from None
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except ValueError:  # the profile has only settings
        return {}


def _has_profile() -> bool:
    files = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    return "AWS_PROFILE" in os.environ or any(
        Path(os.environ.get(name, default)).expanduser().is_file() for name, default in files.items()
    )


def _version(meta: Mapping[str, Any]) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
