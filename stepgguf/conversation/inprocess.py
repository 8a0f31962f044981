"""A session's ChatBackend over a model in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stepgguf.chat.exchange import ChatModel, PreparedRequest, Reply
from stepgguf.chat.messages import ChatMessage
from stepgguf.chat.request import AnswerFormat, ChatRequest, JsonObject, JsonSchema, Tool
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage, ChatSettings
from stepgguf.conversation.session import Progress
from stepgguf.runtime.engine import Event, Finished, Prefill, Queued, Sampling, Stream, Tokens


class InProcessBackend:
    """Answers with a model that is loaded here. origin: what sessions are marked with; by default the model's name."""

    def __init__(self, model: ChatModel, origin: AnswerOrigin | None = None) -> None:
        info = model.engine.info
        self._model = model
        self.origin = origin or AnswerOrigin(info.name, "")
        self.n_ctx: int | None = info.n_ctx
        self.default_sampling: Sampling | None = info.sampling

    def count_tokens(self, text: str) -> int:
        return len(self._model.engine.tokenize_piece(text))

    def start_answer(self, messages: Sequence[ChatMessage], settings: ChatSettings) -> InProcessGeneration:
        engine = self._model.engine
        request = ChatRequest(
            messages,
            replace(engine.info.sampling, **settings.sampling),
            tools=tuple(tool_from_json(tool) for tool in settings.tools),
            format=_answer_format(settings.json),
            reasoning_budget=settings.reasoning_budget,
            max_tokens=settings.max_tokens,
        )
        prepared = self._model.prepare(request)
        return InProcessGeneration(prepared, Stream(engine, prepared.request), engine.info.n_ctx)


def tool_from_json(tool: Mapping[str, Any]) -> Tool:
    """Read a tool from OpenAI's JSON, with or without its envelope {"type": "function", "function": ...}."""
    function = tool.get("function", tool)
    return Tool(function["name"], function.get("description"), function.get("parameters") or {})


def _answer_format(json: Mapping[str, object] | bool) -> AnswerFormat | None:
    if isinstance(json, bool):
        return JsonObject() if json else None
    return JsonSchema(json)


class InProcessGeneration:
    """One answer under way: the stream of an engine, read as deltas and counted."""

    def __init__(self, prepared: PreparedRequest, stream: Stream, n_ctx: int) -> None:
        self.usage = AnswerUsage(n_prompt=len(prepared.request.prompt), n_ctx=n_ctx)
        self._stream = stream
        self._reply = Reply(prepared)
        self._in_reasoning = prepared.in_reasoning
        self._first_token = 0.0
        self._n_generated = 0

    def next_updates(self, seconds: float | None) -> list[Progress] | None:
        if self._stream.finished is not None:
            return None
        event = self._stream.next_event(seconds)
        if event is None:
            return []
        if isinstance(event, (Queued, Prefill)):
            return [event]
        deltas: list[Progress] = [*self._reply.feed(event)]
        self._count_event(event)
        if self._reply.stopped is not None:  # a stop text: what the engine makes from here on is not shown
            self._stream.cancel()
        if isinstance(event, Finished) and event.error is not None:
            raise event.error
        return deltas

    def end_reasoning(self) -> bool:
        self._stream.end_reasoning()
        return self._in_reasoning

    def cancel(self) -> None:
        self._stream.cancel()

    def close(self) -> None:
        self._stream.cancel()
        for event in self._stream:  # what nobody reads any more is still counted
            self._reply.feed(event)
            self._count_event(event)

    def _count_event(self, event: Event) -> None:
        """Bring the usage up to date; the end brings the engine's own counts."""
        usage, now = self.usage, time.monotonic()
        if isinstance(event, Tokens):
            self._first_token = self._first_token or now
            self._n_generated += len(event.steps)
            usage.generation_seconds = now - self._first_token
        usage.n_reasoning = self._reply.n_reasoning
        usage.n_text = self._n_generated - usage.n_reasoning
        if isinstance(event, Finished):
            timings = event.timings
            usage.n_cached, usage.n_steps = timings.n_cached, timings.n_steps
            usage.n_drafted, usage.n_accepted = sum(timings.drafted), sum(timings.accepted)
            usage.prompt_seconds, usage.generation_seconds = timings.prompt_seconds, timings.generation_seconds
            usage.budget_reached, usage.loop_broken = timings.budget_reached, timings.loop_broken
            # a stop text is a cancel to the engine, and a natural end to the user
            cancelled = event.reason == "cancelled" and self._reply.stopped is None
            usage.finish_reason = "cancelled" if cancelled else self._reply.finish_reason
