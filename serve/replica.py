"""The deployment of one base: an engine in a process of its own, behind a Ray Serve handle. Knows no HTTP."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path

from ray import serve

from ft_service.cluster.storage_metrics import export_storage_metrics
from ft_service.errors import FtError, ServingError, StorageError
from ft_service.model.base import read_config, resolve_base
from ft_service.model.light_imports import light_imports
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.registry.servers import Announcement
from ft_service.storage.storage import Storage
from serve.coalesce import coalesced
from serve.engines.engine import Engine, EngineStats, GenerationChunk, GenerationRequest
from serve.log import log_fields, log_with_serve
from serve.metrics import EngineMetrics
from serve.settings import BaseSettings, ServeSettings
from serve.tracing import Tracing

CHUNK_SECONDS = 0.03
"""After its first token a stream gets a chunk at most this often. A reader sees no difference, and what a chunk costs
between engine and client hardly depends on its tokens."""
CHUNKS_PER_SECOND = 125
"""Of all streams of a replica. Each takes about 0.3 ms from the thread that feeds the model."""
LONGEST_CHUNK_SECONDS = 0.2
"""However many streams there are, a reader sees text move."""
CARE_SECONDS = 5.0
"""How often a replica exports its metrics, and looks for adapters that were deleted."""

logger = logging.getLogger(__name__)

MakeEngine = Callable[[BaseSettings, Registry], Engine]


def make_engine(base: BaseSettings, registry: Registry) -> Engine:
    """Load the base. Imports the engine's libraries here: Serve's controller and `ft serve` need none of them."""
    folder = resolve_base(base.base, base.revision)
    if base.engine == "vllm":
        return _vllm_engine(folder, registry, base)
    four_bit = base.precision == "nf4" or "quantization_config" in read_config(folder)
    # Loading belongs inside: transformers asks of each weight whether it is a distributed tensor.
    with light_imports(four_bit=four_bit):
        from serve.engines.transformers_engine import TransformersEngine

        return TransformersEngine(folder, registry, base)


def _vllm_engine(folder: Path, registry: Registry, base: BaseSettings) -> Engine:
    if find_spec("vllm") is None:
        raise ServingError(
            f"engine = 'vllm': vllm is not installed in the environment of {sys.executable}. Set `python` to the "
            "interpreter of an environment that has it (docs/serving.md, Engines), or use engine: transformers."
        )
    from serve.engines.vllm_engine import VllmEngine

    return VllmEngine(folder, registry, base)


def chunk_seconds(streams: int) -> float:
    """How long a stream waits between two chunks while a replica feeds so many."""
    return min(max(CHUNK_SECONDS, streams / CHUNKS_PER_SECOND), LONGEST_CHUNK_SECONDS)


@serve.deployment
class BaseReplica:
    """One engine. It accepts requests once the model is loaded."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServeSettings, base: BaseSettings, make_engine: MakeEngine = make_engine
    ) -> None:
        assert settings.storage
        log_with_serve()
        export_storage_metrics()
        self._registry = Registry(Storage(settings.storage))
        self._engine = await asyncio.to_thread(make_engine, base, self._registry)
        self._announcement = Announcement(self._registry.storage, self._served(base))
        self._announcement.start()
        self._base_name = base.model_name
        self._tracing = Tracing.from_environment("ft-engine")
        self._metrics = EngineMetrics(base.model_name, serve.get_replica_context().replica_id.unique_id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams = 0
        self._care = asyncio.get_running_loop().create_task(self._take_care())

    def _served(self, base: BaseSettings) -> BaseModelRef:
        return BaseModelRef(
            id=base.base,
            revision=base.revision,
            short_name=base.model_name,
            fingerprint=self._engine.info.base_fingerprint,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk | FtError, None]:
        """See `serve.engines.engine.Engine.generate`. Serve closes the generator when its caller goes away.

        Our own errors end the stream as a value: raised here, one would arrive wrapped in this process's traceback,
        and Serve would log that for every client's mistake.
        """
        began = time.perf_counter()
        span = self._tracing.begin_answer(request, self._base_name) if self._tracing and request.traceparent else None
        tokens = 0
        cached_tokens = 0
        outcome = "cancelled"
        self._streams += 1
        try:
            interval = None if request.whole else lambda: chunk_seconds(self._streams)
            async with aclosing(coalesced(self._engine.generate(request), interval)) as chunks:
                async for chunk in chunks:
                    tokens += len(chunk.token_ids)
                    cached_tokens += chunk.cached_tokens
                    if span is not None:
                        span.add(chunk)
                    yield chunk
            outcome = "ok"
        except FtError as error:
            outcome = f"{type(error).__name__}: {error}"
            yield error
        finally:
            self._streams -= 1
            if span is not None:
                span.end(outcome.partition(":")[0], tokens, cached_tokens)
            fields = {
                "request": request.id,
                "adapter": request.adapter.id if request.adapter else None,
                "outcome": outcome,
                "prompt_tokens": len(request.prompt_ids),
                "generated_tokens": tokens,
                "seconds": round(time.perf_counter() - began, 4),
            }
            log_fields(logger, fields)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine has ended."""
        self._engine.stats()

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def unload(self, adapter_digest: str) -> None:
        """See `serve.engines.engine.Engine.unload`; returns at once."""
        self._tasks.add(task := asyncio.get_running_loop().create_task(self._engine.unload(adapter_digest)))
        task.add_done_callback(self._tasks.discard)

    async def _take_care(self) -> None:
        while True:
            await asyncio.sleep(CARE_SECONDS)
            try:
                stats = self._engine.stats()
                self._metrics.export(stats)
                if stats.loaded_adapters:
                    await self._unload_deleted(stats.loaded_adapters)
            except Exception:  # otherwise one failure would end the metrics and the care of this replica for good
                logger.exception("a round of care failed; the next one is in %g seconds", CARE_SECONDS)

    async def _unload_deleted(self, loaded: Sequence[str]) -> None:
        """Drop adapters that are no longer published, whoever deleted them, by whichever way."""
        try:
            published = {record.digest for record in await asyncio.to_thread(self._registry.records)}
        except StorageError as error:
            logger.warning("cannot look for deleted adapters: %s", error)
            return
        for digest in set(loaded) - published:
            await self.unload(digest)

    async def __del__(self) -> None:
        """Called by Serve before it stops a replica, once its requests have ended."""
        if hasattr(self, "_care"):
            self._care.cancel()
            await asyncio.to_thread(self._announcement.stop)
            await self._engine.close()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
