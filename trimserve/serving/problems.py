"""What goes wrong with a request, in the shape that clients of OpenAI's API read."""

from collections.abc import Mapping
from typing import Any

from trimserve.errors import MissingExtraError, TrimserveError, UnknownIdError, UsageError

# OpenAI's word for the kind of an error, by status; its client chooses the exception by the status.
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one sentence: what was expected, what was found, what to do.
        param: the field of the request that is meant; None for the request as a whole.
        code: a word for programs, such as ``"unknown_field"``; None where the status says it all.
        retry_after: seconds after which the same request may succeed; None where it cannot.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that go with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def bad_field(param: str, message: str, code: str | None = None) -> ApiError:
    """A field of the request is not what it should be."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: TrimserveError) -> ApiError:
    """What the library says of a request: the caller's fault (400) or the server's (500)."""
    if isinstance(error, UsageError | UnknownIdError | MissingExtraError):
        return ApiError(400, str(error))
    return ApiError(500, str(error))
