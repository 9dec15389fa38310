"""The gateway: the ingress deployment. It speaks HTTP, and asks the replicas of each base through Serve's handles."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ft_service.cluster.queue.capacity import RayNodes
from ft_service.cluster.storage_metrics import export_storage_metrics
from ft_service.errors import FtError, ServingError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.coalesce import merge
from serve.engines.engine import EngineStats, GenerationChunk, GenerationRequest
from serve.http.errors import ApiError
from serve.http.in_flight import InFlight
from serve.inference.bases import load_base
from serve.inference.deletions import Deletions
from serve.inference.models import ServedModels
from serve.inference.replies import WAITING
from serve.log import log_with_serve
from serve.model_apps import application_of
from serve.settings import ServeSettings
from serve.tracing import Tracing
from serve.transport import spare_proxy_calls

ATTEMPTS = 2
RETRY_SECONDS = 2
BROADCAST_SECONDS = 5.0
READINESS_SECONDS = 2.0
"""So old an answer about readiness may be: load balancers ask often, and the controller has other work."""

_REPLICA_IS_GONE = (RayActorError, ObjectLostError, ReplicaUnavailableError)
"""`ObjectLostError`: a large chunk lay in the memory of a node that is gone."""

_BEGUN = GenerationChunk("", ())
QUEUED_SECONDS = 0.1
"""A request that has no replica after so long waits in the queue of its base."""

logger = logging.getLogger(__name__)


class Replicas:
    """The replicas of one base. See `serve.inference.replies.Backend`."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name = name
        self._handle = handle
        # Over gRPC a chunk costs less CPU than over Ray's object store, and plain pickle writes it in a third of
        # the time of cloudpickle, Serve's default (docs/benchmarks.md).
        self._generate = handle.options(
            stream=True,
            method_name="generate",
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `serve.engines.engine.Engine.generate`. Asks a second replica if the first dies before it has answered.

        A `whole` answer comes at its end, because nothing of it has been sent when its replica dies: a chunk without
        tokens says that it has begun, once. Raises `ApiError` 429 when too many requests wait already.
        """
        has_begun = False
        for attempt in range(1, ATTEMPTS + 1):
            stream = self._generate.remote(request)
            assert isinstance(stream, DeploymentResponseGenerator)
            held: list[GenerationChunk] = []
            try:
                if not request.whole and await _is_queued(stream):
                    yield WAITING
                async for chunk in stream:
                    if isinstance(chunk, FtError):
                        raise chunk
                    if request.whole:
                        held.append(chunk)
                    if not (request.whole and has_begun):
                        has_begun = True
                        yield _BEGUN if request.whole else chunk
                if held:
                    yield merge(held)
                return
            except BackPressureError:
                message = f"Too many requests wait for {self._name}. Try again in a moment."
                raise ApiError(429, message, "overloaded", retry_after=RETRY_SECONDS) from None
            except DeploymentUnavailableError:  # a full model that was deleted on Serve, until it is deployed again
                if has_begun:
                    raise ServingError(f"{self._name} was taken away while it was answering. Ask again.") from None
                message = f"{self._name} is not deployed at this moment. Try again."
                raise ApiError(503, message, "not_ready", retry_after=RETRY_SECONDS) from None
            except _REPLICA_IS_GONE as error:
                logger.warning("request %s: a replica of %s is gone (%s)", request.id, self._name, type(error).__name__)
                if (has_begun and not request.whole) or attempt == ATTEMPTS:
                    raise ServingError(f"The replica of {self._name} that was answering has died. Ask again.") from None
            except (asyncio.CancelledError, GeneratorExit):
                stream.cancel()  # only here: it raises a failure of the stream again
                raise

    async def unload(self, adapter_digest: str) -> None:
        """Replicas that miss this notice find out by themselves within seconds."""
        await self._broadcast("unload", adapter_digest)

    async def all_stats(self) -> list[EngineStats]:
        return [stats for stats in await self._broadcast("stats") if isinstance(stats, EngineStats)]

    async def _broadcast(self, method: str, *arguments: object) -> list[object]:
        """What each replica returns that answers in time; nothing while none runs."""
        try:
            responses = self._handle.broadcast(method, *arguments)
            results = await responses.results_async(timeout_s=BROADCAST_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("cannot ask the replicas of %s for %s: %s", self._name, method, error)
            return []
        for failure in (result for result in results if isinstance(result, BaseException)):
            logger.warning("a replica of %s did not answer %s: %s", self._name, method, type(failure).__name__)
        return [result for result in results if not isinstance(result, BaseException)]


async def _is_queued(stream: DeploymentResponseGenerator) -> bool:
    """Whether no replica has a place for it within `QUEUED_SECONDS`. An error is left to whoever reads the stream."""
    assignment = asyncio.wrap_future(stream._replica_result_future)
    assignment.add_done_callback(lambda done: done.cancelled() or done.exception())
    done, _ = await asyncio.wait([assignment], timeout=QUEUED_SECONDS)
    return not done


class Backends(Mapping[str, Replicas]):
    """The replicas of every base by its name: those of the settings, and of the full models that were asked so far."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], application: str) -> None:
        """`application` is the server's own on Ray Serve."""
        self._application = application
        self._all = {name: Replicas(name, handle) for name, handle in handles.items()}

    def __getitem__(self, name: str) -> Replicas:
        """A handle waits for its deployment, so a model may be asked before it is deployed again after a restart."""
        if name not in self._all:
            handle = serve.get_deployment_handle(name, application_of(self._application, name), _check_exists=False)
            self._all[name] = Replicas(name, handle)
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._all))

    def __len__(self) -> int:
        return len(self._all)


