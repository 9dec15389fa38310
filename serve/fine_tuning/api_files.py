"""Files of the API, as jobs use them."""

from sqlalchemy import Engine

from ft_service.storage.storage import Storage
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import StoredFile
from serve.fine_tuning.tenants import Tenant
from serve.http.errors import ApiError


class ApiFiles:
    """See `serve.fine_tuning.jobs.Files`."""

    def __init__(self, engine: Engine, storage: Storage) -> None:
        self._engine = engine
        self._storage = storage

    def for_training(self, owner: Tenant, file_id: str, param: str) -> StoredFile:
        raise ApiError(400, f"{param}: the file {file_id!r} does not exist.", "file_not_found", param)

    def add_result(self, job: Job, content: bytes) -> str:
        raise NotImplementedError
