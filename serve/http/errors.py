"""Errors in the shape that OpenAI's clients read, shared by all HTTP APIs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ft_service.errors import DatabaseError, FtError, ServingError, StorageError, UsageError
from serve.engines.engine import RefusedRequestError

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MISMATCHES = ("_type", "_parsing", "model_attributes_type", "missing", "literal_error")

logger = logging.getLogger(__name__)


class ApiError(ServingError):
    """An error response: HTTP status and the fields of OpenAI's error body."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        """`retry_after` is in seconds, for a client that is asked to come back."""
        super().__init__(status, message, code, param, retry_after)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (500, 501):  # clients retry every 5xx; these would only fail again
            headers["x-should-retry"] = "false"
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client gets to know of an error. One that nobody expected is logged, and its text is not sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return invalid_request(error)
    if isinstance(error, RefusedRequestError):
        return ApiError(400, error.message, "invalid_value", error.param)
    if isinstance(error, UsageError):
        return ApiError(400, str(error), "invalid_request")
    if isinstance(error, DatabaseError):
        return ApiError(503, str(error), "database_error", retry_after=5)
    if isinstance(error, StorageError):
        return ApiError(503, str(error), "storage_error", retry_after=5)
    if isinstance(error, FtError):
        return ApiError(500, str(error), "serving_error")
    logger.error("unexpected failure", exc_info=error)
    return ApiError(500, f"The server failed ({type(error).__name__}). Its log has the details.", "internal_error")


def invalid_request(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request, by the name of its parameter; never the value itself, whole."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        reason = str(errors[0]["msg"]).removeprefix("Invalid JSON: ")
        return ApiError(400, f"The body is not JSON in UTF-8: {reason}.", "invalid_json")
    if errors[0]["type"] in ("model_type", "model_attributes_type", "dict_type") and not errors[0]["loc"]:
        return ApiError(400, "The body is not a JSON object.", "invalid_json")
    name = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    of_name = [one for one in errors if one["loc"] and str(one["loc"][0]) == name]
    if all(one["type"] == "missing" and len(one["loc"]) == 1 for one in of_name) and name:
        return ApiError(400, f"{name} is missing. Send it.", "missing_required_parameter", name)
    reasons = _reasons(of_name or errors)
    return ApiError(400, f"{name or 'body'}: {'; or: '.join(reasons)}.", "invalid_value", name)


def _reasons(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of a parameter that may be one of several types, the errors of the type that was meant; else all of them."""
    meant = [one for one in errors if not str(one["type"]).endswith(_MISMATCHES)] or errors
    return list(dict.fromkeys(_reason(one) for one in meant))[:4]


def _reason(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    return (message[0].lower() + message[1:]).removeprefix("value error, ")


def answer_errors_in_openai_shape(api: FastAPI) -> None:
    """Every error of the application, also of unknown routes, has the same body."""

    @api.exception_handler(FtError)
    async def on_ft_error(_: Request, error: FtError) -> JSONResponse:
        return as_api_error(error).response()

    @api.exception_handler(ValidationError)
    async def on_invalid_request(_: Request, error: ValidationError) -> JSONResponse:
        return invalid_request(error).response()

    @api.exception_handler(RequestValidationError)
    async def on_invalid_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(400, f"{name}: {_reason(first)}.", "invalid_value", name).response()

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        response = ApiError(error.status_code, message, codes.get(error.status_code, "invalid_request")).response()
        response.headers.update(error.headers or {})
        return response

    @api.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()
