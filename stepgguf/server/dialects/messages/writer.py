"""One answer as a message of Anthropic's: from deltas to the stream's events, and to the whole message.

    stream   message_start  block*  message_delta  message_stop
    whole    the same deltas, folded: `message`

    block := content_block_start content_block_delta* content_block_stop        index 0, 1, 2, ... one at a time

A thinking block ends with a signature_delta, because the schema demands a signature; sealed_reasoning.py says what it
holds. A tool_use block starts with an empty input and spells it out as fragments of JSON. There is always a block: an
answer of which nothing came is an empty text, because clients read content[0].

A call that max_tokens cut short must not be run. In a stream its fragments stay JSON that nobody closed. A whole
message has no place for that: its `input` must be an object, and there are agents that run a tool with an empty one. So
the call is left out of it, and stop_reason says that something is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.server.dialects.messages.errors import ANTHROPIC_ERRORS
from stepgguf.server.dialects.sealed_reasoning import seal
from stepgguf.server.generation import AnswerPart
from stepgguf.server.http.sse import JsonEvent, Record
from stepgguf.server.problem import Problem

Display = Literal["shown", "omitted", "hidden"]
STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}
BLOCK_TYPES = {"reasoning": "thinking", "text": "text"}


@dataclass(slots=True)
class OpenBlock:
    """The block that is being written: as it will be in the whole message, and its text so far."""

    block: dict[str, Any]
    parts: list[str]


def named_event(data: dict[str, Any]) -> JsonEvent:
    """Return an event whose name is its type, as all of Anthropic's are."""
    return JsonEvent(data, data["type"])


PING = named_event({"type": "ping"})


class MessageWriter:
    """Writes one answer as a message. See dialects/writer.py for the protocol.

    display: thinking blocks with their text, with a sealed signature only, or no blocks. n_prompt and max_tokens are
    the request's, in tokens.
    """

    def __init__(self, trace_id: str, model: str, display: Display, *, n_prompt: int, max_tokens: int | None) -> None:
        self._trace_id = trace_id
        self._n_prompt = n_prompt
        self._display = display
        self._max_tokens = max_tokens
        self._open: OpenBlock | None = None
        self._n_blocks = 0
        self.message: dict[str, Any] = {
            "id": f"msg_{trace_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }

    def start(self) -> list[Record]:
        """Give message_start. How much of the prompt was cached is only known later: message_delta corrects the counts,
        as it may."""
        message = {**self.message, "content": [], "usage": message_usage(self._n_prompt)}
        return [named_event({"type": "message_start", "message": message}), PING]

    def feed(self, part: AnswerPart) -> list[Record]:
        return self._feed(part.deltas)

    def finish(self, replies: Sequence[Reply]) -> list[Record]:
        (reply,) = replies
        timings = reply.timings
        events = self._close_block()
        if not self._n_blocks:
            events += [self._open_block(Delta("text", "")), *self._close_block()]
        # Blocks there were, but of calls that were cut: clients read content[0] all the same.
        self.message["content"] = self.message["content"] or [{"type": "text", "text": ""}]
        end = {"stop_reason": self._stop_reason(reply), "stop_sequence": reply.stopped}
        self.message |= end
        self.message["usage"] = message_usage(
            timings.n_prompt, timings.n_cached, timings.n_generated, reply.n_reasoning
        )
        return [
            *events,
            named_event({"type": "message_delta", "delta": end, "usage": self.message["usage"]}),
            named_event({"type": "message_stop"}),
        ]

    def fail(self, problem: Problem) -> list[Record]:
        return [JsonEvent(ANTHROPIC_ERRORS.body(problem, self._trace_id), "error")]

    def whole(self, answers: Sequence[Sequence[Delta]], replies: Sequence[Reply]) -> dict[str, Any]:
        (deltas,) = answers
        self._feed(deltas)
        self.finish(replies)
        return self.message

    def _feed(self, deltas: Iterable[Delta]) -> list[Record]:
        return [record for delta in deltas for record in self._write_delta(delta)]

    def _stop_reason(self, reply: Reply) -> str:
        if reply.stopped is not None:
            return "stop_sequence"
        if reply.finish_reason != "length":
            return STOP_REASONS[reply.finish_reason]
        full = reply.finished is not None and reply.finished.reason == "length"  # and not a call that was left open
        if full and (self._max_tokens is None or reply.timings.n_generated < self._max_tokens):
            return "model_context_window_exceeded"
        return "max_tokens"

    def _write_delta(self, delta: Delta) -> list[Record]:
        if delta.kind == "reasoning" and self._display == "hidden":
            return []
        events: list[Record] = []
        if delta.kind == "call" or (delta.kind != "arguments" and not self._goes_on_with(delta)):
            events += [*self._close_block(), self._open_block(delta)]
        if delta.kind == "call":
            return events
        assert self._open is not None
        self._open.parts.append(delta.text)
        if delta.kind != "reasoning" or self._display == "shown":
            events.append(self._block_delta(_delta_fields(delta)))
        return events

    def _goes_on_with(self, delta: Delta) -> bool:
        return self._open is not None and self._open.block["type"] == BLOCK_TYPES[delta.kind]

    def _open_block(self, delta: Delta) -> JsonEvent:
        block: dict[str, Any]
        if delta.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif delta.kind == "text":
            block = {"type": "text", "text": ""}
        else:
            call_id = f"toolu_{self._trace_id}_{delta.index}"
            block = {"type": "tool_use", "id": call_id, "name": delta.text, "input": {}}
        self._open = OpenBlock(block, [])
        return named_event({"type": "content_block_start", "index": self._n_blocks, "content_block": dict(block)})

    def _close_block(self) -> list[Record]:
        if self._open is None:
            return []
        block, text = self._open.block, "".join(self._open.parts)
        events: list[Record] = []
        if block["type"] == "thinking":
            shown = self._display == "shown"
            block["thinking"] = text if shown else ""
            block["signature"] = (
                self._trace_id if shown else seal(text)
            )  # with the text beside it, it need hold nothing
            events.append(self._block_delta({"type": "signature_delta", "signature": block["signature"]}))
        elif block["type"] == "text":
            block["text"] = text
        else:
            block["input"] = _call_input(text)
        events.append(named_event({"type": "content_block_stop", "index": self._n_blocks}))
        if block.get("input", text) is not None:  # None: the call was cut, and nobody may run it
            self.message["content"].append(block)
        self._n_blocks += 1
        self._open = None
        return events

    def _block_delta(self, delta: dict[str, str]) -> JsonEvent:
        return named_event({"type": "content_block_delta", "index": self._n_blocks, "delta": delta})


def _call_input(arguments: str) -> dict[str, Any] | None:
    """Return a call's input; None if it was cut short."""
    try:
        value: dict[str, Any] = json.loads(arguments)
    except ValueError:
        return None
    return value


def _delta_fields(delta: Delta) -> dict[str, str]:
    if delta.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": delta.text}
    if delta.kind == "text":
        return {"type": "text_delta", "text": delta.text}
    return {"type": "input_json_delta", "partial_json": delta.text}


def message_usage(n_prompt: int, n_cached: int = 0, n_generated: int = 0, n_reasoning: int = 0) -> dict[str, Any]:
    """Return the counts of a message. Anthropic's input_tokens are those that were not in the cache; the sum of the
    three counts is the prompt."""
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_generated,
        "output_tokens_details": {"thinking_tokens": n_reasoning},
    }
