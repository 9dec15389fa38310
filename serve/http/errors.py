"""Errors in the shape that OpenAI's clients read, shared by all HTTP APIs."""

from typing import Any

from ft_service.errors import ServingError


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
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
