"""Answers of the Responses dialect, while they are made and for a while afterwards.

    Generation --deltas--> Answer (a task of its own feeds its writer) --events from number N--> any number of readers

Whoever wants to see an answer, the request that asked for it or one that comes later, reads the writer's events with a
place of his own; nothing is kept for him. Who owns an answer decides what ends it: one of `background` goes on until it
is finished or cancelled, any other ends with its request, as everything does (middleware/trace.py).

The store is in memory, bounded in count and in bytes. It forgets what nobody has used for an hour, and at once what was
not to be stored.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from stepgguf.errors import StepggufError
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.responses.writer import ResponseWriter
from stepgguf.server.dialects.writer import stream_records
from stepgguf.server.generation import Generation
from stepgguf.server.http.sse import JsonEvent
from stepgguf.server.problem import Refusal
from stepgguf.server.validation import SHOWN

log = logging.getLogger(__name__)
SWEEP_SECONDS = 60.0  # between two looks for answers that nobody has used for long
MOST_AT_ONCE = 256  # events, of which a long answer has many: other requests wait meanwhile
# Of an item of the output, or (in) of the input that was listed; see ResponseWriter and Answer.input_items.
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_(in)?([0-9]{1,6})")
KEPT_FOR = "Answers are kept in memory for an hour after their last use, and not with `store: false`"


class Answer:
    """An answer of the model, made by a task of its own. `used`: when somebody last asked for it; `error`: what it
    failed with.

    context: the items that it answers, as JSON. keeps: whether it stays when it is finished. background: whether it
    goes on without its request; then the log says here how it ended."""

    def __init__(
        self, writer: ResponseWriter, generation: Generation, context: bytes, *, keeps: bool, background: bool
    ) -> None:
        self.writer, self.keeps, self._background = writer, keeps, background
        self.used = time.monotonic()
        self.error: Exception | None = None
        self._generation, self._context = generation, context
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._make_answer())

    @property
    def id(self) -> str:
        return self.writer.id

    @property
    def n_bytes(self) -> int:
        return len(self._context) + self.writer.n_bytes

    @property
    def n_generated(self) -> int:
        return self._generation.n_generated

    async def events(self, start: int = 0) -> AsyncGenerator[list[JsonEvent], None]:
        """Yield all events from number `start` on, as they come; each list has at least one."""
        while True:
            changed, last = self._changed, self.writer.finished  # both before the events are read, or the end is missed
            if events := list(self.writer.events(start, MOST_AT_ONCE)):
                start += len(events)
                yield events  # while the reader takes them, the answer goes on
            elif last:
                return
            else:
                await changed.wait()

    async def wait_until_finished(self) -> None:
        """Wait for the end of the answer, also if it fails. The answer goes on if whoever waits gives up."""
        await asyncio.shield(self._task)  # else whoever stops waiting would end the answer

    def when_finished(self, call: Callable[[], None]) -> None:
        """Have `call` called at the end of the answer, whatever end that is."""
        self._task.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """End it where it is, within one decode."""
        self._generation.cancel()

    def end_reasoning(self) -> None:
        """Close the reasoning, so that the answer itself begins."""
        self._generation.end_reasoning()

    def input_items(self) -> list[dict[str, Any]]:
        """Return the items that it answers, each with an id."""
        items: list[dict[str, Any]] = json.loads(self._context)
        trace = self.id.removeprefix("resp_")
        return [_listed_item(f"item_{trace}_in{i}", item) for i, item in enumerate(items)]

    def whole_conversation(self) -> list[dict[str, Any]]:
        """Return the items that it answers, and then its own."""
        return [*json.loads(self._context), *self.writer.response["output"]]

    async def _make_answer(self) -> None:
        try:
            async for _ in stream_records(self._generation, self.writer):  # each reader reads it from the writer
                self._wake_readers()
        except Exception as error:
            if not isinstance(error, StepggufError):
                log.exception("%s failed", self.id)
            self.error = error
        finally:
            self._generation.cancel()
            self._wake_readers()
        if self._background:
            self._log_end()

    def _log_end(self) -> None:
        log.info("%s %s %s", self.id, self.writer.response["status"], self._generation.counts)
        for warning in self._generation.warnings:
            log.warning("%s: %s", self.id, warning)

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # a new one: who waits for the old one is woken once, and nobody is missed


def _listed_item(id: str, item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it was sent, with the fields that clients may leave out."""
    item = {"id": id, "status": "completed", **item}
    content = item.get("content")
    if item["type"] == "reasoning":
        return {"summary": [], **item}
    if item["type"] != "message" or not isinstance(content, str):
        return item
    theirs = item["role"] == "assistant"
    part = {"type": "output_text", "annotations": []} if theirs else {"type": "input_text"}
    return {**item, "content": [{**part, "text": content}]}


