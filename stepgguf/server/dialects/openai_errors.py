"""OpenAI's form of an error, in its three dialects and on the routes of none:

    {"error": {"message", "type", "param", "code", "object": "error", "request_id"}}

`object` is there because ChatNVIDIA raises errors inside a stream only if it says "error".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from typing_extensions import NotRequired, TypedDict

from stepgguf.server.problem import Problem


class OpenAIErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str
    object: Literal["error"]
    request_id: str
    n_prompt_tokens: NotRequired[int]
    n_ctx: NotRequired[int]


class OpenAIError(TypedDict):
    error: OpenAIErrorDetail


@dataclass(frozen=True, slots=True)
class OpenAIErrorForm:
    """OpenAI's form of an error. prompt_field: the field of the body that a prompt which is too long comes from.

    Agents make a conversation shorter and go on when they recognise a full context, and they recognise it by words.
    OpenAI's come first, our hint after them. LangChain, which has no eye for the code, goes by "prompt is too long";
    clients of llama-server by "exceeds the available context size", exceed_context_size_error, and the numbers as
    n_prompt_tokens and n_ctx.
    """

    prompt_field: str = "messages"

    @property
    def schema(self) -> type[OpenAIError]:
        return OpenAIError

    def body(self, problem: Problem, trace_id: str) -> OpenAIError:
        detail: OpenAIErrorDetail = {
            "message": problem.message,
            "type": problem.type,
            "param": problem.param,
            "code": problem.code,
            "object": "error",
            "request_id": trace_id,
        }
        if (full := problem.overflow) is not None:
            detail["message"] = (
                f"This model's maximum context length is {full.n_ctx} tokens. However, your {self.prompt_field} "
                f"resulted in {full.n_prompt} tokens: the prompt is too long and exceeds the available context size "
                f"(exceed_context_size_error). {full.hint}"
            )
            detail["param"], detail["n_prompt_tokens"], detail["n_ctx"] = self.prompt_field, full.n_prompt, full.n_ctx
        return {"error": detail}


OPENAI_ERRORS = OpenAIErrorForm()
