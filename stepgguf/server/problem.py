"""What goes wrong, as data: a status, a sentence and a code. The server's one place where errors become prose.

A dialect's `ErrorForm` makes the body of it (dialects/dialect.py).

openai's clients repeat a request after 408, 409, 429 and 5xx unless `x-should-retry: false` is sent: what would fail
again carries that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from stepgguf.errors import ContextLengthExceeded, EngineBusy, EngineDied, RequestError, StepggufError
from stepgguf.server.validation import describe_errors

NO_RETRY = {"x-should-retry": "false"}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong. type and code are OpenAI's words.

    param: the field of the request that is wrong, as a path. headers: of the response, beside the usual. overflow: the
    context is too small, which each dialect says in its own words.
    """

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    overflow: ContextLengthExceeded | None = None


class Refusal(HTTPException):
    """A request that HTTP alone is enough to refuse: key, host, size, model, route. Its message and its status go out
    as they are given here; `code` None is the usual one of the status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def problem_of(error: Exception) -> Problem:
    """Return what to say about any exception. One that is not ours to explain is "internal error": its text may hold
    anything."""
    if isinstance(error, RequestValidationError):
        message, param = describe_errors(error.errors(), error.body)
        return _problem(400, message, param=param)
    if isinstance(error, Refusal):
        return _problem(error.status_code, error.detail, error.code, error.param, error.headers)
    if isinstance(error, HTTPException):
        return _problem(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, StepggufError):
        return _problem_of_ours(error, f"{error.message}. {error.hint}" if error.hint else error.message)
    return _problem(500, "internal error; the server's log has it under this request's id", headers=NO_RETRY)


def _problem_of_ours(error: StepggufError, message: str) -> Problem:
    if isinstance(error, ContextLengthExceeded):
        return replace(_problem(400, message, "context_length_exceeded", "messages"), overflow=error)
    if isinstance(error, RequestError):
        return _problem(400, message, param=error.param)
    if isinstance(error, EngineBusy):
        return _problem(429, message, headers={"retry-after": str(error.retry_after)})
    if isinstance(error, EngineDied) and error.recovered:  # a new context is there already: the client may ask again
        return _problem(503, message, "engine_failed", headers={"retry-after": "1"})
    return _problem(500, message, "engine_failed", headers=NO_RETRY)


def _problem(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Problem:
    type_ = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Problem(status, message, type_, code or CODES.get(status, "internal_error"), param, headers or {})
