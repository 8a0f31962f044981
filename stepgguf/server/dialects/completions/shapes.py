"""What Completions answers with. These types check the writer and make the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from stepgguf.server.dialects.openai import CompletionUsage, FinishReason


class TextLogprobs(TypedDict):
    """top_logprobs: of each token the likeliest, and its own if that is not among them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[CompletionUsage]
