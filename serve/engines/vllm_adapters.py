"""Adapters of the vLLM engine: checked before vLLM sees them, and read by vLLM from a private copy of those bytes.

vLLM warns of nothing that peft would: it takes tensors that do not fit for others, and an error while it loads an
adapter within a step ends the whole engine.
"""

import asyncio
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.exceptions import VLLMError
from vllm.lora.request import LoRARequest

from ft_service.errors import ServingError
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.registry.vllm import vllm_problems
from ft_service.text import first_line
from serve.engines.batching.adapter_weights import Site, check_weights
from serve.engines.batching.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterStats,
    naming,
    plain_config,
    verified_files,
)
from serve.engines.batching.lora_layers import install_lora_layers

logger = logging.getLogger(__name__)


class LoraEngine(Protocol):
    """The part of `AsyncLLM` that loads adapters."""

    async def add_lora(self, lora_request: LoRARequest) -> bool: ...

    async def remove_lora(self, lora_id: int) -> bool: ...


@dataclass(frozen=True)
class _BaseSite(Site):
    """A layer whose weight stays in the base's files: only copies of it are compared."""

    folder: Path = Path()

    def weight(self) -> torch.Tensor:
        name = f"{self.name}.weight"
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    return tensors.get_tensor(name)
        if self.name == "lm_head":  # tied
            return _BaseSite("model.embed_tokens", "embedding", self.layer, folder=self.folder).weight()
        return super().weight()


