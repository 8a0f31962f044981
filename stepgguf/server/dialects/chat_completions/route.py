"""POST /v1/chat/completions.

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

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.runtime.engine import Step
from stepgguf.server.body.objects import JsonRoute
from stepgguf.server.body.reasoning import ReasoningMap
from stepgguf.server.dialects.chat_completions.request import ChatBody, wants_usage
from stepgguf.server.dialects.openai import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    CompletionDetails,
    FinishReason,
    Logprobs,
    ToolCall,
    TopLogprob,
    Usage,
)
from stepgguf.server.generation import Exchange
from stepgguf.server.http.sse import DONE, Events, EventStream, event
from stepgguf.server.problem import Problem, openai_error
from stepgguf.server.service import TheService, copies, now, trace

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def chat_completions(body: ChatBody, request: Request, service: TheService) -> Response:
    """Answer a conversation; think first, call tools, keep to a form. With `stream`, as server-sent events."""
    writer = ChatWriter(
        id=f"chatcmpl-{trace(request)}",
        created=now(),
        model=service.model(body.model),
        fingerprint=service.fingerprint,
        shows_reasoning=body.shows_reasoning(),
        with_details=isinstance(body.reasoning, ReasoningMap),
        with_logprobs=bool(body.logprobs),
        trace=trace(request),
    )
    n, with_usage = body.n_answers(service), wants_usage(body.stream, body.stream_options)
    prepared = await service.prepare(body)
    exchange = await service.start(copies(prepared, n), request)
    if body.stream:
        events = writer.stream(exchange, with_usage=with_usage)
        return EventStream(events, service.config, failure=lambda problem: writer.failure(problem, exchange))
    return JSONResponse(writer.whole(exchange, await exchange.whole(request)))


@dataclass(frozen=True, slots=True)
class ChatWriter:
    """Deltas to chunks, or to one completion."""

    id: str
    created: int
    model: str
    fingerprint: str
    shows_reasoning: bool
    with_details: bool
    with_logprobs: bool
    trace: str

    # a stream ---------------------------------------------------------------------------------------------------

    async def stream(self, exchange: Exchange, *, with_usage: bool) -> Events:
        opener: ChatDelta = {"role": "assistant", "content": "", "reasoning": None, "reasoning_content": None}
        yield b"".join(self._chunk(i, opener) for i in range(len(exchange.replies)))
        async for part in exchange.parts():
            chunks = [self._delta(part.index, delta) for delta in part.deltas]
            if part.finish_reason is not None:
                chunks.append(self._chunk(part.index, _delta(), finish_reason=cast(FinishReason, part.finish_reason)))
            yield b"".join(chunks)
        yield (self._usage(exchange.replies) if with_usage else b"") + DONE

    def failure(self, problem: Problem, exchange: Exchange) -> bytes:
        """The error, for clients that look for it; then what ends the answers for those that do not. They were cut
        short, which is what "length" says."""
        ends = [self._chunk(i, _delta(), finish_reason="length") for i in exchange.unfinished]
        return b"".join([event(openai_error(problem, self.trace)), *ends, DONE])

    def _delta(self, index: int, delta: Delta) -> bytes:
        if delta.kind == "reasoning":
            if not self.shows_reasoning:
                return b""
            content = _delta(reasoning=delta.text)
            if self.with_details:
                content["reasoning_details"] = _details(delta.text)
            return self._chunk(index, content)
        if delta.kind == "text":
            return self._chunk(index, _delta(content=delta.text), logprobs=self._logprobs(delta.steps))
        content = _delta()
        if delta.kind == "call":
            content["tool_calls"] = [{"index": delta.index, **_call(delta.text)}]
        else:
            content["tool_calls"] = [{"index": delta.index, "function": {"arguments": delta.text}}]
        return self._chunk(index, content)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        logprobs: Logprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        chunk = self._head()
        chunk["choices"] = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        return event(chunk)

    def _usage(self, replies: Sequence[Reply]) -> bytes:
        return event({**self._head(), "usage": usage(replies)})

    def _head(self) -> ChatChunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [],
        }

    # a whole answer ---------------------------------------------------------------------------------------------

    def whole(self, exchange: Exchange, answers: Sequence[Sequence[Delta]]) -> ChatCompletion:
        choices = [
            self._choice(i, deltas, reply)
            for i, (deltas, reply) in enumerate(zip(answers, exchange.replies, strict=True))
        ]
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            "usage": usage(exchange.replies),
        }

    def _choice(self, index: int, deltas: Sequence[Delta], reply: Reply) -> ChatChoice:
        steps = [step for delta in deltas for step in delta.steps]
        return {
            "index": index,
            "message": self._message(deltas),
            "logprobs": self._logprobs(steps),
            "finish_reason": cast(FinishReason, reply.finish_reason),
        }

    def _message(self, deltas: Sequence[Delta]) -> ChatMessage:
        text = "".join(delta.text for delta in deltas if delta.kind == "text")
        reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning" and self.shows_reasoning)
        calls: list[ToolCall] = []
        for delta in deltas:
            if delta.kind == "call":
                calls.append(_call(delta.text))
            elif delta.kind == "arguments":
                calls[delta.index]["function"]["arguments"] += delta.text
        message: ChatMessage = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "reasoning": reasoning or None,
            "reasoning_content": reasoning or None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        if self.with_details and reasoning:
            message["reasoning_details"] = _details(reasoning)
        return message

    def _logprobs(self, steps: Sequence[Step]) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        content = [
            {
                **_top(step.piece, step.logprob),
                "top_logprobs": [_top(top.piece, top.logprob) for top in step.top],
            }
            for step in steps
            if step.logprob is not None
        ]
        return cast(Logprobs, {"content": content, "refusal": None})


def usage(replies: Sequence[Reply]) -> Usage:
    """Of answers to the same prompt: it is counted once. Answers that did not finish are not counted."""
    timings = [reply.timings for reply in replies]
    n_prompt, n_cached = timings[0].n_prompt, timings[0].n_cached
    n_generated = sum(t.n_generated for t in timings)
    details: CompletionDetails = {"reasoning_tokens": sum(reply.n_reasoning for reply in replies)}
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


def _delta(*, content: str | None = None, reasoning: str | None = None) -> ChatDelta:
    return {"content": content, "reasoning": reasoning, "reasoning_content": reasoning}


def _call(name: str) -> ToolCall:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _details(text: str) -> list[dict[str, Any]]:
    return [{"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}]


def _top(piece: bytes, logprob: float) -> TopLogprob:
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}
