"""Adapters in memory: verified when they are loaded, shared by all requests, least recently used ones unloaded first.

Loading reads and checks files on threads of its own, so that no other request's decoding stops for it.
"""

import asyncio
import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from ft_service.errors import ServingError, StorageError
from ft_service.registry.registry import AdapterRecord, Registry
from serve.engines.batching.adapter_weights import (
    LoadedAdapter,
    MisfitError,
    NonFiniteError,
    UnsupportedAdapterError,
    changes_base,
    load_weights,
    parse_config,
)
from serve.engines.batching.lora_layers import BatchedLora
from serve.engines.batching.threads import use_threads

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_LOADER_THREADS = 4
"""So that one slow download does not delay the adapters behind it."""


@dataclass(frozen=True)
class AdapterStats:
    loaded: tuple[str, ...]
    """Digests, most recently used last."""
    bytes: int
    """Loaded weights, and the stacks of those in the batch."""
    loads: int
    """Since the start."""
    load_seconds: float
    """In all, from the start of reading to the end of checking."""


@dataclass
class _Entry:
    """An adapter that is loaded or being loaded."""

    adapter: LoadedAdapter | None = None
    users: int = 0
    waiting: list[Future[LoadedAdapter]] = field(default_factory=list)
    pinned: bool = False
    unload: bool = False
    """Drop it once nobody uses it."""


