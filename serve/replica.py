"""The deployment of one base: an engine in a process of its own, behind a Ray Serve handle. Knows no HTTP."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from ray import serve

from ft_service.errors import FtError, StorageError
from ft_service.model.base import read_config, resolve_base
from ft_service.model.light_imports import light_imports
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.registry.servers import Announcement
from ft_service.storage.storage import Storage
from serve.engines.engine import Engine, EngineStats, GenerationChunk, GenerationRequest
from serve.settings import BaseSettings, ServeSettings

UNLOAD_SECONDS = 5.0
"""How often a replica looks for adapters that were deleted."""

logger = logging.getLogger(__name__)

MakeEngine = Callable[[BaseSettings, Registry], Engine]


def make_engine(base: BaseSettings, registry: Registry) -> Engine:
    """Load the base. Imports the engine's libraries here: Serve's controller and `ft serve` need none of them."""
    folder = resolve_base(base.base, base.revision)
    if base.engine == "vllm":
        from serve.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, registry, base)
    four_bit = base.precision == "nf4" or "quantization_config" in read_config(folder)
    # Loading belongs inside: transformers asks of each weight whether it is a distributed tensor.
    with light_imports(four_bit=four_bit):
        from serve.engines.transformers_engine import TransformersEngine

        return TransformersEngine(folder, registry, base)


@serve.deployment
class BaseReplica:
    """One engine. It accepts requests once the model is loaded."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServeSettings, base: BaseSettings, make_engine: MakeEngine = make_engine
    ) -> None:
        assert settings.storage
        self._registry = Registry(Storage(settings.storage))
        self._engine = await asyncio.to_thread(make_engine, base, self._registry)
        self._announcement = Announcement(self._registry.storage, self._served(base))
        self._announcement.start()
        self._unloading = asyncio.get_running_loop().create_task(self._unload_deleted())

    def _served(self, base: BaseSettings) -> BaseModelRef:
        return BaseModelRef(
            id=base.base,
            revision=base.revision,
            short_name=base.model_name,
            fingerprint=self._engine.info.base_fingerprint,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk | FtError, None]:
        """See `serve.engines.engine.Engine.generate`. Serve closes the generator when its caller goes away.

        An error of ours ends the stream as a value: raised here, it would arrive wrapped in this process's traceback,
        and Serve would log that for every client's mistake.
        """
        try:
            async with aclosing(self._engine.generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except FtError as error:
            logger.info("request %s: %s", request.id, error)
            yield error

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def _unload_deleted(self) -> None:
        """Drop adapters that are no longer published, whoever deleted them, by whichever way."""
        while True:
            await asyncio.sleep(UNLOAD_SECONDS)
            loaded = self._engine.stats().loaded_adapters
            if not loaded:
                continue
            try:
                published = {record.digest for record in await asyncio.to_thread(self._registry.records)}
            except StorageError as error:
                logger.warning("cannot look for deleted adapters: %s", error)
                continue
            for digest in set(loaded) - published:
                await self._engine.unload(digest)

    async def __del__(self) -> None:
        """Called by Serve before it stops a replica, once its requests have ended."""
        if hasattr(self, "_unloading"):
            self._unloading.cancel()
            await asyncio.to_thread(self._announcement.stop)
            await self._engine.close()