class AnswerStore:
    """The answers that are kept, by their ids. `find` may be called from any thread, the rest on the event loop."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._answers: dict[str, Answer] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def add(self, answer: Answer) -> None:
        """Keep an answer, at least until it is finished."""
        self._answers[answer.id] = answer
        answer.when_finished(self._forget_old)

    def find(self, id: str) -> Answer | None:
        """Return the answer with this id, which counts as used now; None if there is none."""
        answer = self._answers.get(id)
        if answer is not None:
            answer.used = time.monotonic()
        return answer

    def get(self, id: str) -> Answer:
        """Return the answer with this id, which counts as used now. Refusal: there is none."""
        answer = self.find(id)
        if answer is None:
            raise Refusal(404, f"Response with id {id[:SHOWN]!r} not found. {KEPT_FOR}", param="id")
        return answer

    def delete(self, id: str) -> None:
        """End and forget the answer with this id. Refusal: there is none."""
        self.get(id).cancel()
        del self._answers[id]

    def whole_conversation(self, id: str) -> list[dict[str, Any]]:
        """Return the items that a previous answer answers, and its own. Refusal: there is no such answer, or it is not
        finished."""
        answer = self.find(id)
        if answer is None:
            text = f"Previous response with id {id[:SHOWN]!r} not found. {KEPT_FOR}; "
            text += "send the whole conversation as `input`"
            raise Refusal(400, text, code="previous_response_not_found", param="previous_response_id")
        if not answer.writer.finished:
            text = f"the previous response {id!r} is still being made; wait for its end or cancel it"
            raise Refusal(400, text, param="previous_response_id")
        return answer.whole_conversation()

    def resolve_references(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the items, with those of our own answers in place of references to them. Refusal: there is no such
        item."""
        seen: set[str] = set()
        found = []
        for i, item in enumerate(items):
            if item["type"] == "item_reference":
                if item["id"] in seen:
                    raise Refusal(400, f"Duplicate item found with id {item['id'][:SHOWN]!r}", param=f"input[{i}]")
                seen.add(item["id"])
                item = self._kept_item(item["id"], f"input[{i}]")
            found.append(item)
        return found

    def _kept_item(self, id: str, param: str) -> dict[str, Any]:
        named = _ITEM_ID.fullmatch(id)
        answer = self.find(f"resp_{named[1]}") if named else None
        if named and answer:
            items = answer.input_items() if named[2] else answer.writer.response["output"]
            item = next((item for item in items if item["id"] == id), None)
            if item is not None:
                return item
        text = f"Item with id {id[:SHOWN]!r} not found. {KEPT_FOR}; send the item itself instead of its id"
        raise Refusal(404, text, param=param)

    def _forget_old(self) -> None:
        """Forget what need not stay, oldest use first; an answer that is still being made stays. It runs again by
        itself as long as there are answers."""
        oldest = time.monotonic() - self._config.stored_seconds
        n, n_bytes = len(self._answers), sum(answer.n_bytes for answer in self._answers.values())
        for answer in sorted(self._answers.values(), key=lambda answer: answer.used):
            many = n > self._config.stored_answers or n_bytes > self._config.stored_bytes
            if answer.writer.finished and (many or not answer.keeps or answer.used < oldest):
                del self._answers[answer.id]
                n, n_bytes = n - 1, n_bytes - answer.n_bytes
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._answers:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._forget_old)
