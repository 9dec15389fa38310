"""Writing weights: what goes into which safetensors file, and the files, tensor by tensor.

What lies where is decided from names, types and shapes alone, so every process knows it of all the others without a
word. Each owner then writes its own files, and holds no tensor longer than it takes to write it.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

import torch

from ft_service.model.weight_files import ITEM_BYTES

MAX_FILE_BYTES = 5 * 1000**3
"""Of one file, unless a single tensor is larger. S3 copies objects of up to 5 GiB by itself."""

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_CHUNK_BYTES = 16 * 1024 * 1024

Create = Callable[[str], AbstractContextManager[BinaryIO]]
"""Opens the file of that name; leaving the context without an error makes the file whole, with one undoes it."""


@dataclass(frozen=True)
class TensorFormat:
    """All of a tensor but its values; `dtype` is the format's name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its name, the process that writes it, and its tensors in their order."""

    name: str
    owner: int
    tensors: dict[str, TensorFormat]

    @property
    def header(self) -> bytes:
        """What stands in front of the tensors: the length of a JSON text, and the text, padded to 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in self.tensors.items():
            stop = start + tensor.nbytes
            entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def lay_out(
    tensors: Mapping[str, TensorFormat], num_owners: int = 1, max_file_bytes: int = MAX_FILE_BYTES
) -> list[WeightFile]:
    """Deal whole tensors out to owners, and those of each owner to files.

    In their order, each goes to the owner that has the fewest bytes so far: shares differ by one tensor at most, and
    neighbours mostly go to different owners, so that all of them have something to write at any time. An owner without
    a tensor writes no file.
    """
    shares: list[list[dict[str, TensorFormat]]] = [[] for _ in range(num_owners)]
    dealt = [0] * num_owners
    for name, tensor in tensors.items():
        owner = min(range(num_owners), key=dealt.__getitem__)
        files = shares[owner]
        if not files or sum(other.nbytes for other in files[-1].values()) + tensor.nbytes > max_file_bytes:
            files.append({})
        files[-1][name] = tensor
        dealt[owner] += tensor.nbytes
    owned = [(owner, file) for owner, files in enumerate(shares) for file in files]
    return [
        WeightFile(f"model-{number:05}-of-{len(owned):05}.safetensors", owner, file)
        for number, (owner, file) in enumerate(owned, start=1)
    ]


def index_of(files: Sequence[WeightFile]) -> bytes:
    """The content of model.safetensors.index.json."""
    total = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


class WeightWriter:
    """Writes `files` one after the other, each tensor in a thread, so that the next one can be fetched meanwhile.

    A context manager: leaving it waits for the thread. `digests` then has the SHA-256 of each file by name. A failure
    undoes the file that is being written; the earlier ones stay.
    """

    def __init__(self, files: Sequence[WeightFile], create: Create) -> None:
        self.digests: dict[str, str] = {}
        self._create = create
        self._expected = [(file, name) for file in files for name in file.tensors]
        self._expected.reverse()
        self._open = ExitStack()
        self._stream: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "WeightWriter":
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; returns once the one before is written. `tensor` must not change until then."""
        self._wait()
        self._pending = self._thread.submit(self._append, name, tensor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
                assert not self._expected, f"{len(self._expected)} tensors were not written"
        except BaseException as late:
            kind, error, trace = type(late), late, late.__traceback__
            raise
        finally:
            self._thread.shutdown()
            self._open.__exit__(kind, error, trace)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        file, expected = self._expected.pop()
        found = TensorFormat(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert (name, found) == (expected, file.tensors[expected]), f"{name} {found} is not {expected}"
        if self._stream is None:
            self._stream = self._open.enter_context(self._create(file.name))
            self._sha256 = hashlib.sha256()
            self._put(memoryview(file.header))
        self._put(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if not self._expected or self._expected[-1][0] is not file:
            self._open.close()
            self._stream = None
            self.digests[file.name] = self._sha256.hexdigest()

    def _put(self, content: memoryview) -> None:
        assert self._stream is not None
        for start in range(0, len(content), _CHUNK_BYTES):
            chunk = content[start : start + _CHUNK_BYTES]
            self._sha256.update(chunk)
            self._stream.write(chunk)