class Readiness:
    """Which bases have no replica, although they must have one. Serve's controller knows."""

    def __init__(self, application: str, bases: Collection[str]) -> None:
        """`bases` are those that never scale to zero."""
        self._application = application
        self._bases = tuple(bases)
        self._missing = self._bases
        self._expires = 0.0
        self._lock = asyncio.Lock()

    async def missing(self) -> Collection[str]:
        async with self._lock:
            if time.monotonic() >= self._expires:
                try:
                    self._missing = await asyncio.to_thread(self._ask)
                except (RayError, RayServeException, KeyError) as error:  # replicas answer without a controller, too
                    logger.warning("cannot ask Serve's controller which replicas run: %s", error)
                self._expires = time.monotonic() + READINESS_SECONDS
        return self._missing

    def _ask(self) -> tuple[str, ...]:
        deployments = serve.status().applications[self._application].deployments
        return tuple(base for base in self._bases if not deployments[base].replica_states.get(ReplicaState.RUNNING))


def _training_cluster(settings: ServeSettings) -> RayNodes | None:
    """This cluster, if it is the one that trains fine-tuning jobs."""
    address = settings.fine_tuning.ray_address if settings.fine_tuning else ""
    dashboard = address.removeprefix("http://").rstrip("/")
    return RayNodes() if address == "auto" or dashboard == ray._private.worker.get_dashboard_url() else None


@serve.deployment
@serve.ingress()
class Gateway:
    """A replica of the gateway: all bases, one address."""

    def __init__(
        self,
        settings: ServeSettings,
        handles: Mapping[str, DeploymentHandle],
        controller: DeploymentHandle | None = None,
    ) -> None:
        """`controller` of fine-tuning jobs is here only to be part of the application."""
        assert settings.storage
        log_with_serve()
        export_storage_metrics()
        spare_proxy_calls()
        bases = [load_base(base) for base in settings.bases]
        storage = Storage(settings.storage)
        models = ServedModels(Registry(storage), bases)
        models.read_ahead()
        application = serve.get_replica_context().app_name
        backends = Backends(handles, application)
        always_on = [base.model_name for base in settings.bases if not base.may_scale_to_zero]
        readiness = Readiness(application, always_on)
        Deletions(storage, {base.ref.fingerprint for base in bases}, settings.database).start()
        self._in_flight = InFlight()
        self._tracing = Tracing.from_environment("ft-gateway")
        self._api = create_api(
            models,
            backends,
            settings,
            readiness.missing,
            self._in_flight,
            _training_cluster(settings),
            RayNodes(),
            self._tracing,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    async def refuse_new(self) -> int:
        """See `serve.http.in_flight.InFlight.refuse_new`."""
        return self._in_flight.refuse_new()

    async def cut(self) -> int:
        """See `serve.http.in_flight.InFlight.cut`."""
        return self._in_flight.cut()