class AdapterStore:
    """Loaded adapters of one base, at most `max_bytes` of them. Safe to use from several threads.

    The bound covers the weights and, for adapters in use, their copies in the stacks of the batched layers. An adapter
    in use is never unloaded; one that finds no room waits until a request ends. Adapters whose id is in `pinned` stay.
    """

    def __init__(
        self,
        registry: Registry,
        lora: BatchedLora,
        base_fingerprint: str,
        max_bytes: int,
        pinned: Iterable[str] = (),
    ) -> None:
        self._registry = registry
        self._lora = lora
        self._base_fingerprint = base_fingerprint
        self._max_bytes = max_bytes
        self._pinned = frozenset(pinned)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._changed = threading.Condition()
        # One CPU thread for each: its operations must not take any from the model (`batching.threads`).
        self._loader = ThreadPoolExecutor(_LOADER_THREADS, "adapter", use_threads, (1,))
        self._reserved = 0  # bytes of adapters being moved to the device
        self._num_loads = 0
        self._load_seconds = 0.0
        self._closed = False

    def request(self, record: AdapterRecord) -> "Future[LoadedAdapter]":
        """Ask for an adapter; the future's result counts as in use until it is released.

        It fails with `ServingError` if the files are damaged, do not fit the base, or contain values that are not
        finite, and with `StorageError` if the storage does not give them. Several requests for the same adapter load
        it once.
        """
        future: Future[LoadedAdapter] = Future()
        with self._changed:
            if self._closed:
                raise ServingError(f"adapter = {record.id!r}: the engine is closed.")
            entry = self._entries.get(record.digest)
            if entry is None:
                entry = self._entries[record.digest] = _Entry(pinned=record.id in self._pinned)
                self._loader.submit(self._load, record, entry)
            self._entries.move_to_end(record.digest)
            entry.unload = False
            if entry.adapter is None:
                entry.waiting.append(future)
            else:
                entry.users += 1
                future.set_result(entry.adapter)
        return future

    def acquire(self, record: AdapterRecord) -> LoadedAdapter:
        """Like `request`, but waits for the adapter."""
        return self.request(record).result()

    async def acquire_async(self, record: AdapterRecord) -> LoadedAdapter:
        """Like `acquire`, for an event loop. A caller that is cancelled meanwhile holds nothing."""
        future = self.request(record)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._release_unclaimed)
            raise

    def release(self, adapter: LoadedAdapter) -> None:
        """A request that has acquired the adapter no longer uses it."""
        with self._changed:
            entry = self._entries[adapter.digest]
            assert entry.users > 0, f"{adapter.id} is not in use"
            entry.users -= 1
            if entry.users == 0 and entry.unload:
                del self._entries[adapter.digest]
            self._changed.notify_all()

    def unload(self, digest: str) -> None:
        """Drop an adapter once the requests that use it have ended. One that is not loaded is no error."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None:
                return
            entry.unload = True
            if entry.users == 0 and entry.adapter is not None:
                del self._entries[digest]
                self._changed.notify_all()

    def stats(self) -> AdapterStats:
        with self._changed:
            loaded = tuple(digest for digest, entry in self._entries.items() if entry.adapter is not None)
            nbytes = self._loaded_bytes() + self._lora.stack_bytes
            return AdapterStats(loaded, nbytes, self._num_loads, self._load_seconds)

    def close(self) -> None:
        """Fail the requests that still wait, and free the weights that nobody uses."""
        with self._changed:
            self._closed = True
            for digest in [digest for digest, entry in self._entries.items() if entry.users == 0 and entry.adapter]:
                del self._entries[digest]
            self._changed.notify_all()
        self._loader.shutdown(wait=True, cancel_futures=False)

    # -- loading ---------------------------------------------------------------------------------------------------

    def _load(self, record: AdapterRecord, entry: _Entry) -> None:
        error: Exception | None = None
        adapter = None
        reserved = 0
        try:
            started = time.monotonic()
            reserved = self._reserve(record)
            adapter = self._read(record)
            seconds = time.monotonic() - started
        except Exception as failure:  # every waiting request gets it
            error = failure
        with self._changed:
            self._reserved -= reserved
            waiting = [future for future in entry.waiting if future.set_running_or_notify_cancel()]
            entry.waiting.clear()
            if adapter is None:
                self._entries.pop(record.digest, None)
            else:
                self._num_loads += 1
                self._load_seconds += seconds
                entry.adapter = adapter
                entry.users = len(waiting)
                if entry.users == 0 and entry.unload:
                    del self._entries[record.digest]
            self._changed.notify_all()
        for future in waiting:
            if adapter is None:
                future.set_exception(error)
            else:
                future.set_result(adapter)

    def _read(self, record: AdapterRecord) -> LoadedAdapter:
        """The adapter from the registry's folder. The bytes that are checked are the bytes that are used."""
        files = verified_files(self._registry, record, self._base_fingerprint)
        with naming(record):
            config = plain_config(record, files[CONFIG_FILE])
            tensors = load(files.pop(WEIGHTS_FILE))
            with torch.inference_mode():
                return load_weights(record.id, record.digest, config, tensors, self._lora.sites, self._lora.dtype)

    # -- room ------------------------------------------------------------------------------------------------------

    def _reserve(self, record: AdapterRecord) -> int:
        """Wait until there is room for the adapter, unloading others that nobody uses. Returns its bytes."""
        nbytes = self._nbytes(record)
        if nbytes > self._max_bytes:
            raise ServingError(
                f"adapter = {record.id!r}: its weights take {nbytes:,} bytes, and all adapters together may take "
                f"{self._max_bytes:,}. Raise adapter_gib."
            )
        with self._changed:
            while not self._make_room(nbytes):
                if self._closed:
                    raise ServingError(f"adapter = {record.id!r}: the engine is closed.")
                self._changed.wait()
            self._reserved += nbytes
        return nbytes

    def _nbytes(self, record: AdapterRecord) -> int:
        file = folder_of(self._registry, record) / WEIGHTS_FILE
        try:
            with safe_open(file, "pt") as tensors:  # reads the header only
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0  # reported when the file is read and checked
        return sum(map(math.prod, shapes)) * self._lora.bytes_per_number

    def _make_room(self, nbytes: int) -> bool:
        """Unload idle adapters until `nbytes` more fit. False if other requests have to end first."""
        idle = [digest for digest, entry in self._entries.items() if self._is_idle(entry)]
        while True:
            sizes = [(entry.adapter.nbytes, entry.users > 0) for entry in self._entries.values() if entry.adapter]
            loaded = sum(size for size, _ in sizes) + self._reserved + nbytes
            copies = sum(size for size, is_used in sizes if is_used) + self._reserved + nbytes
            if loaded + copies <= self._max_bytes:
                return True
            if idle:
                del self._entries[idle.pop(0)]
            elif copies > nbytes:
                return False
            elif loaded > self._max_bytes:
                raise ServingError(f"the pinned adapters leave no room for {nbytes:,} more bytes. Raise adapter_gib.")
            else:
                return True  # alone in the batch, it is used without a copy

    def _loaded_bytes(self) -> int:
        return sum(entry.adapter.nbytes for entry in self._entries.values() if entry.adapter)

    @staticmethod
    def _is_idle(entry: _Entry) -> bool:
        return entry.adapter is not None and entry.users == 0 and not entry.pinned

    def _release_unclaimed(self, future: "Future[LoadedAdapter]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.release(future.result())


# -- checks, of any engine ---------------------------------------------------------------------------------------------


def folder_of(registry: Registry, record: AdapterRecord) -> Path:
    """The adapter's files on this machine. Raises a `StorageError` that names the adapter."""
    try:
        return registry.folder(record)
    except StorageError as error:
        raise StorageError(f"adapter = {record.id!r}: {error}") from None


def verified_files(registry: Registry, record: AdapterRecord, base_fingerprint: str) -> dict[str, bytes]:
    """Content of the files to load: configuration and weights.

    Raises `ServingError` if any file of the record is not as it was published, or the adapter is one of another base,
    and `StorageError` if the storage does not give them.
    """
    folder = folder_of(registry, record)
    files = {}
    damaged = []
    for name, digest in record.files.items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            damaged.append(name)
            continue
        if hashlib.sha256(content).hexdigest() != digest:
            damaged.append(name)
        elif name in (WEIGHTS_FILE, CONFIG_FILE):
            files[name] = content
    damaged += [name for name in (WEIGHTS_FILE, CONFIG_FILE) if name not in record.files]  # a pickle file, perhaps
    if damaged:
        raise ServingError(
            f"adapter = {record.id!r}: {', '.join(damaged)} missing or changed since "
            f"publishing (in {folder}). Restore the files, or publish the run again."
        )
    if record.base.fingerprint != base_fingerprint:
        raise ServingError(
            f"adapter = {record.id!r}: was trained on another base ({record.base.id}, fingerprint "
            f"{record.base.fingerprint[:12]}; this base has {base_fingerprint[:12]}). Serve it on that base."
        )
    return files


def plain_config(record: AdapterRecord, content: bytes) -> LoraConfig:
    """The configuration of an adapter that means something on the base as it is.

    Raises `ServingError`, and `UnsupportedAdapterError`.
    """
    config = parse_config(content)
    if changes_base(config):
        raise ServingError(
            f"adapter = {record.id!r}: changes its base when loaded (init_lora_weights "
            f"{config.init_lora_weights}). Convert it to plain LoRA and publish that."
        )
    return config


@contextmanager
def naming(record: AdapterRecord) -> Iterator[None]:
    """Turn what a check of the adapter's weights raises into a `ServingError` that names it."""
    try:
        yield
    except UnsupportedAdapterError as error:
        raise ServingError(
            f"adapter = {record.id!r}: does more than plain LoRA ({error}), which cannot be batched with others. "
            f"Merge it into its base (ft adapters merge {record.id}), and serve the result."
        ) from None
    except (MisfitError, SafetensorError) as error:
        mismatches = error.mismatches if isinstance(error, MisfitError) else [str(error)]
        raise ServingError(
            f"adapter = {record.id!r}: does not fit the base ({len(mismatches)} mismatches: {mismatches[0]}). "
            f"It was trained on {record.base.id}; serve it on that base."
        ) from None
    except NonFiniteError as error:
        raise ServingError(
            f"adapter = {record.id!r}: {error} has values that are not finite. "
            "Train it again with a lower learning rate, and publish that."
        ) from None
