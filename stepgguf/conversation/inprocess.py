"""A session's Backend over a model in this process."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stepgguf.chat.exchange import ChatModel, Reply
from stepgguf.chat.output import Delta
from stepgguf.chat.request import AnswerFormat, ChatRequest, JsonObject, JsonSchema, Tool
from stepgguf.conversation.records import Origin, Settings, Usage
from stepgguf.runtime.engine import Event, Finished, Prefill, Queued, Sampling, Tokens


class InProcess:
    def __init__(self, model: ChatModel, origin: Origin | None = None) -> None:
        info = model.engine.info
        self._model = model
        self.origin = origin or Origin(info.name, "")
        self.n_ctx: int | None = info.n_ctx
        self.default: Sampling | None = info.sampling

    def count(self, text: str) -> int:
        return len(self._model.engine.tokenize_piece(text))

    def start(self, messages: Sequence[Mapping[str, Any]], settings: Settings) -> InProcessGeneration:
        request = ChatRequest(
            messages,
            replace(self._model.engine.info.sampling, **settings.sampling),
            tools=tuple(as_tool(tool) for tool in settings.tools),
            format=_format(settings.json),
            reasoning_budget=settings.reasoning_budget,
            max_tokens=settings.max_tokens,
        )
        return InProcessGeneration(self._model, request)


def as_tool(tool: Mapping[str, Any]) -> Tool:
    """From OpenAI's JSON, with or without its envelope {"type": "function", "function": ...}."""
    function = tool.get("function", tool)
    return Tool(function["name"], function.get("description"), function.get("parameters") or {})


def _format(json: Mapping[str, Any] | bool) -> AnswerFormat | None:
    if isinstance(json, bool):
        return JsonObject() if json else None
    return JsonSchema(json)


class InProcessGeneration:
    def __init__(self, model: ChatModel, request: ChatRequest) -> None:
        prepared = model.prepare(request)
        self._reply = Reply(prepared)
        self._thinking = prepared.in_reasoning
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._first_token = 0.0
        self._n_generated = 0
        self.usage = Usage(n_prompt=len(prepared.request.prompt), n_ctx=model.engine.info.n_ctx)
        self._ticket = model.engine.submit(prepared.request, self._events.put)

    def next(self, seconds: float | None) -> list[Queued | Prefill | Delta] | None:
        if self._reply.finished is not None:
            return None
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return []
        if isinstance(event, (Queued, Prefill)):
            return [event]
        deltas: list[Queued | Prefill | Delta] = [*self._reply.feed(event)]
        self._count(event)
        if self._reply.stopped is not None:
            self._ticket.cancel()
        if isinstance(event, Finished) and event.error is not None:
            raise event.error
        return deltas

    def end_reasoning(self) -> bool:
        self._ticket.end_reasoning()
        return self._thinking

    def cancel(self) -> None:
        self._ticket.cancel()

    def close(self) -> None:
        self._ticket.cancel()
        while self._reply.finished is None:
            event = self._events.get()
            self._reply.feed(event)
            self._count(event)

    def _count(self, event: Event) -> None:
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
            cancelled = event.reason == "cancelled" and self._reply.stopped is None
            usage.finish_reason = "cancelled" if cancelled else self._reply.finish_reason
