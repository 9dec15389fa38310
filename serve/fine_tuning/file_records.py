"""Files and uploads in the database.

A content on storage is published and deleted while its row in `file_contents` is locked, so an upload of the same bytes
never loses them to a deletion that happens at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, CursorResult, Engine, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from serve.database.audit import audit
from serve.database.database import lock_name, session
from serve.database.tables import FileContentRow, FileRow, UploadPartRow, UploadRow, with_utc
from serve.fine_tuning.file_wire import (
    FINE_TUNE,
    PURPOSES,
    FileObject,
    FileStatus,
    FileValidation,
    Purpose,
    Upload,
    UploadPart,
)
from serve.fine_tuning.paging import Order, is_id, page_of
from serve.http.errors import ApiError
from serve.http.tenants import Tenant

FILE_PREFIX = "file-"
UPLOAD_PREFIX = "upload_"
PART_PREFIX = "part_"
CHECK_SECONDS = 900.0
"""A check that began longer ago was interrupted, and starts again."""
DELETED = "deleted"
"""Status of a file whose deletion has begun: no client sees it any more."""
KEPT_UPLOADS = timedelta(days=30)
"""So long an upload that has ended can be asked for."""

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class NewFile:
    """A file whose content has arrived."""

    id: str
    owner: Tenant
    filename: str
    purpose: Purpose
    digest: str
    size: int
    expires_seconds: int | None = None
    job: str | None = None


@dataclass(frozen=True)
class FoundFile:
    """A file and where its content is."""

    shown: FileObject
    digest: str

    @property
    def id(self) -> str:
        return self.shown.id

    @property
    def size(self) -> int:
        return self.shown.bytes


@dataclass(frozen=True)
class PendingUpload:
    """An upload that takes parts."""

    shown: Upload
    file_seconds: int | None
    owner: Tenant


def utc_now() -> datetime:
    return datetime.now(UTC)


class FileRecords:
    """All reads and writes of files and uploads. Thread-safe. Every call raises `DatabaseError` if the database fails.

    `max_key_bytes` is what the files and uploads of one key may have in all. Additions to a key come one after another,
    so that two at the same time, at two gateways, do not exceed it together.
    """

    def __init__(self, engine: Engine, max_key_bytes: int, clock: Clock = utc_now) -> None:
        self._engine = engine
        self._max_key_bytes = max_key_bytes
        self.clock = clock

    # -- files ---------------------------------------------------------------------------------------------------------

    def find(self, tenant: Tenant, file_id: str) -> FoundFile:
        """Raises `ApiError` 404."""
        found = self.find_or_none(tenant, file_id)
        if found is None:
            raise no_such_file(file_id)
        return found

    def find_or_none(self, tenant: Tenant, file_id: str) -> FoundFile | None:
        if not is_id(file_id, FILE_PREFIX):
            return None
        with session(self._engine) as opened:
            row = opened.scalar(select(FileRow).where(FileRow.id == file_id, *self._visible(tenant)))
            return None if row is None else _found(row)

    def list_files(
        self, tenant: Tenant, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[list[FileObject], bool]:
        """A page, and whether more follow. Raises `ApiError` 400."""
        query = select(FileRow).where(*self._visible(tenant))
        if purpose is not None and purpose not in PURPOSES:
            return [], False
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        with session(self._engine) as opened:
            rows, has_more = page_of(opened, query, FileRow.id, FILE_PREFIX, after=after, limit=limit, order=order)
            return [_shown(row) for row in rows], has_more

    def result_of(self, job: str) -> str | None:
        """Id of the result file of a job."""
        with session(self._engine) as opened:
            return opened.scalar(select(FileRow.id).where(FileRow.job == job))

    def add(self, new: NewFile, publish: Callable[[], None], *, within_quota: bool = True) -> FileObject:
        """Add a file; `publish` makes its content available, in the same transaction. Raises `ApiError` 403."""
        with session(self._engine) as opened:
            if within_quota:
                _lock_quota(opened, new.owner)
                self._check_quota(opened, new.owner, new.size)
            self._lock_content(opened, new.digest, new.size)
            shown = self._add(opened, new)
            publish()
            opened.commit()
        return shown

    def _add(self, opened: Session, new: NewFile) -> FileObject:
        now = self.clock()
        is_checked = new.purpose == FINE_TUNE
        row = FileRow(
            id=new.id,
            key=new.owner.key,
            organization=new.owner.organization,
            filename=new.filename,
            purpose=new.purpose,
            digest=new.digest,
            size=new.size,
            created=now,
            expires=None if new.expires_seconds is None else now + timedelta(seconds=new.expires_seconds),
            status="uploaded" if is_checked else "processed",
            checked_since=now if is_checked else None,
            job=new.job,
        )
        opened.add(row)
        opened.flush()
        return _shown(row)

    def delete(self, tenant: Tenant, file_id: str, delete_content: Callable[[str], None]) -> None:
        """Delete a file, and its content unless another file has the same. Raises `ApiError` 404.

        The file is gone for clients at once. If `delete_content` fails, or the process is killed, the same call goes on
        with it, and so does `finish_deletions`.
        """
        if not is_id(file_id, FILE_PREFIX):
            raise no_such_file(file_id)
        with session(self._engine) as opened:
            mine = (FileRow.id == file_id, tenant.visible(FileRow), self._has_not_expired())
            digest = opened.scalar(select(FileRow.digest).where(*mine))
            if digest is None:
                raise no_such_file(file_id)
            self._mark_deleted(opened, tenant.name, file_id)
            opened.commit()
        if not self._finish_deletion(file_id, digest, delete_content):
            raise no_such_file(file_id)  # another request has deleted it meanwhile

    def mark_expired(self) -> None:
        """Begin to delete the files that have expired."""
        is_over = (FileRow.expires <= self.clock(), FileRow.status != DELETED)
        with session(self._engine) as opened:
            for file_id in list(opened.scalars(select(FileRow.id).where(*is_over))):
                self._mark_deleted(opened, "expired", file_id)
            opened.commit()

    def finish_deletions(self, delete_content: Callable[[str], None]) -> list[str]:
        """Go on with every deletion that has begun. Returns the ids of the files."""
        with session(self._engine) as opened:
            begun = select(FileRow.id, FileRow.digest).where(FileRow.status == DELETED)
            found = [(str(file_id), str(digest)) for file_id, digest in opened.execute(begun)]
        return [file_id for file_id, digest in found if self._finish_deletion(file_id, digest, delete_content)]

    def _mark_deleted(self, opened: Session, by: str, file_id: str) -> None:
        known = update(FileRow).where(FileRow.id == file_id, FileRow.status != DELETED)
        marked = opened.execute(known.values(status=DELETED))
        assert isinstance(marked, CursorResult)
        if marked.rowcount:
            audit(opened, by, "files.delete", file_id)

    def _finish_deletion(self, file_id: str, digest: str, delete_content: Callable[[str], None]) -> bool:
        """False if the file was gone already."""
        lock = update(FileContentRow).where(FileContentRow.digest == digest).values(digest=digest)
        with session(self._engine) as opened:
            opened.execute(lock)
            deleted = opened.execute(delete(FileRow).where(FileRow.id == file_id, FileRow.status == DELETED))
            assert isinstance(deleted, CursorResult)
            if deleted.rowcount == 0:
                return False
            opened.flush()
            self._delete_unused(opened, digest, delete_content)
            opened.commit()
        return True

    def delete_content_if_unused(self, digest: str, delete_content: Callable[[str], None]) -> None:
        """Delete a content that no file has. Without effect while one has it."""
        with session(self._engine) as opened:
            self._lock_content(opened, digest, 0, keep_size=True)
            self._delete_unused(opened, digest, delete_content)
            opened.commit()

    def _delete_unused(self, opened: Session, digest: str, delete_content: Callable[[str], None]) -> None:
        if opened.scalar(select(FileRow.id).where(FileRow.digest == digest).limit(1)) is None:
            opened.execute(delete(FileContentRow).where(FileContentRow.digest == digest))
            delete_content(digest)

    def unknown_digests(self, digests: set[str]) -> set[str]:
        """Those that are the content of no file."""
        with session(self._engine) as opened:
            return digests - set(opened.scalars(select(FileRow.digest)))

    def unknown_files(self, file_ids: set[str]) -> set[str]:
        with session(self._engine) as opened:
            return file_ids - set(opened.scalars(select(FileRow.id)))

    # -- checks of training files --------------------------------------------------------------------------------------

    def interrupted_checks(self) -> list[FoundFile]:
        """Training files whose check has not ended and is not going on; they count as being checked from now on."""
        now = self.clock()
        is_left = or_(FileRow.checked_since.is_(None), FileRow.checked_since < now - timedelta(seconds=CHECK_SECONDS))
        with session(self._engine) as opened:
            rows = list(opened.scalars(select(FileRow).where(FileRow.status == "uploaded", is_left)))
            found = [_found(row) for row in rows]
            for row in rows:
                row.checked_since = now
            opened.commit()
        return found

    def end_check(
        self, file_id: str, status: FileStatus, details: str | None, validation: FileValidation | None
    ) -> None:
        """Record what the check of a file has found. Without effect if the file was deleted meanwhile."""
        values = {
            "status": status,
            "status_details": details,
            "validation": None if validation is None else validation.model_dump(mode="json"),
        }
        with session(self._engine) as opened:
            opened.execute(update(FileRow).where(FileRow.id == file_id, FileRow.status != DELETED).values(values))
            opened.commit()

    # -- uploads -------------------------------------------------------------------------------------------------------

    def add_upload(
        self,
        upload_id: str,
        owner: Tenant,
        filename: str,
        purpose: Purpose,
        size: int,
        seconds: float,
        file_seconds: int | None,
    ) -> Upload:
        """Raises `ApiError` 403 if the key may not have so many bytes."""
        now = self.clock()
        row = UploadRow(
            id=upload_id,
            key=owner.key,
            organization=owner.organization,
            filename=filename,
            purpose=purpose,
            size=size,
            created=now,
            expires=now + timedelta(seconds=seconds),
            file_seconds=file_seconds,
            status="pending",
        )
        with session(self._engine) as opened:
            _lock_quota(opened, owner)
            self._check_quota(opened, owner, size)
            opened.add(row)
            opened.flush()
            shown = self._upload(opened, row)
            opened.commit()
        return shown

    def find_upload(self, tenant: Tenant, upload_id: str) -> Upload:
        """Raises `ApiError` 404."""
        with session(self._engine) as opened:
            return self._upload(opened, _upload_row(opened, tenant, upload_id))

    def pending_upload(self, tenant: Tenant, upload_id: str) -> PendingUpload:
        """Raises `ApiError` 404, or 400 for an upload that takes no parts any more."""
        with session(self._engine) as opened:
            row = _upload_row(opened, tenant, upload_id)
            shown = self._upload(opened, row)
            _check_is_pending(shown)
            owner = Tenant(row.key, row.key, row.organization, sees_all=False)
            return PendingUpload(shown, row.file_seconds, owner)

    def list_parts(
        self, tenant: Tenant, upload_id: str, after: str | None, limit: int
    ) -> tuple[list[UploadPart], bool]:
        with session(self._engine) as opened:
            _upload_row(opened, tenant, upload_id)
            query = select(UploadPartRow).where(UploadPartRow.upload == upload_id)
            rows, has_more = page_of(
                opened, query, UploadPartRow.id, PART_PREFIX, after=after, limit=limit, order="asc"
            )
            return [_part(row) for row in rows], has_more

    def add_part(self, upload_id: str, part_id: str, size: int) -> UploadPart:
        """Raises `ApiError` 400 if the upload has ended, or the parts would be more than the file."""
        row = UploadPartRow(id=part_id, upload=upload_id, size=size, created=self.clock())
        with session(self._engine) as opened:
            upload = self._lock_pending(opened, upload_id)
            earlier = opened.scalar(
                select(func.coalesce(func.sum(UploadPartRow.size), 0)).where(UploadPartRow.upload == upload_id)
            )
            if int(earlier or 0) + size > upload.bytes:
                message = (
                    f"data: the parts would have {int(earlier or 0) + size:,} bytes, and the upload {upload.bytes:,}."
                )
                raise ApiError(
                    400, f"{message} Cancel it and create one with the right size.", "too_many_bytes", "data"
                )
            opened.add(row)
            opened.flush()
            shown = _part(row)
            opened.commit()
        return shown

    def sizes_of_parts(self, upload_id: str) -> dict[str, int]:
        with session(self._engine) as opened:
            rows = opened.execute(select(UploadPartRow.id, UploadPartRow.size).where(UploadPartRow.upload == upload_id))
            return {str(part): int(size) for part, size in rows}

    def completed(self, tenant: Tenant, upload_id: str, digest_of_request: str) -> Upload | None:
        """The upload, if the same request has completed it: clients repeat a request that was slow."""
        with session(self._engine) as opened:
            row = _upload_row(opened, tenant, upload_id)
            is_same = row.status == "completed" and row.completed_with == digest_of_request
            return self._upload(opened, row) if is_same else None

    def complete(self, upload_id: str, digest_of_request: str, new: NewFile, publish: Callable[[], None]) -> Upload:
        """Make the file of an upload, once. Raises `ApiError` 400 if it has ended meanwhile."""
        with session(self._engine) as opened:
            self._lock_pending(opened, upload_id)
            self._lock_content(opened, new.digest, new.size)
            self._add(opened, new)
            row = opened.get(UploadRow, upload_id)
            assert row is not None
            row.status = "completed"
            row.completed_with = digest_of_request
            row.file = new.id
            opened.execute(delete(UploadPartRow).where(UploadPartRow.upload == upload_id))
            opened.flush()
            shown = self._upload(opened, row)
            publish()
            opened.commit()
        return shown

    def cancel(self, tenant: Tenant, upload_id: str) -> Upload:
        """Raises `ApiError` 404, or 400 for an upload that is complete. Again is no error."""
        with session(self._engine) as opened:
            row = _upload_row(opened, tenant, upload_id)
            if row.status != "cancelled":
                self._lock_pending(opened, upload_id)
                row.status = "cancelled"
                opened.execute(delete(UploadPartRow).where(UploadPartRow.upload == upload_id))
                opened.flush()
            shown = self._upload(opened, row)
            opened.commit()
        return shown

    def ended_uploads(self, upload_ids: set[str]) -> set[str]:
        """Those that take no parts any more, or are unknown."""
        is_open = UploadRow.status == "pending", UploadRow.expires > self.clock()
        with session(self._engine) as opened:
            return upload_ids - set(opened.scalars(select(UploadRow.id).where(*is_open)))

    def forget_old_uploads(self) -> None:
        """Delete the rows of parts of expired uploads, and of uploads that ended long ago."""
        now = self.clock()
        expired = select(UploadRow.id).where(UploadRow.expires <= now)
        with session(self._engine) as opened:
            opened.execute(delete(UploadPartRow).where(UploadPartRow.upload.in_(expired)))
            opened.execute(delete(UploadRow).where(UploadRow.expires <= now - KEPT_UPLOADS))
            opened.commit()

    # -- within a session ----------------------------------------------------------------------------------------------

    def _visible(self, tenant: Tenant) -> tuple[ColumnElement[bool], ...]:
        return tenant.visible(FileRow), self._has_not_expired(), FileRow.status != DELETED

    def _has_not_expired(self) -> ColumnElement[bool]:
        return or_(FileRow.expires.is_(None), FileRow.expires > self.clock())

    def _lock_content(self, opened: Session, digest: str, size: int, *, keep_size: bool = False) -> None:
        """Lock the row of a content until the transaction ends. Makes it if it is not there."""
        kept = "file_contents.size" if keep_size else "excluded.size"
        statement = f"INSERT INTO file_contents (digest, size) VALUES (:digest, :size) ON CONFLICT (digest) DO UPDATE SET size = {kept}"  # noqa: E501
        opened.execute(text(statement), {"digest": digest, "size": size})

    def check_quota(self, owner: Tenant, size: int) -> None:
        """Raises `ApiError` 403."""
        with session(self._engine) as opened:
            self._check_quota(opened, owner, size)

    def _check_quota(self, opened: Session, owner: Tenant, size: int) -> None:
        files = select(func.coalesce(func.sum(FileRow.size), 0)).where(FileRow.key == owner.key)
        uploads = select(func.coalesce(func.sum(UploadRow.size), 0)).where(
            UploadRow.key == owner.key, UploadRow.status == "pending", UploadRow.expires > self.clock()
        )
        used = int(opened.scalar(files) or 0) + int(opened.scalar(uploads) or 0)
        if used + size > self._max_key_bytes:
            message = (
                f"The files of the key {owner.name!r} have {used:,} bytes, and with {size:,} more they would exceed "
                f"{self._max_key_bytes:,}. Delete some files, or ask for a higher limit (fine_tuning.files.key_gib)."
            )
            raise ApiError(403, message, "storage_quota_exceeded")

    def _lock_pending(self, opened: Session, upload_id: str) -> Upload:
        """Lock the row of an upload until the transaction ends. Raises `ApiError` 400 unless it takes parts."""
        opened.execute(update(UploadRow).where(UploadRow.id == upload_id).values(id=upload_id))
        row = opened.scalar(
            select(UploadRow).where(UploadRow.id == upload_id).execution_options(populate_existing=True)
        )
        if row is None:
            raise no_such_upload(upload_id)
        shown = self._upload(opened, row)
        _check_is_pending(shown)
        return shown

    def _upload(self, opened: Session, row: UploadRow) -> Upload:
        file = opened.get(FileRow, row.file) if row.file is not None else None
        if file is not None and file.status == DELETED:
            file = None
        is_expired = row.status == "pending" and with_utc(row.expires) <= self.clock()
        return Upload.model_validate(
            {
                "id": row.id,
                "bytes": row.size,
                "created_at": _seconds(row.created),
                "expires_at": _seconds(row.expires),
                "filename": row.filename,
                "purpose": row.purpose,
                "status": "expired" if is_expired else row.status,
                "file": None if file is None else _shown(file),
            }
        )


def _lock_quota(opened: Session, owner: Tenant) -> None:
    lock_name(opened, f"files of {owner.key}")


def no_such_file(file_id: str) -> ApiError:
    return ApiError(404, f"No such file: {file_id[:100]!r}. It may have expired.", "file_not_found", "file_id")


def no_such_upload(upload_id: str) -> ApiError:
    return ApiError(404, f"No such upload: {upload_id[:100]!r}.", "upload_not_found", "upload_id")


def _check_is_pending(upload: Upload) -> None:
    if upload.status != "pending":
        message = f"The upload {upload.id} is {upload.status}. Create another one."
        raise ApiError(400, message, "invalid_upload_state", "upload_id")


def _upload_row(opened: Session, tenant: Tenant, upload_id: str) -> UploadRow:
    is_known = is_id(upload_id, UPLOAD_PREFIX)  # databases refuse some texts, such as NUL
    row = (
        opened.scalar(select(UploadRow).where(UploadRow.id == upload_id, tenant.visible(UploadRow)))
        if is_known
        else None
    )
    if row is None:
        raise no_such_upload(upload_id)
    return row


def _found(row: FileRow) -> FoundFile:
    return FoundFile(_shown(row), row.digest)


def _shown(row: FileRow) -> FileObject:
    return FileObject.model_validate(
        {
            "id": row.id,
            "bytes": row.size,
            "created_at": _seconds(row.created),
            "filename": row.filename,
            "purpose": row.purpose,
            "status": row.status,
            "expires_at": None if row.expires is None else _seconds(row.expires),
            "status_details": row.status_details,
            "validation": row.validation,
        }
    )


def _part(row: UploadPartRow) -> UploadPart:
    return UploadPart(id=row.id, created_at=_seconds(row.created), upload_id=row.upload)


def _seconds(moment: datetime) -> int:
    return int(with_utc(moment).timestamp())
