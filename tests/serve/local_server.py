"""A server in this process: the whole application over a real engine, without Ray."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.engines.transformers_engine import TransformersEngine
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, ServeSettings
from tests.browser import served
from tests.serve.serving_world import World


class OneReplica:
    """A base with its engine in this process. See `serve.inference.replies.Backend`."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        return self.engine.generate(request)

    async def unload(self, adapter_digest: str) -> None:
        await self.engine.unload(adapter_digest)

    async def all_stats(self) -> list[EngineStats]:
        return [self.engine.stats()]


@contextmanager
def local_server(
    world: World,
    max_context: int | None = None,
    replica: Callable[[TransformersEngine], OneReplica] = OneReplica,
    **settings: object,
) -> Iterator[str]:
    """Its address, which ends in /v1. `settings` are those of the server."""
    base = BaseSettings(base=str(world.base), dtype="float32", max_batch=16, cache_gib=0.25, max_context=max_context)
    engine = TransformersEngine(world.base, world.registry, base)
    models = ServedModels(world.registry, [load_base(base)])
    api = create_api(models, {base.model_name: replica(engine)}, ServeSettings(storage=world.storage, **settings))
    with served(api) as url:
        yield f"{url}/v1"
