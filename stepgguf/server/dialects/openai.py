"""What OpenAI's dialects answer with. These types check the writers and make the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class PromptDetails(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict):
    """reasoning_cut: "budget" or "loop", if the thinking was ended before the model did."""

    reasoning_tokens: int
    reasoning_cut: NotRequired[str]


class Usage(TypedDict):
    """cached_tokens stands here too because StepFun's clients look for it here."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    cached_tokens: int


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]
    reasoning_details: NotRequired[list[dict[str, Any]]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """Either reasoning or content or calls; the others are null or absent. Both names of the reasoning are there."""

    role: NotRequired[Literal["assistant"]]
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_details: NotRequired[list[dict[str, Any]]]


class ChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]


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
    usage: NotRequired[Usage]


class Model(TypedDict):
    """root is null: clients take the first such model for their default."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: None
    context_length: int


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]
