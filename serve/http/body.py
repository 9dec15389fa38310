"""Request bodies: JSON in UTF-8, no larger than allowed, read before anything is done with them."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from serve.http.errors import ApiError

READ_SECONDS = 60.0
LARGE_BYTES = 64 * 1024
MAX_VALUES = 2**20
"""Of a body's values. Parsing stops all other threads, for about 0.1 s with so many."""
_TEXT_VALUES = 4
_NESTED_VALUES = 10
"""So many numbers cost as much as a text or a key, and as a list or an object."""
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A JSON text. The end is optional: a search that fails at every quote of a broken body would take hours."""
_LARGE_BODIES = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse-large")
"""One thread, so that the event loop gets its turn after each large body."""
_MIB = 2**20
Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, model: type[Model], max_mib: float) -> Model:
    """The body as `model`. Raises `ApiError` (400, 408, 413, 415) or pydantic's `ValidationError`."""
    _check_content_type(request)
    body = await _read(request, int(max_mib * _MIB))
    if len(body) <= LARGE_BYTES:
        return model.model_validate_json(body)
    return await asyncio.get_running_loop().run_in_executor(_LARGE_BODIES, _parse_large, body, model)


def _parse_large(body: bytes, model: type[Model]) -> Model:
    if _values(body) > MAX_VALUES:
        message = (
            f"The body has more than {MAX_VALUES:,} values; a text counts as {_TEXT_VALUES}, a list or an object as "
            f"{_NESTED_VALUES}. Send less in one request."
        )
        raise ApiError(413, message, "request_too_large")
    return model.model_validate_json(body)


def _values(body: bytes) -> int:
    """About what parsing costs, as a number of values. It stops counting above `MAX_VALUES`."""
    at_most = _TEXT_VALUES * (body.count(b'"') // 2) + _structure(body)
    if at_most <= MAX_VALUES:
        return at_most
    found = 0
    end = 0
    for text in _TEXT.finditer(body):  # what is within a text costs nothing
        found += _TEXT_VALUES + _structure(body[end : text.start()])
        end = text.end()
        if found > MAX_VALUES:
            return found
    return found + _structure(body[end:])


def _structure(part: bytes) -> int:
    # Brackets are counted where they close: a body of opening ones alone is refused as soon as it is parsed.
    return part.count(b",") + _NESTED_VALUES * (part.count(b"]") + part.count(b"}"))


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "application/json").lower()
    kind, _, parameters = content_type.partition(";")
    if kind.strip() != "application/json":
        message = f"Content-Type is {kind.strip()[:100]!r}. Send JSON with 'Content-Type: application/json'."
        raise ApiError(415, message, "unsupported_media_type")
    charset = parameters.partition("charset=")[2].strip(' "')
    if charset and charset not in ("utf-8", "utf8"):
        raise ApiError(415, f"The charset is {charset[:100]!r}. Send UTF-8.", "unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        message = f"Content-Encoding is {encoding[:100]!r}. Send the body uncompressed."
        raise ApiError(415, message, "unsupported_media_type")


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {max_bytes / _MIB:g} MiB. Send less.", "request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {READ_SECONDS:g} seconds.", "request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The body ended early.", "incomplete_body") from None
    return bytes(body)
