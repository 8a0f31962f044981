"""One answer as a response of OpenAI's Responses API: from deltas to the whole object and to the stream's events.

    response.created  response.in_progress  item*  response.completed | response.incomplete | response.failed
    item := response.output_item.added  (part | fragment* done)  response.output_item.done     output_index 0, 1, 2, ...
    part := response.content_part.added  fragment* done  response.content_part.done
    fragment := response.KIND.delta, done := response.KIND.done: KIND is reasoning_text, output_text,
                function_call_arguments, custom_tool_call_input

Nothing is kept but the answer: its items, each with its text and where the fragments ended in which it came. `events`
tells what happened from that, as often as it is asked and from any number on, so a stream that is live and one that is
attached to later are the same. Reasoning is an item's content (reasoning_text); there is no summary, for nobody wrote
one.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.server.dialects.responses.tools import InputReader, Offer
from stepgguf.server.dialects.sealed_reasoning import seal
from stepgguf.server.problem import Problem
from stepgguf.server.service import now

Event = dict[str, Any]  # its "type" is also the event's name
ItemStatus = Literal["in_progress", "completed", "incomplete"]
OPENING = ("created", "in_progress")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What an item of a type looks like. id: the prefix of its ids. text: what the events of its text are called. part:
    the type of its one content part; None: the text is the field `field`."""

    id: str
    text: str
    part: str | None = None
    field: str = "content"


KINDS = {
    "reasoning": _Kind("rs", "response.reasoning_text", "reasoning_text"),
    "message": _Kind("msg", "response.output_text", "output_text"),
    "function_call": _Kind("fc", "response.function_call_arguments", field="arguments"),
    "custom_tool_call": _Kind("ctc", "response.custom_tool_call_input", field="input"),
}
FEEDS = {"reasoning": "reasoning", "message": "text"}  # the deltas that go on with an item


@dataclass(slots=True)
class _Item:
    """One item of the output. head: its fields before its text. text: UTF-8; ends: of its fragments, in bytes. reader:
    what takes the text of a custom tool's call out of JSON."""

    head: dict[str, Any]
    sealed: bool = False
    reader: InputReader | None = None
    status: ItemStatus = "in_progress"
    text: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("I"))

    @property
    def kind(self) -> _Kind:
        return KINDS[self.head["type"]]

    @property
    def n_events(self) -> int:
        n_before = 1 if self.kind.part is None else 2
        return n_before + len(self.ends) + (0 if self.status == "in_progress" else n_before + 1)

    @property
    def whole(self) -> dict[str, Any]:
        """As far as it has come."""
        text = self.text.decode()
        item = {**self.head, "status": self.status, self.kind.field: self._content(text)}
        if self.sealed and item["type"] == "reasoning" and self.status != "in_progress":
            item["encrypted_content"] = seal(text)
        return item

    @property
    def is_call(self) -> bool:
        """One that is whole, if the answer was cut right after it."""
        if self.reader is not None:
            return self.reader.ended
        try:
            return self.kind.part is None and isinstance(json.loads(self.text), dict)
        except ValueError:
            return False

    def add(self, fragment: str) -> None:
        text = fragment if self.reader is None else self.reader.feed(fragment)
        if text:
            self.text += text.encode()
            self.ends.append(len(self.text))

    def events(self, skip: int) -> Iterator[Event]:
        """All but the first `skip`, without what the events of all items have."""
        before = self._before()
        yield from before[skip:]
        skip = max(0, skip - len(before))
        for i in range(skip, len(self.ends)):
            fragment = self.text[self.ends[i - 1] if i else 0 : self.ends[i]].decode()
            yield self._event(f"{self.kind.text}.delta", delta=fragment, **self._logprobs())
        if self.status != "in_progress":
            yield from self._after()[max(0, skip - len(self.ends)) :]

    def _before(self) -> list[Event]:
        started = {**self.head, "status": "in_progress", self.kind.field: "" if self.kind.part is None else []}
        added: list[Event] = [{"type": "response.output_item.added", "item": started}]
        if self.kind.part is not None:
            added.append(self._event("response.content_part.added", part=self._part("")))
        return added

    def _after(self) -> list[Event]:
        text = self.text.decode()
        name = {"name": self.head["name"]} if self.head["type"] == "function_call" else {}
        field = {"text" if self.kind.part else self.kind.field: text}
        events = [self._event(f"{self.kind.text}.done", **name, **field, **self._logprobs())]
        if self.kind.part is not None:
            events.append(self._event("response.content_part.done", part=self._part(text)))
        return [*events, {"type": "response.output_item.done", "item": self.whole}]

    def _event(self, type: str, **fields: Any) -> Event:
        index = {} if self.kind.part is None else {"content_index": 0}
        return {"type": type, "item_id": self.head["id"], **index, **fields}

    def _content(self, text: str) -> Any:
        return text if self.kind.part is None else [self._part(text)]

    def _part(self, text: str) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.kind.part == "output_text" else {}
        return {"type": self.kind.part, "text": text, **more}

    def _logprobs(self) -> dict[str, Any]:
        """The field that text events must have and others do not."""
        return {"logprobs": []} if self.kind.part == "output_text" else {}


