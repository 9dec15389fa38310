"""Files and uploads as the routes use them: records, contents and checks together."""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from ft_service.errors import DatabaseError, StorageError
from ft_service.storage.storage import Storage
from serve.fine_tuning.file_checks import FileChecks
from serve.fine_tuning.file_records import FILE_PREFIX, FileRecords, FoundFile, NewFile
from serve.fine_tuning.file_wire import (
    FINE_TUNE,
    RESULTS,
    CompleteRequest,
    ExpiresAfter,
    FileObject,
    Purpose,
    Upload,
)
from serve.fine_tuning.files import Arrival, FileStore
from serve.fine_tuning.paging import new_id
from serve.http.errors import ApiError
from serve.http.tenants import Tenant
from serve.settings import FileSettings

MIB = 2**20
_GIB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A file that was added. `check` ends when its check has ended; None for files that are not checked."""

    file: FileObject
    check: Future[None] | None


class FileKeeper:
    """Blocking; raises `ApiError`, `StorageError` and `DatabaseError`. Thread-safe."""

    def __init__(self, engine: Engine, storage: Storage, settings: FileSettings, bases: Mapping[str, Path]) -> None:
        """`bases` are names and folders of the bases whose tokens are counted."""
        self.settings = settings
        self.records = FileRecords(engine, int(settings.key_gib * _GIB))
        self.store = FileStore(storage)
        self.checks = FileChecks(self.records, self.store, bases, settings.min_examples)

    # -- files ---------------------------------------------------------------------------------------------------------

    def keep(
        self,
        owner: Tenant,
        file_id: str,
        arrival: Arrival,
        filename: str,
        purpose: Purpose,
        expires_after: ExpiresAfter | None,
    ) -> Kept:
        """Make a file of what has arrived. If that fails, nothing is left of it."""
        new = NewFile(
            id=file_id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            digest=arrival.digest,
            size=arrival.size,
            expires_seconds=None if expires_after is None else expires_after.seconds,
        )
        try:
            shown = self.records.add(new, lambda: self.store.publish(arrival))
        except BaseException:
            self.store.discard(arrival)
            raise
        return Kept(shown, self._start_check(shown, new.digest))

    def _start_check(self, file: FileObject, digest: str) -> Future[None] | None:
        return self.checks.start(FoundFile(file, digest)) if file.purpose == FINE_TUNE else None

    def delete(self, tenant: Tenant, file_id: str) -> None:
        self.records.delete(tenant, file_id, self.store.delete_content)
        self.store.delete_errors(file_id)

    def add_result(self, owner: Tenant, job: str, filename: str, content: bytes) -> str:
        """The result file of a job, added once. Quotas do not apply: the job is done."""
        if (known := self.records.result_of(job)) is not None:
            return known
        file_id = new_id(FILE_PREFIX)
        arrival = self.store.arrive(file_id)
        try:
            arrival.write(content)
            arrival.finish()
            new = NewFile(file_id, owner, filename, RESULTS, arrival.digest, arrival.size, job=job)
            return self.records.add(new, lambda: self.store.publish(arrival), within_quota=False).id
        except BaseException:
            arrival.abandon()
            self.store.discard(arrival)
            raise

    # -- uploads -------------------------------------------------------------------------------------------------------

    def complete(self, tenant: Tenant, upload_id: str, request: CompleteRequest) -> Upload:
        """Join the parts of an upload into a file, once. The same request again gets the same file."""
        digest = _digest_of(request)
        if (done := self.records.completed(tenant, upload_id, digest)) is not None:
            return done
        pending = self.records.pending_upload(tenant, upload_id)
        parts = self._parts(upload_id, request, pending.shown.bytes)
        file_id = new_id(FILE_PREFIX)
        arrival = self.store.join(file_id, upload_id, parts)
        try:
            if request.md5 is not None and arrival.md5 != request.md5.lower():
                message = f"md5: the parts have {arrival.md5}, and {request.md5} was expected. Send the parts again."
                raise ApiError(400, message, "checksum_mismatch", "md5")
            new = NewFile(
                id=file_id,
                owner=pending.owner,
                filename=pending.shown.filename,
                purpose=pending.shown.purpose,
                digest=arrival.digest,
                size=arrival.size,
                expires_seconds=pending.file_seconds,
            )
            upload = self.records.complete(upload_id, digest, new, lambda: self.store.publish(arrival))
        except BaseException as error:
            self.store.discard(arrival)
            done = self.records.completed(tenant, upload_id, digest) if isinstance(error, ApiError) else None
            if done is not None:  # the same request has come twice, at once
                return done
            raise
        self._delete_parts(upload_id)
        assert upload.file is not None
        self._start_check(upload.file, new.digest)
        return upload

    def _parts(self, upload_id: str, request: CompleteRequest, size: int) -> list[tuple[str, int]]:
        """Ids and sizes of the parts, in order. Raises `ApiError` 400."""
        sizes = self.records.sizes_of_parts(upload_id)
        if unknown := [part for part in request.part_ids if part not in sizes]:
            message = f"part_ids: the upload {upload_id} has no part {unknown[0]!r}."
            raise ApiError(400, message, "part_not_found", "part_ids")
        if len(set(request.part_ids)) < len(request.part_ids):
            raise ApiError(400, "part_ids: a part is named twice.", "invalid_value", "part_ids")
        total = sum(sizes[part] for part in request.part_ids)
        if total != size:
            message = f"part_ids: the parts have {total:,} bytes, and the upload was created for {size:,}."
            raise ApiError(400, message, "size_mismatch", "part_ids")
        return [(part, sizes[part]) for part in request.part_ids]

    def cancel(self, tenant: Tenant, upload_id: str) -> Upload:
        upload = self.records.cancel(tenant, upload_id)
        self._delete_parts(upload_id)
        return upload

    def _delete_parts(self, upload_id: str) -> None:
        """What cannot be deleted now is deleted by `tidy`."""
        try:
            self.store.delete_parts(upload_id)
        except StorageError as error:
            logger.warning("%s: its parts are left (%s)", upload_id, error)

    # -- now and then --------------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Delete what has expired and what interrupted processes have left; check what they have not checked.

        Any number of processes may do so at once. What fails is logged, and done the next time.
        """
        for step in (self._delete_expired, self._delete_leftovers, self._check_interrupted):
            try:
                step()
            except (ApiError, DatabaseError, StorageError) as error:
                logger.warning("files: %s (%s)", step.__name__.strip("_"), error)

    def _delete_expired(self) -> None:
        self.records.mark_expired()
        for file_id in self.records.finish_deletions(self.store.delete_content):
            self.store.delete_errors(file_id)
        self.records.forget_old_uploads()

    def _delete_leftovers(self) -> None:
        self.store.delete_old_arrivals(self.records.clock().timestamp())
        for digest in self.records.unknown_digests(self.store.digests()):
            self.records.delete_content_if_unused(digest, self.store.delete_content)
        for upload_id in self.records.ended_uploads(self.store.uploads()):
            self.store.delete_parts(upload_id)
        for file_id in self.records.unknown_files(self.store.files_with_errors()):
            self.store.delete_errors(file_id)

    def _check_interrupted(self) -> None:
        for file in self.records.interrupted_checks():
            self.checks.check(file)


def _digest_of(request: CompleteRequest) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
