"""Reads multipart/form-data while it arrives: its file goes block by block to a writer, fields are kept.

Parts may come in any order. Nothing is kept in memory but one block and the fields, which are short.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from serve.http.errors import ApiError

IDLE_SECONDS = 60.0
"""So long a client may send nothing."""
BLOCK_BYTES = 2**20
_FORM_BYTES = 64 * 1024
"""Of a form beside its file."""
_MOST_PARTS = 16
_MOST_FILENAME = 255
_MIB = 2**20

Write = Callable[[bytes], Awaitable[None]]


@dataclass
class Form:
    """A form that was read: the name of its file, None if it had none, and its fields."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def read_form(request: Request, file_field: str, max_bytes: int, write: Write) -> Form:
    """Read a form whose file is `file_field` and has at most `max_bytes`.

    Raises `ApiError` 400, 408, 413 or 415, and whatever `write` raises; then the rest of the body is not read.
    """
    boundary = _boundary(request)
    check_declared_length(request, max_bytes)
    reader = _Reader(boundary, file_field, max_bytes)
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                piece = await anext(stream, None)
            if piece is None:
                break
            reader.feed(piece)
            if len(reader.waiting) >= BLOCK_BYTES:
                await write(reader.take())
    except TimeoutError:
        raise ApiError(408, f"Nothing arrived for {IDLE_SECONDS:g} seconds.", "request_timeout") from None
    except ClientDisconnect:
        raise _incomplete() from None
    if not reader.has_ended:
        raise _incomplete()
    if reader.waiting:
        await write(reader.take())
    return reader.form


def check_declared_length(request: Request, max_bytes: int) -> None:
    """Raises `ApiError` 413 for a body that is declared too long, before any of it is read."""
    if least_file_bytes(request) > max_bytes:
        raise too_large(max_bytes)


def least_file_bytes(request: Request) -> int:
    """Bytes that the file of a form has at least, by the declared length of the body."""
    declared = request.headers.get("content-length", "")
    is_number = declared.isascii() and declared.isdigit()
    return max(0, int(declared) - _FORM_BYTES) if is_number else 0


def too_large(max_bytes: int) -> ApiError:
    message = f"The file is larger than {max_bytes / _MIB:g} MiB, which is the limit of one request."
    return ApiError(413, f"{message} Send it in parts (/v1/uploads), or split it.", "file_too_large", "file")


def _incomplete() -> ApiError:
    return ApiError(400, "The body ended early. Nothing was kept. Send it again.", "incomplete_body")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind.lower() != b"multipart/form-data":
        shown = kind.decode("latin-1")[:100]
        message = f"Content-Type is {shown!r}. Send the file as multipart/form-data."
        raise ApiError(415, message, "unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        message = f"Content-Encoding is {encoding[:100]!r}. Send the body uncompressed."
        raise ApiError(415, message, "unsupported_media_type")
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _invalid("Content-Type has no boundary")
    return boundary


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"The body is no valid multipart/form-data: {reason}.", "invalid_multipart")


class _Reader:
    """Callbacks of the parser. `waiting` is what of the file was not written yet."""

    def __init__(self, boundary: bytes, file_field: str, max_bytes: int) -> None:
        self.form = Form()
        self.waiting = bytearray()
        self.has_ended = False
        self._file_field = file_field
        self._max_bytes = max_bytes
        self._file_bytes = 0
        self._field_bytes = 0
        self._parts = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_name_continues,
                    "on_header_value": self._header_value_continues,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_ends,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _invalid(str(error)[:200]) from None

    def feed(self, piece: bytes) -> None:
        """Raises `ApiError` 400 or 413."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _invalid(str(error)[:200]) from None

    def take(self) -> bytes:
        block = bytes(self.waiting)
        self.waiting.clear()
        return block

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise _invalid(f"it has more than {_MOST_PARTS} parts")
        self._disposition = b""

    def _header_name_continues(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_continues(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_ends(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = b""
        self._header_value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _invalid("a part has no name")
        self._name = _decoded(options[b"name"])
        self._value = bytearray()
        if self._name == self._file_field:
            if self.form.filename is not None:
                raise ApiError(400, f"{self._file_field}: was sent twice. Send one file.", "invalid_value", self._name)
            self.form.filename = clean_filename(_decoded(options.get(b"filename", b"")))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self._file_bytes += end - start
            if self._file_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            self.waiting += memoryview(data)[start:end]
            return
        self._field_bytes += end - start
        if self._field_bytes > _FORM_BYTES:
            raise ApiError(413, "The fields of the form are too long.", "request_too_large", self._name[:100])
        self._value += data[start:end]

    def _part_ends(self) -> None:
        if self._name == self._file_field:
            return
        if self._name in self.form.fields:
            message = f"{self._name[:100]}: was sent twice. Send it once."
            raise ApiError(400, message, "invalid_value", self._name[:100])
        self.form.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.has_ended = True


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def clean_filename(name: str) -> str:
    """The name of a file without its folders and without control characters, no longer than 255 characters.

    Clients percent-encode quotes and line ends; they come back as they were sent.
    """
    last = name.replace("\\", "/").rpartition("/")[2].replace("%22", '"')
    shown = "".join(one for one in last if one.isprintable() or one == " ").strip()
    return shown[:_MOST_FILENAME] or "file"
