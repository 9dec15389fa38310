"""The gateway: the ingress deployment. It speaks HTTP, and asks the replicas of each base through Serve's handles."""

import logging
from collections.abc import AsyncGenerator, Mapping

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ft_service.errors import FtError, ServingError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.http.errors import ApiError
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import ServeSettings

ATTEMPTS = 2
RETRY_SECONDS = 2
BROADCAST_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Replicas:
    """The replicas of one base. See `serve.inference.replies.Backend`."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name = name
        self._handle = handle
        self._generate = handle.options(stream=True, method_name="generate")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`. Asks a second replica if the first dies before it has answered.

        Raises `ApiError` 429 when too many requests wait already.
        """
        for attempt in range(1, ATTEMPTS + 1):
            stream = self._generate.remote(request)
            assert isinstance(stream, DeploymentResponseGenerator)
            has_answered = False
            try:
                async for chunk in stream:
                    if isinstance(chunk, FtError):
                        raise chunk
                    has_answered = True
                    yield chunk
                return
            except BackPressureError:
                message = f"Too many requests wait for {self._name}. Try again in a moment."
                raise ApiError(429, message, "overloaded", retry_after=RETRY_SECONDS) from None
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("request %s: a replica of %s is gone (%s)", request.id, self._name, type(error).__name__)
                if has_answered or attempt == ATTEMPTS:
                    raise ServingError(f"The replica of {self._name} that was answering has died. Ask again.") from None
            finally:
                stream.cancel()  # of no effect once it has ended

    async def unload(self, adapter_digest: str) -> None:
        """Replicas that miss this notice find out by themselves within seconds."""
        try:
            await self._handle.broadcast("unload", adapter_digest).results_async(timeout_s=BROADCAST_SECONDS)
        except (TimeoutError, RuntimeError) as error:
            logger.warning("cannot ask the replicas of %s to unload %s: %s", self._name, adapter_digest[:8], error)

    async def all_stats(self) -> list[EngineStats]:
        try:
            return await self._handle.broadcast("stats").results_async(timeout_s=BROADCAST_SECONDS)
        except (TimeoutError, RuntimeError) as error:
            logger.warning("cannot ask the replicas of %s what they do: %s", self._name, error)
            return []


@serve.deployment
@serve.ingress()
class Gateway:
    """A replica of the gateway: all bases, one address."""

    def __init__(self, settings: ServeSettings, handles: Mapping[str, DeploymentHandle]) -> None:
        assert settings.storage
        bases = [load_base(base) for base in settings.bases]
        models = ServedModels(Registry(Storage(settings.storage)), bases)
        backends = {name: Replicas(name, handle) for name, handle in handles.items()}
        self._api = create_api(models, backends, settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api
