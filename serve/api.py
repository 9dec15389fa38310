"""The ASGI application of a server: all routes, behind access control, with errors in one shape. Needs no Ray."""

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serve.database.database import open_database
from serve.database.keys import find_key
from serve.http.access import AccessLog
from serve.http.errors import answer_errors_in_openai_shape
from serve.http.keys import HEALTH_PATH, RequireKey
from serve.http.openapi import describe
from serve.inference.models import ServedModels
from serve.inference.replies import Backend
from serve.inference.routes import BODIES, inference_routes
from serve.playground.routes import playground_routes
from serve.settings import ServeSettings


def create_api(models: ServedModels, backends: Mapping[str, Backend], settings: ServeSettings) -> FastAPI:
    """The application over the engines of each base, by the base's name."""
    database = open_database(settings.database) if settings.database else None
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    answer_errors_in_openai_shape(api)
    api.include_router(inference_routes(models, backends, settings, database))
    api.include_router(playground_routes())
    describe(api, "ft_service", version("ft-service"), BODIES)

    @api.get(HEALTH_PATH)
    @api.head(HEALTH_PATH, include_in_schema=False)
    async def health() -> dict[str, object]:
        return {"status": "ok", "models": [base.name for base in models.bases]}

    root_key = settings.api_key.get_secret_value() if settings.api_key else None
    api.add_middleware(RequireKey, root_key=root_key, find_key=partial(find_key, database) if database else None)
    api.add_middleware(AccessLog)  # around the check of keys, so that refused requests are in the log too
    if settings.allowed_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return api
