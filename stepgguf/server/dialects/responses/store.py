"""Answers of the Responses dialect, while they are made and for a while afterwards.

    Exchange --deltas--> Answer (a task of its own feeds its writer) --events from number N--> any number of readers

Whoever wants to see an answer, the request that asked for it or one that comes later, reads the writer's events with a
place of his own; nothing is kept for him. Who owns an answer decides what ends it: one of `background` goes on until it
is finished or cancelled, any other ends with its request, as everything does (guard.Trace).

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
from stepgguf.server.dialects.responses.writer import Event, ResponseWriter
from stepgguf.server.generation import Exchange
from stepgguf.server.problem import SHOWN, Refusal, problem

log = logging.getLogger(__name__)
SWEEP_SECONDS = 60.0
MOST_AT_ONCE = 256  # events, of which a long answer has many: other requests wait meanwhile
# Of an item of the output, or (in) of the input that was listed; see ResponseWriter and Answer.items.
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]+)_(in)?([0-9]{1,6})")
KEPT = "Answers are kept in memory for an hour after their last use, and not with `store: false`"


class Answer:
    """context: the items that it answers, as JSON. keeps: whether it stays when it is finished. background: whether
    it is nobody's but the store's; then the log says here how it ended, not with its request."""

    def __init__(
        self, writer: ResponseWriter, exchange: Exchange, context: bytes, *, keeps: bool, background: bool
    ) -> None:
        self.writer, self.keeps, self._background = writer, keeps, background
        self.used = time.monotonic()
        self.error: Exception | None = None
        self._exchange, self._context = exchange, context
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._make())

    @property
    def id(self) -> str:
        return self.writer.id

    @property
    def n_bytes(self) -> int:
        return len(self._context) + self.writer.n_bytes

    @property
    def n_generated(self) -> int:
        return self._exchange.n_generated

    async def events(self, start: int = 0) -> AsyncGenerator[list[Event], None]:
        """All from number `start` on, as they come. At least one at a time."""
        while True:
            changed, last = self._changed, self.writer.finished
            if events := self.writer.events(start, MOST_AT_ONCE):
                start = events[-1]["sequence_number"] + 1
                yield events  # while the reader takes them, the answer goes on
            elif last:
                return
            else:
                await changed.wait()

    async def finished(self) -> None:
        await asyncio.shield(self._task)

    def when_finished(self, call: Callable[[], None]) -> None:
        self._task.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        self._exchange.cancel()

    def end_reasoning(self) -> None:
        self._exchange.end_reasoning()

    def items(self) -> list[dict[str, Any]]:
        """What it answers, each with an id."""
        items: list[dict[str, Any]] = json.loads(self._context)
        trace = self.id.removeprefix("resp_")
        return [_listed(f"item_{trace}_in{i}", item) for i, item in enumerate(items)]

    def conversation(self) -> list[dict[str, Any]]:
        """What it answers and the answer."""
        return [*json.loads(self._context), *self.writer.response["output"]]

    async def _make(self) -> None:
        try:
            async for part in self._exchange.parts():
                self.writer.feed(part.deltas)
                self._tell()
            self.writer.finish(self._exchange.reply)
        except Exception as error:
            if not isinstance(error, StepggufError):
                log.exception("%s failed", self.id)
            self.error = error
            self.writer.fail(problem(error))
        finally:
            self._exchange.cancel()
            self._tell()
        if self._background:
            self._note()

    def _note(self) -> None:
        counts = f"{self._exchange.n_prompt}+{self._exchange.n_generated} tokens"
        log.info("%s %s %s", self.id, self.writer.response["status"], counts)
        for warning in self._exchange.warnings:
            log.warning("%s: %s", self.id, warning)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _listed(id: str, item: dict[str, Any]) -> dict[str, Any]:
    """An item as it was sent, and what may be left out of it."""
    item = {"id": id, "status": "completed", **item}
    content = item.get("content")
    if item["type"] == "reasoning":
        return {"summary": [], **item}
    if item["type"] != "message" or not isinstance(content, str):
        return item
    theirs = item["role"] == "assistant"
    part = {"type": "output_text", "annotations": []} if theirs else {"type": "input_text"}
    return {**item, "content": [{**part, "text": content}]}


class Answers:
    """The store. `find` may be called from any thread, the rest on the event loop."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._answers: dict[str, Answer] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def add(self, answer: Answer) -> None:
        self._answers[answer.id] = answer
        answer.when_finished(self._sweep)

    def find(self, id: str) -> Answer | None:
        answer = self._answers.get(id)
        if answer is not None:
            answer.used = time.monotonic()
        return answer

    def get(self, id: str) -> Answer:
        """Refusal: there is none."""
        answer = self.find(id)
        if answer is None:
            raise Refusal(404, f"Response with id {id[:SHOWN]!r} not found. {KEPT}", param="id")
        return answer

    def delete(self, id: str) -> None:
        self.get(id).cancel()
        del self._answers[id]

    def conversation(self, id: str) -> list[dict[str, Any]]:
        """What a previous answer answered, and that answer. Refusal: there is none, or it is not finished."""
        answer = self.find(id)
        if answer is None:
            text = f"Previous response with id {id[:SHOWN]!r} not found. {KEPT}; send the whole conversation as `input`"
            raise Refusal(400, text, code="previous_response_not_found", param="previous_response_id")
        if not answer.writer.finished:
            text = f"the previous response {id!r} is still being made; wait for its end or cancel it"
            raise Refusal(400, text, param="previous_response_id")
        return answer.conversation()

    def resolve(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items, those of our own answers that are only referred to included. Refusal: there is no such item."""
        seen: set[str] = set()
        found = []
        for i, item in enumerate(items):
            if item["type"] == "item_reference":
                if item["id"] in seen:
                    raise Refusal(400, f"Duplicate item found with id {item['id'][:SHOWN]!r}", param=f"input[{i}]")
                seen.add(item["id"])
                item = self._item(item["id"], f"input[{i}]")
            found.append(item)
        return found

    def _item(self, id: str, param: str) -> dict[str, Any]:
        named = _ITEM_ID.fullmatch(id)
        answer = self.find(f"resp_{named[1]}") if named else None
        if named and answer:
            items = answer.items() if named[2] else answer.writer.response["output"]
            item = next((item for item in items if item["id"] == id), None)
            if item is not None:
                return item
        text = f"Item with id {id[:SHOWN]!r} not found. {KEPT}; send the item itself instead of its id"
        raise Refusal(404, text, param=param)

    def _sweep(self) -> None:
        """Forget what need not stay, oldest use first; what is still being made stays."""
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
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
