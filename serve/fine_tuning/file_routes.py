"""The routes below /v1/files and /v1/uploads. Bodies go to storage as they arrive, in threads of their own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from serve.fine_tuning.file_keeper import MIB, FileKeeper
from serve.fine_tuning.file_records import FILE_PREFIX, PART_PREFIX, UPLOAD_PREFIX, FoundFile
from serve.fine_tuning.file_wire import (
    CompleteRequest,
    FileDeleted,
    FileError,
    FileFields,
    FileObject,
    ListPage,
    Upload,
    UploadPart,
    UploadRequest,
    list_page,
)
from serve.fine_tuning.files import BLOCK_BYTES, Arrival
from serve.fine_tuning.multipart import Form, check_declared_length, clean_filename, least_file_bytes, read_form
from serve.fine_tuning.paging import Order, new_id
from serve.http.body import read_json
from serve.http.errors import ApiError
from serve.http.keys import client_of
from serve.http.openapi import reads
from serve.http.tenants import tenant_of

BODIES: list[type[BaseModel]] = [UploadRequest, CompleteRequest]
CHECK_SECONDS = 2.0
"""So long the reply to an upload waits for the check of the file."""
MOST_ARRIVING = 128
"""Bodies that arrive at once; each takes up to 2 MiB of memory."""
_MOST_MIB = 1.0
_MOST_FILES = 10_000
_FILES = "/v1/files"
_UPLOADS = "/v1/uploads"
_THREADS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="files")

Result = TypeVar("Result")
Limit = Annotated[int, Query(ge=1, le=_MOST_FILES)]


def _form(**properties: Any) -> dict[str, Any]:
    """For `openapi_extra` of a route that reads a form by `read_form`."""
    schema = {"type": "object", "properties": properties, "required": [*properties][:1]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


_BINARY = {"type": "string", "format": "binary"}
_FILE_FORM = _form(
    file=_BINARY,
    purpose={"type": "string", "enum": ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]},
    **{"expires_after[anchor]": {"type": "string"}, "expires_after[seconds]": {"type": "integer"}},
)


def file_routes(keeper: FileKeeper) -> APIRouter:
    """Upload, list, retrieve, download and delete files; uploads in parts."""
    api = APIRouter()
    records = keeper.records
    settings = keeper.settings
    arriving = _Arriving()

    # -- files ---------------------------------------------------------------------------------------------------------

    @api.post(_FILES, openapi_extra=_FILE_FORM)
    async def create_file(http: Request) -> FileObject:
        """Upload a file. A training file is checked; if that takes long, its status is `uploaded` until it ends."""
        tenant = tenant_of(client_of(http))
        check_declared_length(http, int(settings.max_file_mib * MIB))
        await _in_thread(lambda: records.check_quota(tenant, least_file_bytes(http)))
        file_id = new_id(FILE_PREFIX)

        async def receive(arrival: Arrival, form: Form) -> FileObject:
            fields = _file_fields(form)
            filename = form.filename or "file"
            kept = await _in_thread(
                lambda: keeper.keep(tenant, file_id, arrival, filename, fields.purpose, fields.expires_after)
            )
            if kept.check is None:
                return kept.file
            check = asyncio.wrap_future(kept.check)
            done, _ = await asyncio.wait([check], timeout=CHECK_SECONDS)
            if not done:
                return kept.file
            return (await _in_thread(lambda: records.find(tenant, file_id))).shown

        return await arrive(http, lambda: keeper.store.arrive(file_id), "file", settings.max_file_mib, receive)

    async def arrive(
        http: Request,
        begin: Callable[[], Arrival],
        file_field: str,
        max_mib: float,
        receive: Callable[[Arrival, Form], Awaitable[Result]],
    ) -> Result:
        """Read a form whose file goes to storage, and let `receive` use it. If either fails, nothing is left."""
        most = int(max_mib * MIB)
        check_declared_length(http, most)
        with arriving.one_more():
            arrival = await _in_thread(begin)
            try:
                form = await read_form(http, file_field, most, lambda block: _in_thread(lambda: arrival.write(block)))
                if form.filename is None:
                    message = f"{file_field} is missing. Send it."
                    raise ApiError(400, message, "missing_required_parameter", file_field)
                if arrival.size == 0:
                    raise ApiError(400, f"{file_field} is empty.", "empty_file", file_field)
                await _in_thread(arrival.finish)
            except BaseException:
                await asyncio.shield(_in_thread(arrival.abandon))
                raise
            try:
                return await receive(arrival, form)
            except BaseException:
                await asyncio.shield(_in_thread(lambda: keeper.store.discard(arrival)))
                raise

    @api.get(_FILES)
    async def list_files(
        http: Request,
        purpose: Annotated[str | None, Query(max_length=100)] = None,
        limit: Limit = _MOST_FILES,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Order = "desc",
    ) -> ListPage[FileObject]:
        tenant = tenant_of(client_of(http))
        return list_page(*await _in_thread(lambda: records.list_files(tenant, purpose, after, limit, order)))

    @api.get(f"{_FILES}/{{file_id}}")
    async def retrieve_file(http: Request, file_id: str) -> FileObject:
        tenant = tenant_of(client_of(http))
        return (await _in_thread(lambda: records.find(tenant, file_id))).shown

    @api.get(f"{_FILES}/{{file_id}}/content", response_class=StreamingResponse)
    async def file_content(http: Request, file_id: str) -> StreamingResponse:
        tenant = tenant_of(client_of(http))
        found = await _in_thread(lambda: records.find(tenant, file_id))
        first = await block_of(found, 0)  # an error up to here still sets the HTTP status
        headers = {
            "content-length": str(found.size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(found.shown.filename, safe='')}",
            "x-content-type-options": "nosniff",
        }
        return StreamingResponse(blocks(found, first), media_type="application/octet-stream", headers=headers)

    async def block_of(found: FoundFile, start: int) -> bytes:
        return await _in_thread(lambda: keeper.store.block(found.digest, start, found.size))

    async def blocks(found: FoundFile, first: bytes) -> AsyncIterator[bytes]:
        yield first
        for start in range(BLOCK_BYTES, found.size, BLOCK_BYTES):
            yield await block_of(found, start)

    @api.get(f"{_FILES}/{{file_id}}/errors")
    async def file_errors(
        http: Request,
        file_id: str,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int, Query(ge=0, le=2**31)] = 0,
    ) -> ListPage[FileError]:
        """Everything that is wrong with a training file, by line. `after` is the `last_id` of a page."""
        tenant = tenant_of(client_of(http))

        def read() -> ListPage[FileError]:
            found = records.find(tenant, file_id)
            errors, has_more = keeper.store.read_errors(found.id, after, limit)
            return list_page([FileError.model_validate(error) for error in errors], has_more)

        return await _in_thread(read)

    @api.delete(f"{_FILES}/{{file_id}}")
    async def delete_file(http: Request, file_id: str) -> FileDeleted:
        """Delete a file. A job that was created with it has a copy of its own until it ends."""
        tenant = tenant_of(client_of(http))
        await _in_thread(lambda: keeper.delete(tenant, file_id))
        return FileDeleted(id=file_id)

    # -- uploads in parts ----------------------------------------------------------------------------------------------

    @api.post(_UPLOADS, openapi_extra=reads(UploadRequest))
    async def create_upload(http: Request) -> Upload:
        tenant = tenant_of(client_of(http))
        request = await read_json(http, UploadRequest, _MOST_MIB)
        if request.bytes > settings.max_upload_mib * MIB:
            message = f"bytes = {request.bytes:,}: a file has at most {settings.max_upload_mib:g} MiB. Split it."
            raise ApiError(413, message, "file_too_large", "bytes")
        file_seconds = None if request.expires_after is None else request.expires_after.seconds
        filename = clean_filename(request.filename)
        return await _in_thread(
            lambda: records.add_upload(
                new_id(UPLOAD_PREFIX),
                tenant,
                filename,
                request.purpose,
                request.bytes,
                settings.upload_seconds,
                file_seconds,
            )
        )

    @api.get(f"{_UPLOADS}/{{upload_id}}")
    async def retrieve_upload(http: Request, upload_id: str) -> Upload:
        tenant = tenant_of(client_of(http))
        return await _in_thread(lambda: records.find_upload(tenant, upload_id))

    @api.get(f"{_UPLOADS}/{{upload_id}}/parts")
    async def list_parts(
        http: Request, upload_id: str, limit: Limit = 1000, after: Annotated[str | None, Query(max_length=100)] = None
    ) -> ListPage[UploadPart]:
        """The parts that have arrived, oldest first: an interrupted client sends only the others."""
        tenant = tenant_of(client_of(http))
        return list_page(*await _in_thread(lambda: records.list_parts(tenant, upload_id, after, limit)))

    @api.post(f"{_UPLOADS}/{{upload_id}}/parts", openapi_extra=_form(data=_BINARY))
    async def add_part(http: Request, upload_id: str) -> UploadPart:
        tenant = tenant_of(client_of(http))
        pending = await _in_thread(lambda: records.pending_upload(tenant, upload_id))
        known_id = pending.shown.id
        part_id = new_id(PART_PREFIX)

        async def receive(arrival: Arrival, form: Form) -> UploadPart:
            _reject_fields(form)
            return await _in_thread(lambda: records.add_part(known_id, part_id, arrival.size))

        return await arrive(
            http, lambda: keeper.store.arrive_part(known_id, part_id), "data", settings.max_part_mib, receive
        )

    @api.post(f"{_UPLOADS}/{{upload_id}}/complete", openapi_extra=reads(CompleteRequest))
    async def complete_upload(http: Request, upload_id: str) -> Upload:
        tenant = tenant_of(client_of(http))
        request = await read_json(http, CompleteRequest, _MOST_MIB)
        return await _in_thread(lambda: keeper.complete(tenant, upload_id, request))

    @api.post(f"{_UPLOADS}/{{upload_id}}/cancel")
    async def cancel_upload(http: Request, upload_id: str) -> Upload:
        tenant = tenant_of(client_of(http))
        return await _in_thread(lambda: keeper.cancel(tenant, upload_id))

    return api


async def _in_thread(work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


class _Arriving:
    """Counts the bodies that are arriving."""

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def one_more(self) -> Any:
        """Raises `ApiError` 429."""
        if self._number >= MOST_ARRIVING:
            raise ApiError(429, "Too many files arrive at this moment. Try again.", "overloaded", retry_after=2)
        self._number += 1
        try:
            yield
        finally:
            self._number -= 1


def _file_fields(form: Form) -> FileFields:
    """Raises pydantic's `ValidationError`, or `ApiError` 400."""
    fields = dict(form.fields)
    values: dict[str, Any] = {}
    if "purpose" in fields:
        values["purpose"] = fields.pop("purpose")
    names = ("anchor", "seconds")
    expires = {name: fields.pop(f"expires_after[{name}]") for name in names if f"expires_after[{name}]" in fields}
    if expires:
        values["expires_after"] = expires
    _reject_fields(Form(fields=fields))
    return FileFields.model_validate(values)


def _reject_fields(form: Form) -> None:
    for name in form.fields:
        message = f"Unknown parameter: {name[:100]!r}. Leave it out."
        raise ApiError(400, message, "unknown_parameter", name[:100])
