"""What Chat Completions answers with. These types check the writer and make the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from stepgguf.server.dialects.openai import CompletionUsage, FinishReason


class ChatTopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatFunctionCall(TypedDict):
    name: str
    arguments: str


class ChatToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: ChatFunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    refusal: None
    tool_calls: NotRequired[list[ChatToolCall]]
    reasoning_details: NotRequired[list[dict[str, Any]]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatDelta(TypedDict):
    """Either reasoning or content or calls; the others are null or absent. Both names of the reasoning are there."""

    role: NotRequired[Literal["assistant"]]
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_details: NotRequired[list[dict[str, Any]]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage]
