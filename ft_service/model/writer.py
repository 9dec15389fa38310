"""Writing model folders: which tensor goes into which safetensors file, the files, and config and tokenizer.

The layout follows from names, types and shapes alone, so every process computes the same one without communication.
Each owner then writes its own files, and holds a tensor only while it writes it.
"""

import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from transformers import PretrainedConfig

from ft_service.model.weight_files import CONFIG_FILE, ITEM_BYTES

MAX_FILE_BYTES = 5 * 1000**3
"""Of one file, unless a single tensor is larger. S3 copies objects of up to 5 GiB without a multipart upload."""

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_CHUNK_BYTES = 16 * 1024 * 1024
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json")

Create = Callable[[str], AbstractContextManager[BinaryIO]]
"""Opens a file by name. Leaving the context completes the file; leaving it with an error deletes it."""


@dataclass(frozen=True)
class TensorFormat:
    """Type and shape of a tensor; `dtype` is the safetensors name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its name, the rank that writes it, and its tensors in order."""

    name: str
    owner: int
    tensors: dict[str, TensorFormat]

    @property
    def header(self) -> bytes:
        """The bytes before the tensors: the length of a JSON text, then the text, padded to 8 bytes."""
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
) -> list[FileLayout]:
    """Assign whole tensors to owners, and the tensors of each owner to files.

    Each tensor, in order, goes to the owner with the fewest bytes so far. So the owners' shares differ by at most one
    tensor, and neighbouring tensors mostly have different owners, which can then write at the same time. An owner
    without a tensor writes no file.
    """
    shares: list[list[dict[str, TensorFormat]]] = [[] for _ in range(num_owners)]
    owner_bytes = [0] * num_owners
    for name, tensor in tensors.items():
        owner = min(range(num_owners), key=owner_bytes.__getitem__)
        files = shares[owner]
        if not files or sum(other.nbytes for other in files[-1].values()) + tensor.nbytes > max_file_bytes:
            files.append({})
        files[-1][name] = tensor
        owner_bytes[owner] += tensor.nbytes
    owned = [(owner, file) for owner, files in enumerate(shares) for file in files]
    return [
        FileLayout(f"model-{number:05}-of-{len(owned):05}.safetensors", owner, file)
        for number, (owner, file) in enumerate(owned, start=1)
    ]


def index_of(files: Sequence[FileLayout]) -> bytes:
    """The content of model.safetensors.index.json."""
    total = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def config_and_tokenizer_files(config: PretrainedConfig, base_folder: Path, chat_template: str) -> dict[str, bytes]:
    """File name -> content of what a model folder has next to its weights: config, tokenizer and chat template.

    The tokenizer comes from `base_folder`. With these files stock transformers loads the folder, and a run can use it
    as its base.
    """
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        files = {CONFIG_FILE: Path(temporary, CONFIG_FILE).read_bytes()}
    for pattern in _TOKENIZER_FILES:
        files |= {file.name: file.read_bytes() for file in sorted(base_folder.glob(pattern))}
    return files | {"chat_template.jinja": chat_template.encode()}


class WeightWriter:
    """Writes `files` one after the other in a thread, so that the caller can fetch the next tensor meanwhile.

    A context manager: leaving it waits for the thread. `digests` then has the SHA-256 of each file by name. On an error
    the file being written is deleted; complete files are kept.
    """

    def __init__(self, files: Sequence[FileLayout], create: Create) -> None:
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
        """Start writing the next tensor once the previous one is written. `tensor` must not change until then."""
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
            kind = type(late)
            error = late
            trace = late.__traceback__
            raise
        finally:
            self._thread.shutdown()
            self._open.__exit__(kind, error, trace)

    def _wait(self) -> None:
        pending = self._pending
        self._pending = None
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
