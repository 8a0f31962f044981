"""An item of a response's output, while it is written and afterwards: as JSON, and as the events that tell of it.

item := response.output_item.added  (part | fragment* done)  response.output_item.done     output_index 0, 1, 2, ...
part := response.content_part.added  fragment* done  response.content_part.done
fragment := response.KIND.delta, done := response.KIND.done: KIND is reasoning_text, output_text,
            function_call_arguments, custom_tool_call_input
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from stepgguf.server.dialects.responses.tools import InputReader
from stepgguf.server.dialects.sealed_reasoning import seal

Fields = dict[str, Any]  # of an event; its "type" is also the event's name
ItemStatus = Literal["in_progress", "completed", "incomplete"]


@dataclass(frozen=True, slots=True)
class ItemType:
    """How items of one type look on the wire.

    id: the prefix of their ids. text: what the events of their text are called. part: the type of their one content
    part; None: they have none, and the text is in the field `field`."""

    id: str
    text: str
    part: str | None = None
    field: str = "content"


ITEM_TYPES = {
    "reasoning": ItemType("rs", "response.reasoning_text", "reasoning_text"),
    "message": ItemType("msg", "response.output_text", "output_text"),
    "function_call": ItemType("fc", "response.function_call_arguments", field="arguments"),
    "custom_tool_call": ItemType("ctc", "response.custom_tool_call_input", field="input"),
}


@dataclass(slots=True)
class OutputItem:
    """One item of the output. head: its fields before its text. text: UTF-8; ends: where its fragments end, in bytes.
    reader: what takes the text of a custom tool's call out of JSON."""

    head: dict[str, Any]
    sealed: bool = False
    reader: InputReader | None = None
    status: ItemStatus = "in_progress"
    text: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("I"))  # 4 bytes each; a list would take 36

    @property
    def type(self) -> ItemType:
        return ITEM_TYPES[self.head["type"]]

    @property
    def n_events(self) -> int:
        """How many events tell of the item so far."""
        n_before = 1 if self.type.part is None else 2
        return n_before + len(self.ends) + (0 if self.status == "in_progress" else n_before + 1)

    @property
    def as_json(self) -> dict[str, Any]:
        """The item as far as it has come."""
        text = self.text.decode()
        item = {**self.head, "status": self.status, self.type.field: self._content(text)}
        if self.sealed and item["type"] == "reasoning" and self.status != "in_progress":
            item["encrypted_content"] = seal(text)
        return item

    @property
    def is_whole_call(self) -> bool:
        """Whether it is a call that can be run, also if the answer was cut right after it."""
        if self.reader is not None:
            return self.reader.is_complete
        try:
            return self.type.part is None and isinstance(json.loads(self.text), dict)
        except ValueError:
            return False

    def add(self, fragment: str) -> None:
        """Add the text of a delta, which becomes a fragment if anything of it is shown."""
        text = fragment if self.reader is None else self.reader.feed(fragment)
        if text:
            self.text += text.encode()
            self.ends.append(len(self.text))

    def events(self, skip: int) -> Iterator[Fields]:
        """Yield all events of the item but the first `skip`, without the fields that the events of all items have."""
        before = self._opening_events()
        yield from before[skip:]
        skip = max(0, skip - len(before))
        for i in range(skip, len(self.ends)):
            # Fragments end between characters, as deltas do, so each is whole UTF-8.
            fragment = self.text[self.ends[i - 1] if i else 0 : self.ends[i]].decode()
            yield self._event(f"{self.type.text}.delta", delta=fragment, **self._logprobs())
        if self.status != "in_progress":
            yield from self._closing_events()[max(0, skip - len(self.ends)) :]

    def _opening_events(self) -> list[Fields]:
        started = {**self.head, "status": "in_progress", self.type.field: "" if self.type.part is None else []}
        added: list[Fields] = [{"type": "response.output_item.added", "item": started}]
        if self.type.part is not None:
            added.append(self._event("response.content_part.added", part=self._content_part("")))
        return added

    def _closing_events(self) -> list[Fields]:
        text = self.text.decode()
        name = {"name": self.head["name"]} if self.head["type"] == "function_call" else {}
        field = {"text" if self.type.part else self.type.field: text}
        events = [self._event(f"{self.type.text}.done", **name, **field, **self._logprobs())]
        if self.type.part is not None:
            events.append(self._event("response.content_part.done", part=self._content_part(text)))
        return [*events, {"type": "response.output_item.done", "item": self.as_json}]

    def _event(self, type: str, **fields: Any) -> Fields:
        index = {} if self.type.part is None else {"content_index": 0}
        return {"type": type, "item_id": self.head["id"], **index, **fields}

    def _content(self, text: str) -> Any:
        return text if self.type.part is None else [self._content_part(text)]

    def _content_part(self, text: str) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.type.part == "output_text" else {}
        return {"type": self.type.part, "text": text, **more}

    def _logprobs(self) -> dict[str, Any]:
        """The field that text events must have and others do not."""
        return {"logprobs": []} if self.type.part == "output_text" else {}
