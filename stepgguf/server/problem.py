"""What goes wrong, as status and body. The server's one place where errors become prose.

    OpenAI      {"error": {"message", "type", "param", "code", "object": "error", "request_id"}}
    Anthropic   {"type": "error", "error": {"type", "message"}, "request_id"}           under /v1/messages

`object` is there because ChatNVIDIA raises errors inside a stream only if it says "error". openai's clients repeat a
request after 408, 409, 429 and 5xx unless `x-should-retry: false` is sent: what would fail again carries that.

Agents make a conversation shorter and go on when they recognise a full context, and they recognise it by words. Those
of the dialect come first, our hint after them:

    Anthropic   prompt is too long: 27782 tokens > 27136 maximum            Claude Code reads both numbers
    OpenAI      This model's maximum context length is 27136 tokens. However, your messages resulted in 27782 tokens
                LangChain, which has no eye for the code, goes by: prompt is too long
                clients of llama-server: exceeds the available context size, exceed_context_size_error, and the numbers
                as n_prompt_tokens and n_ctx
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from json import JSONEncoder
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import NotRequired, TypedDict

from stepgguf.errors import (
    ContextLengthExceeded,
    EngineBusy,
    EngineDied,
    RequestError,
    StepggufError,
)

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
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
PROMPT_FIELDS = {"/v1/completions": "prompt", "/v1/responses": "input"}  # where it is not `messages`
SHOWN = 60  # characters of a wrong value that are shown


@dataclass(frozen=True, slots=True)
class Problem:
    """param: the field of the request that is wrong, as a path. headers: of the response, beside the usual. overflow:
    the context is too small, which each dialect says in its own words."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    overflow: ContextLengthExceeded | None = None


class _OpenAIDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str
    object: Literal["error"]
    request_id: str
    n_prompt_tokens: NotRequired[int]
    n_ctx: NotRequired[int]


class OpenAIError(TypedDict):
    error: _OpenAIDetail


class _AnthropicDetail(TypedDict):
    type: str
    message: str


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: _AnthropicDetail
    request_id: str


class Refusal(HTTPException):
    """A request that HTTP alone is enough to refuse: key, host, size, model, route. It is what it says."""

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


def problem(error: Exception) -> Problem:
    """Any exception. What is not ours to explain is "internal error": its text may hold anything."""
    if isinstance(error, RequestValidationError):
        message, param = explain(error.errors(), error.body)
        return _problem(400, message, param=param)
    if isinstance(error, Refusal):
        return _problem(error.status_code, error.detail, error.code, error.param, error.headers)
    if isinstance(error, HTTPException):
        return _problem(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, StepggufError):
        return _of_ours(error, f"{error.message}. {error.hint}" if error.hint else error.message)
    return _problem(500, "internal error; the server's log has it under this request's id", headers=NO_RETRY)


def _of_ours(error: StepggufError, message: str) -> Problem:
    if isinstance(error, ContextLengthExceeded):
        return replace(_problem(400, message, "context_length_exceeded", "messages"), overflow=error)
    if isinstance(error, RequestError):
        return _problem(400, message, param=error.param)
    if isinstance(error, EngineBusy):
        return _problem(429, message, headers={"retry-after": str(error.retry_after)})
    if isinstance(error, EngineDied) and error.recovered:
        return _problem(503, message, "engine_failed", headers={"retry-after": "1"})
    return _problem(500, message, "engine_failed", headers=NO_RETRY)


def _problem(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Problem:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Problem(status, message, kind, code or CODES.get(status, "internal_error"), param, headers or {})


def openai_error(problem: Problem, trace: str, path: str = "") -> OpenAIError:
    detail: _OpenAIDetail = {
        "message": problem.message,
        "type": problem.type,
        "param": problem.param,
        "code": problem.code,
        "object": "error",
        "request_id": trace,
    }
    if (full := problem.overflow) is not None:
        prompt = PROMPT_FIELDS.get(path, "messages")
        detail["message"] = (
            f"This model's maximum context length is {full.n_ctx} tokens. However, your {prompt} resulted in "
            f"{full.n_prompt} tokens: the prompt is too long and exceeds the available context size "
            f"(exceed_context_size_error). {full.hint}"
        )
        detail["param"], detail["n_prompt_tokens"], detail["n_ctx"] = prompt, full.n_prompt, full.n_ctx
    return {"error": detail}


def anthropic_error(problem: Problem, trace: str) -> AnthropicError:
    message, kind = problem.message, "invalid_request_error" if problem.status < 500 else "api_error"
    if (full := problem.overflow) is not None:
        message = f"prompt is too long: {full.n_prompt} tokens > {full.n_ctx} maximum. {full.hint}"
    error: _AnthropicDetail = {"type": ANTHROPIC_TYPES.get(problem.status, kind), "message": message}
    return {"type": "error", "error": error, "request_id": trace}


def body(problem: Problem, path: str, trace: str) -> OpenAIError | AnthropicError:
    """In the dialect of the route."""
    if path.startswith("/v1/messages"):
        return anthropic_error(problem, trace)
    return openai_error(problem, trace, path)


# a body that does not fit its schema ----------------------------------------------------------------------------


def explain(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str | None]:
    """pydantic's errors as one sentence and the path of the field.

    Of the alternatives of a union the one that went furthest into the body is what was meant.
    """
    paths = [_path(error["loc"], error["type"], body) for error in errors]
    deepest = max(paths, key=len)
    error = errors[paths.index(deepest)]
    if error["type"] == "unknown_field":
        field = _spelled((*deepest, error["ctx"]["field"]))
        return f"{field}: {error['msg']}", field
    field = _spelled(deepest)
    if error["type"] == "missing":
        return f"{field or 'the body'} is missing", field or None
    expected = dict.fromkeys(_expected(e["msg"]) for e, path in zip(errors, paths, strict=True) if path == deepest)
    either = " or ".join(expected).replace(" or expected ", " or ")
    message = f"{field or 'the body'}: {either}, found {_shown(error.get('input'))}"
    return message, field or None


def _path(loc: Sequence[str | int], kind: str, body: object) -> tuple[str | int, ...]:
    """The parts of pydantic's location that are in the body; the others name alternatives of unions."""
    if loc[0] != "body":  # query, path
        return tuple(loc[1:])
    path: list[str | int] = []
    for part in loc[1:]:
        inside = isinstance(part, int) and part < len(body) if isinstance(body, list) else False
        if inside or (isinstance(body, Mapping) and part in body):
            body = body[part]  # type: ignore[index]
            path.append(part)
        elif kind == "missing" and part is loc[-1]:
            path.append(part)
    return tuple(path)


def _spelled(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _expected(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message.replace("Input should be", "expected", 1) if message.startswith("Input should be") else message


def _shown(value: object) -> str:
    """The start of a value as JSON. No more of it is written than that: it may be megabytes."""
    text = ""
    for piece in JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
        text += piece
        if len(text) > SHOWN:
            return text[: SHOWN - 3] + "..."
    return text
