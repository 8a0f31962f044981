"""Answers as Chat Completions sends them.

    stream   opener   delta*   finish   [usage]   [DONE]         one opener and one finish per answer
    whole    the same deltas, folded

Clients are particular, so: no delta has both reasoning and content (StepFun's own loop drops the content then); both
names of the reasoning are in every delta, null or not (its snippets read the attribute unasked); usage comes only if
asked for (they read choices[0] of every chunk); exactly one finish_reason is not null (LangChain joins them).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.runtime.engine import Step
from stepgguf.server.dialects.chat_completions.shapes import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatToolCall,
    ChatTopLogprob,
)
from stepgguf.server.dialects.openai import DONE, CompletionUsage, FinishReason, usage_of
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.generation import AnswerPart
from stepgguf.server.http.sse import JsonEvent, Record
from stepgguf.server.problem import Problem
from stepgguf.server.service import AnswerHead


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a request wants to see. with_details: the reasoning also as OpenRouter's reasoning_details."""

    n_answers: int
    shows_reasoning: bool
    with_details: bool
    with_logprobs: bool
    with_usage: bool


class ChatWriter:
    """Writes answers as chat.completion.chunk objects, or as one chat.completion. See dialects/writer.py for the
    protocol."""

    def __init__(self, head: AnswerHead, options: ChatOptions) -> None:
        self._head, self._options = head, options
        self._unfinished = list(range(options.n_answers))  # answers without a finish_reason so far

    # a stream ---------------------------------------------------------------------------------------------------

    def start(self) -> list[Record]:
        opener: ChatDelta = {"role": "assistant", "content": "", "reasoning": None, "reasoning_content": None}
        return [self._chunk(index, opener) for index in self._unfinished]

    def feed(self, part: AnswerPart) -> list[Record]:
        records: list[Record] = [
            self._chunk(
                part.index,
                self._chat_delta(delta),
                logprobs=self._logprobs(delta.steps) if delta.kind == "text" else None,
            )
            for delta in part.deltas
            if delta.kind != "reasoning" or self._options.shows_reasoning
        ]
        if part.finish_reason is not None:
            self._unfinished.remove(part.index)
            records.append(self._end(part.index, cast(FinishReason, part.finish_reason)))
        return records

    def finish(self, replies: Sequence[Reply]) -> list[Record]:
        if not self._options.with_usage:
            return [DONE]
        return [JsonEvent({**self._empty_chunk(), "usage": self._usage(replies)}), DONE]

    def fail(self, problem: Problem) -> list[Record]:
        """Give the error, for clients that look for it, then what ends the answers for those that do not: "length",
        which says that they were cut short."""
        error = JsonEvent(OPENAI_ERRORS.body(problem, self._head.trace_id))
        return [error, *(self._end(index, "length") for index in self._unfinished), DONE]

    def _chat_delta(self, delta: Delta) -> ChatDelta:
        if delta.kind == "text":
            return _delta(content=delta.text)
        if delta.kind == "reasoning":
            content = _delta(reasoning=delta.text)
            if self._options.with_details:
                content["reasoning_details"] = _reasoning_details(delta.text)
            return content
        content = _delta()
        if delta.kind == "call":
            content["tool_calls"] = [{"index": delta.index, **_begun_call(delta.text)}]
        else:
            content["tool_calls"] = [{"index": delta.index, "function": {"arguments": delta.text}}]
        return content

    def _end(self, index: int, reason: FinishReason) -> JsonEvent:
        return self._chunk(index, _delta(), finish_reason=reason)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> JsonEvent:
        chunk = self._empty_chunk()
        chunk["choices"] = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        return JsonEvent(chunk)

    def _empty_chunk(self) -> ChatChunk:
        return {
            "id": f"chatcmpl-{self._head.trace_id}",
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "choices": [],
        }

    # a whole answer ---------------------------------------------------------------------------------------------

    def whole(self, answers: Sequence[Sequence[Delta]], replies: Sequence[Reply]) -> ChatCompletion:
        choices = [
            self._choice(i, deltas, reply) for i, (deltas, reply) in enumerate(zip(answers, replies, strict=True))
        ]
        return {
            "id": f"chatcmpl-{self._head.trace_id}",
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "choices": choices,
            "usage": self._usage(replies),
        }

    def _choice(self, index: int, deltas: Sequence[Delta], reply: Reply) -> ChatChoice:
        steps = [step for delta in deltas for step in delta.steps]
        return {
            "index": index,
            "message": self._folded_message(deltas),
            "logprobs": self._logprobs(steps),
            "finish_reason": cast(FinishReason, reply.finish_reason),
        }

    def _folded_message(self, deltas: Sequence[Delta]) -> ChatMessage:
        text = "".join(delta.text for delta in deltas if delta.kind == "text")
        reasoning = "".join(
            delta.text for delta in deltas if delta.kind == "reasoning" and self._options.shows_reasoning
        )
        calls: list[ChatToolCall] = []
        for delta in deltas:
            if delta.kind == "call":
                calls.append(_begun_call(delta.text))
            elif delta.kind == "arguments":
                calls[delta.index]["function"]["arguments"] += delta.text
        message: ChatMessage = {
            "role": "assistant",
            "content": None if calls and not text else text,  # as OpenAI has it beside calls
            "reasoning": reasoning or None,
            "reasoning_content": reasoning or None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        if self._options.with_details and reasoning:
            message["reasoning_details"] = _reasoning_details(reasoning)
        return message

    def _logprobs(self, steps: Sequence[Step]) -> ChatLogprobs | None:
        if not self._options.with_logprobs:
            return None
        content: list[ChatTokenLogprob] = [
            {
                **_top_logprob(step.piece, step.logprob),
                "top_logprobs": [_top_logprob(top.piece, top.logprob) for top in step.top],
            }
            for step in steps
            if step.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def _usage(self, replies: Sequence[Reply]) -> CompletionUsage:
        """Return the usage. All answers are to the same prompt, which is counted once."""
        return usage_of(replies, replies[0].timings.n_prompt)


def _delta(*, content: str | None = None, reasoning: str | None = None) -> ChatDelta:
    return {"content": content, "reasoning": reasoning, "reasoning_content": reasoning}


def _begun_call(name: str) -> ChatToolCall:
    # An id need not tell anything, but must differ from those of earlier turns.
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _reasoning_details(text: str) -> list[dict[str, Any]]:
    return [{"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}]


def _top_logprob(piece: bytes, logprob: float) -> ChatTopLogprob:
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}
