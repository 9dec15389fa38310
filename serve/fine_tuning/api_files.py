"""Files of the API, as jobs use them."""

import hashlib
from datetime import UTC, datetime

from sqlalchemy import Engine, select

from ft_service.storage.storage import Storage
from serve.database.database import session
from serve.database.tables import FileContentRow, FileRow, with_utc
from serve.fine_tuning.file_wire import FINE_TUNE, RESULTS
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import StoredFile
from serve.fine_tuning.paging import is_id, new_id
from serve.fine_tuning.tenants import Tenant
from serve.http.errors import ApiError

CONTENT = "files/content"


class ApiFiles:
    """See `serve.fine_tuning.jobs.Files`."""

    def __init__(self, engine: Engine, storage: Storage) -> None:
        self._engine = engine
        self._storage = storage

    def for_training(self, owner: Tenant, file_id: str, param: str) -> StoredFile:
        """A file that is still being checked is accepted: the job checks its data again."""
        with session(self._engine) as opened:
            row = opened.get(FileRow, file_id) if is_id(file_id, "file-") else None
        is_gone = row is None or (row.expires is not None and with_utc(row.expires) <= datetime.now(UTC))
        if row is None or is_gone or not owner.sees(row.key, row.organization):
            raise ApiError(400, f"{param}: the file {file_id[:100]!r} does not exist.", "file_not_found", param)
        if row.purpose != FINE_TUNE:
            message = f"{param}: the file {file_id} has the purpose {row.purpose!r}. Upload it with {FINE_TUNE!r}."
            raise ApiError(400, message, "invalid_file_purpose", param)
        if row.status == "error":
            reason = row.status_details or "it is no valid training file"
            message = f"{param}: the file {file_id} cannot be trained on. {reason}"
            raise ApiError(400, message, "invalid_training_file", param)
        return StoredFile(row.id, row.filename, row.size, CONTENT, row.digest)

    def add_result(self, job: Job, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        with session(self._engine) as opened:
            earlier = opened.scalar(select(FileRow.id).where(FileRow.job == job.id))
            if earlier is not None:
                return earlier
            opened.merge(FileContentRow(digest=digest, size=len(content)))
            opened.flush()
            row = FileRow(
                id=new_id("file-"),
                key=job.key,
                organization=job.organization,
                filename="step_metrics.csv",
                purpose=RESULTS,
                digest=digest,
                size=len(content),
                created=datetime.now(UTC),
                status="processed",
                job=job.id,
            )
            opened.add(row)
            opened.flush()
            self._storage.write_bytes(f"{CONTENT}/{digest}", content)
            file_id = row.id
            opened.commit()
        return file_id
