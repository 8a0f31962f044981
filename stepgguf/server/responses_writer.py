"""One answer as a response of OpenAI's Responses API: from deltas to the stream's events, and to the whole object.

    response.created  response.in_progress  item*  response.completed | response.incomplete | response.failed
    item := response.output_item.added  (part | arguments)  response.output_item.done     output_index 0, 1, 2, ...
    part := response.content_part.added  *_text.delta*  *_text.done  response.content_part.done
    arguments := response.function_call_arguments.delta*  response.function_call_arguments.done

Every event has the next sequence_number. Reasoning is the item's content (reasoning_text); there is no summary, for
nobody wrote one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.server.problems import Problem
from stepgguf.server.sealed import seal
from stepgguf.server.service import now

Event = dict[str, Any]  # its "type" is also the event's name
ITEM_TYPES = {"reasoning": "reasoning", "text": "message", "call": "function_call"}
TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


@dataclass(slots=True)
class _Open:
    """The item that is being written: as it will be in the response, and its text so far."""

    item: dict[str, Any]
    parts: list[str]


class ResponseWriter:
    """start, feed..., then finish or fail. echo: the request's fields that the response repeats.

    sealed: reasoning items also carry their text in encrypted_content, for clients that send back only that.
    """

    def __init__(self, trace_id: str, model: str, created: int, echo: dict[str, Any], *, sealed: bool) -> None:
        self._trace_id = trace_id
        self._sealed = sealed
        self._open: _Open | None = None
        self._n_events = 0
        self.response: dict[str, Any] = {
            "id": f"resp_{trace_id}",
            "object": "response",
            "created_at": created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echo,
        }

    def start(self) -> list[Event]:
        return [self._state("created"), self._state("in_progress")]

    def feed(self, deltas: Iterable[Delta]) -> list[Event]:
        return [event for delta in deltas for event in self._write(delta)]

    def finish(self, reply: Reply) -> list[Event]:
        """After the last delta of a reply that did not fail."""
        status = "incomplete" if reply.finish_reason == "length" else "completed"
        events = self._close(status)
        self.response |= {"status": status, "usage": _usage(reply)}
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = now()
        return [*events, self._state(status)]

    def fail(self, problem: Problem) -> list[Event]:
        """What was being written stays unfinished."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": problem.message}}
        return [self._state("failed")]

    def _write(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if delta.kind == "call" or (delta.kind != "arguments" and not self._in_item(delta)):
            events += [*self._close("completed"), *self._start(delta)]
        if delta.kind == "call":
            return events
        assert self._open is not None
        self._open.parts.append(delta.text)
        item_type = self._open.item["type"]
        if item_type == "function_call":
            events.append(self._event("response.function_call_arguments.delta", delta=delta.text))
        else:
            events.append(self._part_event(f"{TEXT_EVENTS[item_type]}.delta", delta=delta.text, **_logprobs(item_type)))
        return events

    def _in_item(self, delta: Delta) -> bool:
        return self._open is not None and self._open.item["type"] == ITEM_TYPES[delta.kind]

    def _start(self, delta: Delta) -> list[Event]:
        name = f"{self._trace_id}_{self._index}"
        item: dict[str, Any]
        if delta.kind == "reasoning":
            item = {"id": f"rs_{name}", "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        elif delta.kind == "text":
            item = {"id": f"msg_{name}", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        else:
            item = {"id": f"fc_{name}", "type": "function_call", "status": "in_progress"}
            item |= {"call_id": f"call_{name}", "name": delta.text, "arguments": ""}
        self._open = _Open(item, [])
        events = [self._event("response.output_item.added", item=dict(item))]
        if delta.kind != "call":
            events.append(self._part_event("response.content_part.added", part=_part(item["type"], "")))
        return events

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, text = self._open.item, "".join(self._open.parts)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [self._event("response.function_call_arguments.done", name=item["name"], arguments=text)]
        else:
            part = _part(item["type"], text)
            item["content"] = [part]
            done = f"{TEXT_EVENTS[item['type']]}.done"
            events = [
                self._part_event(done, text=text, **_logprobs(item["type"])),
                self._part_event("response.content_part.done", part=part),
            ]
        if item["type"] == "reasoning" and self._sealed:
            item["encrypted_content"] = seal(text)
        events.append(self._event("response.output_item.done", item=item))
        self.response["output"].append(item)
        self._open = None
        return events

    @property
    def _index(self) -> int:
        return len(self.response["output"])

    def _state(self, name: str) -> Event:
        """With the output so far: the items that are finished."""
        response = {**self.response, "output": list(self.response["output"])}
        return self._numbered({"type": f"response.{name}", "response": response})

    def _event(self, type: str, **fields: Any) -> Event:
        assert self._open is not None
        whose = {} if "item" in fields else {"item_id": self._open.item["id"]}
        return self._numbered({"type": type, **whose, "output_index": self._index, **fields})

    def _part_event(self, type: str, **fields: Any) -> Event:
        return self._event(type, content_index=0, **fields)

    def _numbered(self, event: Event) -> Event:
        self._n_events += 1
        return {**event, "sequence_number": self._n_events - 1}


def _part(item_type: str, text: str) -> dict[str, Any]:
    if item_type == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(item_type: str) -> dict[str, Any]:
    """The field that text events must have and reasoning events do not."""
    return {"logprobs": []} if item_type == "message" else {}


def _usage(reply: Reply) -> dict[str, Any]:
    timings = reply.timings
    details: dict[str, Any] = {"reasoning_tokens": reply.n_reasoning}
    if reply.thinking_cut is not None:
        details["reasoning_cut"] = reply.thinking_cut
    return {
        "input_tokens": timings.n_prompt,
        "input_tokens_details": {"cached_tokens": timings.n_cached, "cache_write_tokens": 0},
        "output_tokens": timings.n_generated,
        "output_tokens_details": details,
        "total_tokens": timings.n_prompt + timings.n_generated,
    }
