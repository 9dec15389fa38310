"""Files of the API, as jobs use them."""

from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.file_wire import FINE_TUNE
from serve.fine_tuning.files import CONTENT
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import StoredFile
from serve.http.errors import ApiError
from serve.http.tenants import Tenant

RESULT_FILENAME = "step_metrics.csv"


class ApiFiles:
    """See `serve.fine_tuning.jobs.Files`."""

    def __init__(self, keeper: FileKeeper) -> None:
        self._keeper = keeper

    def for_training(self, owner: Tenant, file_id: str, param: str) -> StoredFile:
        """A file that is still being checked is accepted: the job checks its data again."""
        found = self._keeper.records.find_or_none(owner, file_id)
        if found is None:
            raise ApiError(400, f"{param}: the file {file_id[:100]!r} does not exist.", "file_not_found", param)
        file = found.shown
        if file.purpose != FINE_TUNE:
            message = f"{param}: the file {file.id} has the purpose {file.purpose!r}. Upload it with {FINE_TUNE!r}."
            raise ApiError(400, message, "invalid_file_purpose", param)
        if file.status == "error":
            message = f"{param}: the file {file.id} cannot be trained on. {file.status_details}"
            raise ApiError(400, f"{message} All errors: GET /v1/files/{file.id}/errors", "invalid_training_file", param)
        return StoredFile(file.id, file.filename, file.bytes, CONTENT, found.digest)

    def add_result(self, job: Job, content: bytes) -> str:
        owner = Tenant(job.key, job.key, job.organization, sees_all=False)
        return self._keeper.add_result(owner, job.id, RESULT_FILENAME, content)