def base_sites(folder: Path) -> dict[str, Site]:
    """The layers of a Llama that adapters may change, without its weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    sites = install_lora_layers(model).sites
    return {name: _BaseSite(name, site.kind, site.layer, folder=folder) for name, site in sites.items()}


def bytes_of_slot(sites: Mapping[str, Site], max_rank: int, itemsize: int) -> int:
    """What vLLM reserves for one adapter: A and B of `max_rank` for every layer, whatever the adapter changes."""
    return sum(sum(site.shape) * max_rank * itemsize for site in sites.values() if site.kind != "norm")


@dataclass
class _Entry:
    request: LoRARequest
    record: AdapterRecord
    nbytes: int = 0
    users: int = 0
    loading: "asyncio.Task[None] | None" = None
    unload: bool = False
    """Drop it once nobody uses it."""

    @property
    def is_loaded(self) -> bool:
        return self.loading is not None and self.loading.done() and not self.loading.exception()


class VllmAdapters:
    """Adapters that vLLM has loaded; least recently used ones are unloaded. All coroutines run on one event loop.

    vLLM keeps up to `capacity` adapters in the host's memory and moves those of a batch to the GPU by itself.
    """

    def __init__(
        self, registry: Registry, base_fingerprint: str, sites: Mapping[str, Site], max_rank: int, capacity: int
    ) -> None:
        self._registry = registry
        self._base_fingerprint = base_fingerprint
        self._sites = sites
        self._max_rank = max_rank
        self._capacity = capacity
        self._pinned: frozenset[str] = frozenset()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._ids: dict[str, int] = {}
        self._folder = Path(mkdtemp(prefix="ft-adapters-"))  # for this user only
        self._num_loads = 0
        self._load_seconds = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, llm: LoraEngine, record: AdapterRecord) -> LoRARequest:
        """Load the adapter if needed. It counts as in use until `release`. Raises `ServingError`."""
        entry = self._entries.get(record.digest)
        if entry is None:
            # An id is never used for other weights: vLLM would go on with the old ones.
            number = self._ids.setdefault(record.digest, len(self._ids) + 1)
            lora = LoRARequest(record.digest, number, str(self._folder / record.digest))
            entry = self._entries[record.digest] = _Entry(lora, record)
            entry.loading = asyncio.get_running_loop().create_task(self._load(llm, entry))
            entry.loading.add_done_callback(lambda _: self._later(self._settle(llm, record.digest)))
        self._entries.move_to_end(record.digest)
        entry.unload = False
        entry.users += 1
        assert entry.loading is not None
        try:
            await asyncio.shield(entry.loading)  # others may wait for it too
        except BaseException:
            await self.release(llm, record.digest)
            raise
        return entry.request

    async def release(self, llm: LoraEngine, digest: str) -> None:
        """A request that has acquired the adapter no longer uses it."""
        self._entries[digest].users -= 1
        await self._settle(llm, digest)
        await self._drop_least_recent(llm, self._capacity)

    async def unload(self, llm: LoraEngine, digest: str) -> None:
        """Drop an adapter once the requests that use it have ended. One that is not loaded is no error."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.unload = True
        await self._settle(llm, digest)

    async def pin(self, llm: LoraEngine, adapter_ids: Iterable[str]) -> None:
        """Load adapters that stay. One that cannot be loaded is logged."""
        self._pinned = frozenset(adapter_ids)
        for adapter_id in self._pinned:
            try:
                record = await asyncio.to_thread(self._registry.resolve, adapter_id)
                await self.acquire(llm, record)
                await self.release(llm, record.digest)
            except Exception as error:  # the other models are served
                logger.error("pinned adapter %s is not loaded: %s", adapter_id, error)

    def stats(self) -> AdapterStats:
        loaded = {digest: entry for digest, entry in list(self._entries.items()) if entry.is_loaded}
        nbytes = sum(entry.nbytes for entry in loaded.values())
        return AdapterStats(tuple(loaded), nbytes, self._num_loads, self._load_seconds)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- loading -------------------------------------------------------------------------------------------------------

    async def _load(self, llm: LoraEngine, entry: _Entry) -> None:
        started = time.monotonic()
        entry.nbytes = await asyncio.to_thread(self._check_and_copy, entry.record)
        await self._drop_least_recent(llm, self._capacity - 1)
        try:
            await llm.add_lora(entry.request)
        except Exception as error:
            if getattr(llm, "errored", False):
                raise
            raise ServingError(
                f"adapter = {entry.record.id!r}: vLLM cannot load it ({first_line(error)}). "
                "Serve it with engine: transformers."
            ) from error
        self._num_loads += 1
        self._load_seconds += time.monotonic() - started

    def _check_and_copy(self, record: AdapterRecord) -> int:
        """Returns the bytes of the weights."""
        files = verified_files(self._registry, record, self._base_fingerprint)
        with naming(record):
            config = plain_config(record, files[CONFIG_FILE])
            self._raise_on_refused(record, config)
            tensors = load(files[WEIGHTS_FILE])
            check_weights(config, tensors, self._sites)
        folder = self._folder / record.digest
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return sum(tensor.nbytes for tensor in tensors.values())

    def _raise_on_refused(self, record: AdapterRecord, config: LoraConfig) -> None:
        if problems := vllm_problems(config.to_dict()):
            raise ServingError(
                f"adapter = {record.id!r}: vLLM cannot serve it ({'; '.join(problems)}). "
                "Serve it with engine: transformers, or merge it into its base (ft adapters merge)."
            )
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        if rank > self._max_rank:
            raise ServingError(
                f"adapter = {record.id!r}: its rank is {rank}, and this server has room for ranks up to "
                f"{self._max_rank}. Raise max_lora_rank."
            )

    async def _settle(self, llm: LoraEngine, digest: str) -> None:
        """Drop what nobody uses, if it was to be unloaded or could not be loaded."""
        entry = self._entries.get(digest)
        if entry is None or entry.users or entry.loading is None or not entry.loading.done():
            return
        if entry.unload or not entry.is_loaded:
            await self._drop(llm, digest)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.get_running_loop().create_task(work))
        task.add_done_callback(self._tasks.discard)

    async def _drop(self, llm: LoraEngine, digest: str) -> None:
        entry = self._entries.pop(digest)
        if entry.is_loaded:
            try:
                await llm.remove_lora(entry.request.lora_int_id)
            except VLLMError as error:
                logger.warning("adapter %s is not removed: %s", entry.record.id, error)
        if digest not in self._entries:  # nobody has asked for it meanwhile
            shutil.rmtree(self._folder / digest, ignore_errors=True)

    async def _drop_least_recent(self, llm: LoraEngine, capacity: int) -> None:
        """Those in use stay, even above the capacity: vLLM then loads them again from the copy."""
        idle = [digest for digest, entry in self._entries.items() if self._is_idle(entry)]
        while idle and sum(entry.is_loaded for entry in self._entries.values()) > max(capacity, 0):
            await self._drop(llm, idle.pop(0))

    def _is_idle(self, entry: _Entry) -> bool:
        return entry.is_loaded and entry.users == 0 and entry.record.id not in self._pinned