class ResponseWriter:
    """feed..., then finish or fail. echo: the request's fields that the response repeats, as JSON. offers: the tools,
    by the names that the model knows.

    sealed: reasoning items also carry their text in encrypted_content, for clients that send back only that.
    """

    def __init__(
        self,
        trace_id: str,
        model: str,
        created: int,
        echo: bytes,
        offers: Mapping[str, Offer],
        *,
        sealed: bool = False,
        shows_reasoning: bool = True,
    ) -> None:
        self.id = f"resp_{trace_id}"
        self.finished = False
        self._trace_id, self._echo, self._offers = trace_id, echo, offers
        self._sealed, self._shows_reasoning = sealed, shows_reasoning
        self._items: list[_Item] = []
        self._fields: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
        }
        self._started = dict(self._fields)

    @property
    def response(self) -> dict[str, Any]:
        """As far as it has come: an item that is being written has its text so far."""
        return {**self._fields, **json.loads(self._echo), "output": [item.whole for item in self._items]}

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        texts = (len(item.text) + item.ends.itemsize * len(item.ends) for item in self._items)
        return len(self._echo) + sum(texts)

    def feed(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if delta.kind != "reasoning" or self._shows_reasoning:
                self._write(delta)

    def finish(self, reply: Reply) -> None:
        """After the last delta of a reply that did not fail."""
        assert reply.finished is not None
        self._fields["usage"] = _usage(reply)
        if reply.finished.reason == "cancelled" and reply.stopped is None:
            self._end("cancelled")
        elif reply.finish_reason == "length":
            self._fields["incomplete_details"] = {"reason": "max_output_tokens"}
            self._end("incomplete")
        else:
            self._fields["completed_at"] = now()
            self._end("completed")

    def fail(self, problem: Problem) -> None:
        self._fields["error"] = {"code": "server_error", "message": problem.message}
        self._end("failed")

    def events(self, start: int = 0, most: int | None = None) -> list[Event]:
        """Those that there are, from number `start` on; not more than `most`."""
        return list(islice(self._events(start), most))

    def _events(self, start: int) -> Iterator[Event]:
        if start < len(OPENING):
            for number, event in enumerate(self._opening()[start:], start):
                yield {**event, "sequence_number": number}
        first = len(OPENING)
        for index, item in enumerate(self._items):
            skip = max(0, start - first)
            if skip < item.n_events:
                for number, event in enumerate(item.events(skip), first + skip):
                    yield {**event, "output_index": index, "sequence_number": number}
            first += item.n_events
        if self.finished and start <= first:
            yield {**self._closing(), "sequence_number": first}

    def _opening(self) -> list[Event]:
        response = {**self._started, **json.loads(self._echo)}
        return [{"type": f"response.{name}", "response": response} for name in OPENING]

    def _closing(self) -> Event:
        status = self._fields["status"]
        name = "incomplete" if status == "cancelled" else status  # there is no event response.cancelled
        return {"type": f"response.{name}", "response": self.response}

    def _write(self, delta: Delta) -> None:
        last = self._items[-1] if self._items else None
        goes_on = last is not None and delta.kind in ("arguments", FEEDS.get(last.head["type"]))
        if last is None or not goes_on:
            self._close("completed")
            last = self._call(delta.text) if delta.kind == "call" else self._text(delta.kind)
            self._items.append(last)
        if delta.kind != "call":
            last.add(delta.text)

    def _text(self, kind: str) -> _Item:
        if kind == "reasoning":
            return _Item({**self._named("reasoning"), "summary": []}, self._sealed)
        return _Item({**self._named("message"), "role": "assistant"})

    def _call(self, name: str) -> _Item:
        offer = self._offers[name]
        item_type = "custom_tool_call" if offer.custom else "function_call"
        head = {**self._named(item_type), "call_id": f"call_{self._which}", "name": offer.name}
        if offer.namespace is not None:
            head["namespace"] = offer.namespace
        return _Item(head, reader=InputReader() if offer.custom else None)

    def _named(self, item_type: str) -> dict[str, Any]:
        return {"id": f"{KINDS[item_type].id}_{self._which}", "type": item_type}

    @property
    def _which(self) -> str:
        return f"{self._trace_id}_{len(self._items)}"

    def _close(self, status: ItemStatus) -> None:
        if self._items:
            self._items[-1].status = status

    def _end(self, status: str) -> None:
        """An answer that was cut ends inside its last item, unless that is a whole call."""
        self._close("completed" if status == "completed" or (self._items and self._items[-1].is_call) else "incomplete")
        self._fields["status"] = status
        self.finished = True


def _usage(reply: Reply) -> dict[str, Any]:
    timings = reply.timings
    details: dict[str, Any] = {"reasoning_tokens": reply.n_reasoning}
    if reply.reasoning_cut is not None:
        details["reasoning_cut"] = reply.reasoning_cut
    return {
        "input_tokens": timings.n_prompt,
        "input_tokens_details": {"cached_tokens": timings.n_cached, "cache_write_tokens": 0},
        "output_tokens": timings.n_generated,
        "output_tokens_details": details,
        "total_tokens": timings.n_prompt + timings.n_generated,
    }
