"""What Chat Completions and Completions have in common: the options of a stream, the usage, the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from stepgguf.chat.exchange import Reply
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import CheckedObject, ignored
from stepgguf.server.http.sse import TextEvent

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
DONE = TextEvent("[DONE]")  # after the last record, also after an error


class StreamOptions(CheckedObject):
    include_usage: bool | None = Field(None, description="true: a last chunk, without choices, has the usage.")
    include_obfuscation: object = ignored("it only pads events")
    continuous_usage_stats: object = ignored("usage comes with the last chunk")


def wants_usage(stream: bool | None, options: StreamOptions | None) -> bool:
    """Whether a stream ends with the usage. RequestError: there is no stream to have options."""
    if options is not None and not stream:
        raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
    return options is not None and bool(options.include_usage)


class PromptTokenDetails(TypedDict):
    cached_tokens: int


class CompletionTokenDetails(TypedDict):
    """reasoning_cut: "budget" or "loop", if the reasoning was ended before the model did."""

    reasoning_tokens: int
    reasoning_cut: NotRequired[str]


class CompletionUsage(TypedDict):
    """cached_tokens stands here too because StepFun's clients look for it here."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails
    completion_tokens_details: CompletionTokenDetails
    cached_tokens: int


def usage_of(replies: Sequence[Reply], n_prompt: int) -> CompletionUsage:
    """Return the usage of answers that were made at once; those that did not finish are not counted.

    n_prompt: tokens of all their prompts, each prompt once.
    """
    timings = [reply.timings for reply in replies]
    # The later answers find in the cache what the first one has read; only its count says what the request saved.
    n_cached, n_generated = timings[0].n_cached, sum(t.n_generated for t in timings)
    details: CompletionTokenDetails = {"reasoning_tokens": sum(reply.n_reasoning for reply in replies)}
    if cuts := [reply.reasoning_cut for reply in replies if reply.reasoning_cut is not None]:
        details["reasoning_cut"] = cuts[0]
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": details,
        "cached_tokens": n_cached,
    }
