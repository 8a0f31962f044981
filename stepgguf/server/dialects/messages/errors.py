"""Anthropic's form of an error: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from stepgguf.server.problem import Problem

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class AnthropicErrorDetail(TypedDict):
    type: str
    message: str


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class AnthropicErrorForm:
    """Anthropic's form of an error.

    A context that is too small is said in Anthropic's words, our hint after them: Claude Code recognises them, reads
    both numbers, makes its conversation shorter and goes on.

        prompt is too long: 27782 tokens > 27136 maximum
    """

    schema = AnthropicError

    def body(self, problem: Problem, trace_id: str) -> AnthropicError:
        message, type_ = problem.message, "invalid_request_error" if problem.status < 500 else "api_error"
        if (full := problem.overflow) is not None:
            message = f"prompt is too long: {full.n_prompt} tokens > {full.n_ctx} maximum. {full.hint}"
        error: AnthropicErrorDetail = {"type": TYPES.get(problem.status, type_), "message": message}
        return {"type": "error", "error": error, "request_id": trace_id}


ANTHROPIC_ERRORS = AnthropicErrorForm()
