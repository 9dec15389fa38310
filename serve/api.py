"""The ASGI application of a server: all routes, behind access control, with errors in one shape. Needs no Ray."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.database.keys import find_key
from serve.fine_tuning import file_routes, job_routes
from serve.fine_tuning.full_models import FullModels
from serve.fine_tuning.job_records import JobRecords
from serve.fine_tuning.routes import fine_tuning_routes
from serve.http.access import REQUEST_ID_HEADER, AccessLog
from serve.http.errors import ApiError, answer_errors_in_openai_shape
from serve.http.in_flight import CountInFlight, InFlight, stopping
from serve.http.keys import HEALTH_PATH, READY_PATH, RequireKey
from serve.http.openapi import describe
from serve.http.traces import TraceRequests
from serve.inference.models import BASE_HEADER, DIGEST_HEADER, ServedModels
from serve.inference.replies import Backend
from serve.inference.routes import BODIES, inference_routes
from serve.jobs_page.routes import jobs_page_routes
from serve.playground.routes import playground_routes
from serve.settings import ServeSettings
from serve.tracing import Tracing
from serve.transport import BodyFromScope
from serve.voting import routes as voting


async def _none_missing() -> Collection[str]:
    return ()


def create_api(
    models: ServedModels,
    backends: Mapping[str, Backend],
    settings: ServeSettings,
    missing: Callable[[], Awaitable[Collection[str]]] = _none_missing,
    in_flight: InFlight | None = None,
    training: ClusterNodes | None = None,
    serving: ClusterNodes | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over the engines of each base, by the base's name.

    `missing` names the bases that cannot answer yet; readiness depends on it. `in_flight` counts requests, and stops
    the server. `training` and `serving` are the clusters that train fine-tuning jobs and serve their models, where
    their nodes are known. `tracing` has a span for each request.
    """
    in_flight = in_flight or InFlight()
    database = open_database(settings.database) if settings.database else None
    records = JobRecords(database) if database is not None else None
    if records is not None:
        models.add_names(records)
        if settings.fine_tuning is not None:
            models.add_bases(FullModels(records, models.registry, settings, models.bases))
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    answer_errors_in_openai_shape(api)
    api.include_router(inference_routes(models, backends, settings, database, in_flight))
    api.include_router(playground_routes())
    if database is not None and settings.storage:
        api.include_router(voting.voting_routes(database, Storage(settings.storage)))
    api.include_router(jobs_page_routes(database, settings))
    api.include_router(
        fine_tuning_routes(
            records, settings, {base.name: base.folder for base in models.bases}, in_flight, training, serving
        )
    )
    describe(
        api, "ft_service", version("ft-service"), [*BODIES, *voting.BODIES, *file_routes.BODIES, *job_routes.BODIES]
    )

    @api.get(HEALTH_PATH)
    @api.head(HEALTH_PATH, include_in_schema=False)
    async def health() -> dict[str, object]:
        return {"status": "ok", "models": [base.name for base in models.bases]}

    @api.get(READY_PATH)
    @api.head(READY_PATH, include_in_schema=False)
    async def ready() -> dict[str, object]:
        """For load balancers: whether every base has a replica, or starts one when it is asked for."""
        if in_flight.is_stopping:
            raise stopping()
        if names := ", ".join(await missing()):
            raise ApiError(503, f"No replica runs yet: {names}.", "not_ready", retry_after=2)
        return {"status": "ready"}

    root_key = settings.api_key.get_secret_value() if settings.api_key else None
    api.add_middleware(
        RequireKey,
        root_key=root_key,
        find_key=partial(find_key, database) if database else None,
        allowed_origins=settings.allowed_origins,
    )
    api.add_middleware(CountInFlight, in_flight=in_flight)
    if tracing is not None:
        api.add_middleware(TraceRequests, tracing=tracing)
    api.add_middleware(AccessLog)  # around the check of keys, so that refused requests are in the log too
    if settings.allowed_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client in a page sends a dozen `x-stainless-*`, and new ones come
            expose_headers=[REQUEST_ID_HEADER, DIGEST_HEADER, BASE_HEADER, "retry-after"],
        )
    api.add_middleware(BodyFromScope)
    return api
