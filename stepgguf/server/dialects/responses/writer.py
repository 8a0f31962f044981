"""One answer as a response of OpenAI's Responses API: from deltas to the whole object and to the stream's events.

    response.created  response.in_progress  item*  response.completed | response.incomplete | response.failed

The events of an item are in output_items.py.

Nothing is kept but the answer: its items, each with its text and where the fragments ended in which it came. `events`
tells what happened from that, as often as it is asked and from any number on, so a stream that is live and one that is
attached to later are the same. Reasoning is an item's content (reasoning_text); there is no summary, for nobody wrote
one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.server.dialects.responses.output_items import ITEM_TYPES, Fields, ItemStatus, OutputItem
from stepgguf.server.dialects.responses.tools import InputReader, Offer
from stepgguf.server.generation import AnswerPart
from stepgguf.server.http.sse import JsonEvent
from stepgguf.server.problem import Problem
from stepgguf.server.service import now

OPENING = ("created", "in_progress")
ITEM_DELTAS = {"reasoning": "reasoning", "message": "text"}  # the deltas that go on with an item


class ResponseWriter:
    """Writes one answer as a response. See dialects/writer.py for the protocol. Records are made when they are read:
    the store reads none.

    echo: the request's fields that the response repeats, as JSON. offers: the tools, by the names that the model knows.
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
        self._n_added = 0  # events that `start`, `feed` and so on have given
        self._trace_id, self._echo, self._offers = trace_id, echo, offers
        self._sealed, self._shows_reasoning = sealed, shows_reasoning
        self._items: list[OutputItem] = []
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
        self._started = dict(self._fields)  # the first two events show the response as it was then

    @property
    def response(self) -> dict[str, Any]:
        """The response as far as it has come: an item that is being written has its text so far."""
        return {**self._fields, **json.loads(self._echo), "output": [item.as_json for item in self._items]}

    @property
    def n_bytes(self) -> int:
        """About how much memory it takes."""
        texts = (len(item.text) + item.ends.itemsize * len(item.ends) for item in self._items)
        return len(self._echo) + sum(texts)

    def start(self) -> Iterator[JsonEvent]:
        return self._added()

    def feed(self, part: AnswerPart) -> Iterator[JsonEvent]:
        for delta in part.deltas:
            if delta.kind != "reasoning" or self._shows_reasoning:
                self._write_delta(delta)
        return self._added()

    def finish(self, replies: Sequence[Reply]) -> Iterator[JsonEvent]:
        (reply,) = replies
        assert reply.finished is not None
        self._fields["usage"] = _response_usage(reply)
        if reply.finished.reason == "cancelled" and reply.stopped is None:
            self._end("cancelled")
        elif reply.finish_reason == "length":
            self._fields["incomplete_details"] = {"reason": "max_output_tokens"}
            self._end("incomplete")
        else:
            self._fields["completed_at"] = now()
            self._end("completed")
        return self._added()

    def fail(self, problem: Problem) -> Iterator[JsonEvent]:
        self._fields["error"] = {"code": "server_error", "message": problem.message}
        self._end("failed")
        return self._added()

    @property
    def n_events(self) -> int:
        """How many events there are so far."""
        return len(OPENING) + sum(item.n_events for item in self._items) + self.finished

    def events(self, start: int = 0, most: int | None = None) -> Iterator[JsonEvent]:
        """Return the events that there are, from number `start` on, and at most so many. Each is made when it is
        read."""
        return (JsonEvent(fields, fields["type"]) for fields in islice(self._numbered(start), most))

    def _added(self) -> Iterator[JsonEvent]:
        """Return what has been added to the stream since this was last asked."""
        start, self._n_added = self._n_added, self.n_events
        return self.events(start, self._n_added - start)

    def _numbered(self, start: int) -> Iterator[Fields]:
        if start < len(OPENING):
            for number, event in enumerate(self._first_events()[start:], start):
                yield {**event, "sequence_number": number}
        first = len(OPENING)  # the number of the next item's first event
        for index, item in enumerate(self._items):
            skip = max(0, start - first)
            if skip < item.n_events:
                for number, event in enumerate(item.events(skip), first + skip):
                    yield {**event, "output_index": index, "sequence_number": number}
            first += item.n_events
        if self.finished and start <= first:
            yield {**self._last_event(), "sequence_number": first}

    def _first_events(self) -> list[Fields]:
        response = {**self._started, **json.loads(self._echo)}
        return [{"type": f"response.{name}", "response": response} for name in OPENING]

    def _last_event(self) -> Fields:
        status = self._fields["status"]
        name = "incomplete" if status == "cancelled" else status  # there is no event response.cancelled
        return {"type": f"response.{name}", "response": self.response}

    def _write_delta(self, delta: Delta) -> None:
        last = self._items[-1] if self._items else None
        goes_on = last is not None and delta.kind in ("arguments", ITEM_DELTAS.get(last.head["type"]))
        if last is None or not goes_on:
            self._close_last("completed")
            last = self._begin_call(delta.text) if delta.kind == "call" else self._begin_text(delta.kind)
            self._items.append(last)
        if delta.kind != "call":
            last.add(delta.text)

    def _begin_text(self, kind: str) -> OutputItem:
        if kind == "reasoning":
            return OutputItem({**self._id_and_type("reasoning"), "summary": []}, self._sealed)
        return OutputItem({**self._id_and_type("message"), "role": "assistant"})

    def _begin_call(self, name: str) -> OutputItem:
        offer = self._offers[name]
        item_type = "custom_tool_call" if offer.custom else "function_call"
        head = {**self._id_and_type(item_type), "call_id": f"call_{self._item_suffix}", "name": offer.name}
        if offer.namespace is not None:
            head["namespace"] = offer.namespace
        return OutputItem(head, reader=InputReader() if offer.custom else None)

    def _id_and_type(self, item_type: str) -> dict[str, Any]:
        return {"id": f"{ITEM_TYPES[item_type].id}_{self._item_suffix}", "type": item_type}

    @property
    def _item_suffix(self) -> str:
        return f"{self._trace_id}_{len(self._items)}"

    def _close_last(self, status: ItemStatus) -> None:
        if self._items:
            self._items[-1].status = status

    def _end(self, status: str) -> None:
        """Set the status and close the last item. An answer that was cut ends inside it, unless that is a whole
        call."""
        self._close_last(
            "completed" if status == "completed" or (self._items and self._items[-1].is_whole_call) else "incomplete"
        )
        self._fields["status"] = status
        self.finished = True


def _response_usage(reply: Reply) -> dict[str, Any]:
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
