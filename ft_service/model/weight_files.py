"""The files of a Llama model: what they contain, whether they are complete, and any range of any tensor.

A safetensors file has 8 bytes of length, a JSON header, and the tensors one after another, row-major. So any slice of a
flattened tensor is one range of bytes, which `os.preadv` or a ranged request reads on its own.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from ft_service.errors import ModelError, ModelUnreachableError, StorageError, UnreachableError
from ft_service.storage.storage import Storage

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_CONFIG_FILE = "adapter_config.json"
SINGLE_FILE = "model.safetensors"
_SAMPLE_BYTES = 1024 * 1024
_MAX_HEADER_BYTES = 100 * 1000 * 1000  # the format's own limit

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: `start` and `nbytes` in bytes of `file`. `dtype` is the safetensors name, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


class WeightFiles:
    """The config and safetensors files of a model, in a folder or on object storage.

    The constructor reads nothing. Every method raises `ModelError` if a file is missing, damaged or cannot be read.
    """

    def __init__(self, location: str | Path) -> None:
        """`location` is a folder, or a URI on object storage."""
        self.location = str(location)
        self._files: _LocalFiles | _RemoteFiles
        if "://" in self.location:
            self._files = _RemoteFiles(self.location)
        else:
            self._files = _LocalFiles(Path(self.location))

    # -- content ---------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises `ModelError` if the model is not a Llama."""
        if self._files.size(CONFIG_FILE) is None and self._files.size(_ADAPTER_CONFIG_FILE) is not None:
            base = self._json(_ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
            fix = f"model.base: {base}" if base else "the model that it was trained on"
            raise ModelError(
                f"model.base = {self.location!r}: is an adapter, not a model. Use its base ({fix}), or merge the "
                "adapter into it first (`ft adapters merge`)."
            )
        if self._files.size(CONFIG_FILE) is None:
            raise ModelError(f"model.base = {self.location!r}: has no config.json. Use a complete model folder.")
        config: dict[str, Any] = self._json(CONFIG_FILE)
        architecture = (config.get("architectures") or [config.get("model_type")])[0]
        if architecture != "LlamaForCausalLM":
            raise ModelError(
                f"model.base = {self.location!r}: its architecture is {architecture}. "
                "Use a model whose config.json says LlamaForCausalLM."
            )
        return config

    @cached_property
    def file_names(self) -> list[str]:
        """Names of the safetensors files, sorted. Raises `ModelError` if one is missing."""
        names = [SINGLE_FILE] if self._files.size(INDEX_FILE) is None else sorted(set(self._index().values()))
        missing = [name for name in names if self._files.size(name) is None]
        if missing:
            has_pickle = any(name.endswith((".bin", ".pth")) for name in self._files.names())
            fix = "Convert it to safetensors first." if has_pickle else "Download the model again."
            raise ModelError(f"model.base = {self.location!r}: {', '.join(missing)} missing. {fix}")
        return names

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, in the order of the files."""
        found: dict[str, TensorEntry] = {}
        for file in self.file_names:
            header, header_bytes = self._headers[file]
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
            for name, entry in entries:
                first, last = entry["data_offsets"]
                found[name] = TensorEntry(
                    file, entry["dtype"], tuple(entry["shape"]), header_bytes + first, last - first
                )
        return found

    def check(self) -> None:
        """Raise `ModelError` unless config and index are valid and every file has the length that its header gives."""
        _ = self.config
        for file in self.file_names:
            header, header_bytes = self._headers[file]
            # Each byte range must match dtype and shape, and the file must end with the last tensor.
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                size = ITEM_BYTES.get(entry["dtype"])
                if size is not None and last - first != size * math.prod(entry["shape"]):
                    raise ModelError(
                        f"{self._path(file)}: {name} has {last - first:,} bytes, which does not match "
                        f"{entry['dtype']} of shape {entry['shape']}: damaged. Download it again."
                    )
            expected = header_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            actual = self._files.size(file)
            if expected != actual:
                raise ModelError(
                    f"{self._path(file)}: {actual:,} bytes instead of the {expected:,} in its header: half-downloaded. "
                    "Download it again."
                )
        if self._files.size(INDEX_FILE) is not None:
            tensors = self.tensors
            lost = [name for name, file in self._index().items() if name not in tensors or tensors[name].file != file]
            if lost:
                raise ModelError(
                    f"{self._path(INDEX_FILE)}: lists {len(lost)} tensors that are not in their files "
                    f"({', '.join(lost[:3])}). Download the model again."
                )

    def fingerprint(self) -> str:
        """SHA-256 that identifies the model without reading hundreds of gigabytes.

        Computed from config.json and, for every weight file, its size, its header (names, dtypes, shapes, offsets) and
        the first and last MiB of its weights.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.file_names:
            size = self._size(file)
            header_bytes = self._headers[file][1]
            digest.update(f"{file} {size} ".encode() + self._bytes(file, 0, header_bytes))
            for start in (header_bytes, max(header_bytes, size - _SAMPLE_BYTES)):
                digest.update(self._bytes(file, start, min(size, start + _SAMPLE_BYTES)))
        return digest.hexdigest()

    # -- reading ---------------------------------------------------------------------------------------------------

    def json_file(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file next to the weights; None if it does not exist."""
        return None if self._files.size(name) is None else self._json(name)

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor, from its element `start` on. Thread-safe."""
        self._files.read_into(entry.file, entry.start + start * entry.item_bytes, buffer)

    def close(self) -> None:
        """Close all open files; the next read opens them again."""
        self._files.close()

    def _index(self) -> dict[str, str]:
        try:
            index = self._json(INDEX_FILE)["weight_map"]
            return {str(name): str(file) for name, file in index.items()}
        except (KeyError, TypeError, AttributeError):
            raise ModelError(f"{self._path(INDEX_FILE)}: has no weight_map. Download the model again.") from None

    @cached_property
    def _headers(self) -> dict[str, tuple[dict[str, Any], int]]:
        """Weight file -> its header without metadata, and the number of bytes before its first tensor."""
        return {file: self._header(file) for file in self.file_names}

    def _header(self, file: str) -> tuple[dict[str, Any], int]:
        size = self._size(file)
        length = struct.unpack("<Q", self._bytes(file, 0, 8))[0] if size >= 8 else size
        damaged = ModelError(f"{self._path(file)}: its safetensors header is damaged. Download it again.")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise damaged
        try:
            header = json.loads(self._bytes(file, 8, 8 + length))
            header.pop("__metadata__", None)
            for entry in header.values():
                first, last = entry["data_offsets"]
                _ = str(entry["dtype"]), [int(length) for length in entry["shape"]], int(first), int(last)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise damaged from None
        return header, 8 + length

    def _json(self, file: str) -> Any:
        try:
            return json.loads(self._bytes(file, 0, self._size(file)))
        except ValueError as error:
            raise ModelError(f"{self._path(file)}: is not JSON ({error}). Download the model again.") from None

    def _size(self, file: str) -> int:
        size = self._files.size(file)
        if size is None:
            raise ModelError(f"{self._path(file)}: missing. Download the model again.")
        return size

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        content = bytearray(stop - start)
        self._files.read_into(file, start, memoryview(content))
        return bytes(content)

    def _path(self, file: str) -> str:
        return f"{self.location.rstrip('/')}/{file}"


class _LocalFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = Lock()

    def names(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir())

    def size(self, file: str) -> int | None:
        path = self._folder / file
        return path.stat().st_size if path.is_file() else None

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._folder / file, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptors[file], [buffer[done:]], start + done)
            except OSError as error:
                raise ModelError(f"{self._folder / file}: cannot be read ({error}).") from None
            if count == 0:
                raise ModelError(f"{self._folder / file}: ends too early. Download it again.")
            done += count

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class _RemoteFiles:
    def __init__(self, uri: str) -> None:
        self._uri = uri
        with self._raising():
            self._storage = Storage(uri)

    def names(self) -> Iterator[str]:
        return iter(self._sizes)

    def size(self, file: str) -> int | None:
        return self._sizes.get(file)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        with self._raising():
            return {file.path: file.size for file in self._storage.tree() if "/" not in file.path}

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        with self._raising():
            buffer[:] = self._storage.read_range(file, start, len(buffer))

    def close(self) -> None:
        """Nothing is open."""

    @contextmanager
    def _raising(self) -> Iterator[None]:
        try:
            yield
        except UnreachableError as error:
            raise ModelUnreachableError(f"model.base = {self._uri!r}: does not answer: {error}") from None
        except StorageError as error:
            raise ModelError(f"model.base = {self._uri!r}: cannot be read: {error}") from None
