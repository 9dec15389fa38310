"""Request bodies: JSON in UTF-8, no larger than allowed, read before anything is done with them."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from serve.http.errors import ApiError

READ_SECONDS = 60.0
_LARGE_BYTES = 256 * 1024
MAX_VALUES = 2**20
"""Commas in a large body. Parsing so many values stops all other threads for about 0.1 s."""
_MIB = 2**20
Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, model: type[Model], max_mib: float) -> Model:
    """The body as `model`. Raises `ApiError` (400, 408, 413, 415) or pydantic's `ValidationError`."""
    _check_content_type(request)
    body = await _read(request, int(max_mib * _MIB))
    if len(body) > _LARGE_BYTES:  # parsing it would hold up all other requests
        if body.count(b",") > MAX_VALUES:
            message = f"The body has more than {MAX_VALUES:,} values, or commas. Send less in one request."
            raise ApiError(413, message, "request_too_large")
        return await asyncio.to_thread(model.model_validate_json, body)
    return model.model_validate_json(body)


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
