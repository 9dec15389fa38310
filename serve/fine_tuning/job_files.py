"""A job's folder on storage: what was accepted, and links to its data.

<storage>/jobs/<job id>/job.json    the job as it was accepted
<storage>/jobs/<job id>/data/       hard links to its files, so that a file that is deleted meanwhile does no harm
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from ft_service.errors import DatabaseError, StorageError, UnreachableError
from ft_service.storage.storage import Storage
from serve.fine_tuning.job_records import Job, JobRecords

JOBS_FOLDER = "jobs"
_MARKER = "files.json"

logger = logging.getLogger(__name__)


class JobFolder:
    """Reads and writes one job's folder."""

    def __init__(self, storage: Storage, job_id: str) -> None:
        self._storage = storage
        self._job_id = job_id
        self.path = f"{JOBS_FOLDER}/{job_id}"

    def write_if_absent(self, job: Job) -> None:
        """Record an accepted job, so that it is known without the database."""
        if not self._storage.exists(f"{self.path}/job.json"):
            self._storage.write_json(f"{self.path}/job.json", {"format": 1, **_as_json(job)})

    def check_is_there(self) -> None:
        """Raise `UnreachableError` unless the accepted job is on storage.

        A file system that is not mounted looks empty, and must not pass for one where nothing has happened yet.
        """
        if not self._storage.exists(f"{self.path}/job.json"):
            raise UnreachableError(f"{self._storage.uri(self.path)}: is missing. Check that the storage is mounted.")

    def complete(self, job: Job) -> None:
        """Record an accepted job whose gateway was killed just before. Raises as `check_is_there`."""
        if self._storage.exists(f"{self.path}/data/{_MARKER}"):
            self.write_if_absent(job)
        self.check_is_there()

    def link_data(self, folder: str, names: Mapping[str, str]) -> None:
        """Link files of `folder` on storage: role -> file name. Doing it again changes nothing."""
        added = {_MARKER: json.dumps(dict(names)).encode()}
        self._storage.publish_within(folder, sorted(set(names.values())), f"{self.path}/data", added, marker=_MARKER)

    def data(self, role: str) -> str | None:
        """Where the file of a role is; None if the job has none. Raises `StorageError`."""
        names = self._storage.read_json(f"{self.path}/data/{_MARKER}")
        return self._storage.uri(f"{self.path}/data/{names[role]}") if role in names else None

    def delete(self) -> None:
        """Of a job that was not accepted."""
        self._storage.delete(self.path)

    def delete_quietly(self) -> None:
        """Like `delete`, where another error is on its way."""
        with suppress(StorageError):
            self.delete()

    def delete_data(self, records: JobRecords) -> None:
        """Once the job has ended: the files' own content stays. What cannot be deleted now is left, and logged."""
        try:
            self.check_is_there()
            self._storage.delete(f"{self.path}/data")
            records.mark_data_deleted(self._job_id)
        except (DatabaseError, StorageError) as error:
            logger.warning("%s: a job's links to its data are left for now (%s)", self.path, error)


def delete_ended_data(records: JobRecords, storage: Storage) -> None:
    """Delete the links of ended jobs that an interrupted process has left. Raises `DatabaseError`."""
    for job_id in records.ended_with_data():
        JobFolder(storage, job_id).delete_data(records)


def _as_json(job: Job) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(job).items()}
