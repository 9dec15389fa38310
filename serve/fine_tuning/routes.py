"""All routes of the fine-tuning API, or the reason why a server has none."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter

from ft_service.cluster.queue.capacity import ClusterNodes
from ft_service.storage.storage import Storage
from serve.fine_tuning.api_files import ApiFiles
from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.file_routes import file_routes
from serve.fine_tuning.job_records import JobRecords
from serve.fine_tuning.job_routes import job_routes
from serve.fine_tuning.jobs import Jobs
from serve.fine_tuning.serving_room import ServingRoom
from serve.fine_tuning.templates import with_templates_read
from serve.http.errors import ApiError
from serve.http.in_flight import InFlight
from serve.settings import ServeSettings


def fine_tuning_routes(
    records: JobRecords | None,
    settings: ServeSettings,
    bases: Mapping[str, Path],
    in_flight: InFlight,
    training: ClusterNodes | None = None,
    serving: ClusterNodes | None = None,
) -> APIRouter:
    """`records` None: the server has no database. `bases` are names and folders, for counts of tokens.

    `training` and `serving` are the clusters that train the jobs and serve their models, where their nodes are known.
    """
    settings = with_templates_read(settings)
    if settings.fine_tuning is None or records is None or settings.storage is None:
        missing = "a database: set FT_DATABASE_URL" if settings.fine_tuning else "the setting fine_tuning"
        return _absent(f"Fine-tuning is not set up on this server. It needs {missing} (docs/fine-tuning.md).")
    storage = Storage(settings.storage)
    keeper = FileKeeper(records.engine, storage, settings.fine_tuning.files, bases)
    jobs = Jobs(records, storage, settings, ApiFiles(keeper), training, ServingRoom(settings, serving))
    api = APIRouter()
    api.include_router(file_routes(keeper))
    api.include_router(job_routes(jobs, settings.fine_tuning.organization, in_flight))
    return api


def _absent(message: str) -> APIRouter:
    api = APIRouter()

    def absent() -> None:
        raise ApiError(501, message, "fine_tuning_not_available")

    for path in ("/v1/files", "/v1/files/{path:path}", "/v1/uploads", "/v1/fine_tuning/{path:path}"):
        api.add_api_route(path, absent, methods=["GET", "POST"], include_in_schema=False)

    return api
