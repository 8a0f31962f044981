"""From the engine's thread to the event loop: requests that were taken, and what comes of them.

    engine thread --sink--> call_soon_threadsafe --> backlog --> parts()

`start` submits and raises what submit raises, so that a status can still be chosen. When its request is over, for
whatever reason, middleware/trace.py cancels it: that frees the slots within one decode. (A generator's own `finally` is
not enough: one that was never started has none, and one inside another is closed when the garbage collector comes by.)
Only what the store of the Responses dialect owns goes on. A reader that lags gets what came meanwhile in one part; one
that lags too far is given up, so that nobody can make the server hold his text.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from stepgguf.chat.exchange import PreparedRequest, Reply
from stepgguf.chat.output import Delta
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Engine, Event, Finished, Ticket, Tokens
from stepgguf.server.http.disconnect import on_disconnect
from stepgguf.server.tasks import Task

MOST_WAITING = 16384  # events; a token each, or some with MTP


class GenerationWatch(Protocol):
    """Who is told what happens, on the event loop, also after the reader has gone."""

    def on_first_token(self, seconds: float) -> None:
        """Take note that the first token of an answer has come, so long after its request was submitted."""

    def on_finished(self, finished: Finished) -> None:
        """Take note that an answer has ended, well or not."""


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What came for the answer with this index. Its last part has a finish_reason, and may have no deltas."""

    index: int
    deltas: list[Delta]
    finish_reason: str | None


class Generation:
    """The answers that the engine makes for one HTTP request: usually one, several at the same time for `n` or a list
    of prompts.

    `prepared` and `replies` are theirs, in order. `n_generated` counts their tokens so far. `task` is the account that
    they are counted in, None without one.
    """

    def __init__(self, prepared: Sequence[PreparedRequest], watch: GenerationWatch, task: Task | None = None) -> None:
        self.prepared = tuple(prepared)
        self.replies = [Reply(p) for p in prepared]
        self.n_generated = 0
        self.task = task
        self._watch = watch
        self._loop = asyncio.get_running_loop()  # the engine's thread has none to ask
        self._started = time.monotonic()
        self._first = [True] * len(prepared)  # of each answer: whether its first token is still to come
        self._backlog: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self._tickets: list[Ticket] = []
        self._overrun = False

    @classmethod
    async def start(
        cls, engine: Engine, prepared: Sequence[PreparedRequest], watch: GenerationWatch, task: Task | None = None
    ) -> Generation:
        """Submit all requests or none. Compiling a grammar takes time: it is done off the event loop."""
        generation = cls(prepared, watch, task)
        await run_in_threadpool(generation._submit, engine)
        return generation

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts, each prompt once however many answers it has."""
        return sum(len(prompt) for prompt in {p.request.prompt for p in self.prepared})

    @property
    def counts(self) -> str:
        """Its tokens, and what its task has cost so far, for the log."""
        tokens = f"{self.n_prompt}+{self.n_generated} tokens"
        return tokens if self.task is None else f"{tokens} ({self.task})"

    @property
    def warnings(self) -> list[str]:
        """What the log should say of the model's output so far."""
        return [warning for reply in self.replies for warning in reply.warnings]

    async def parts(self) -> AsyncGenerator[AnswerPart, None]:
        """Yield everything that comes, until all answers have finished.

        An answer that ends in an error raises that error, after what came before it. RequestError: the reader lags too
        far behind.
        """
        while any(reply.finished is None for reply in self.replies):
            await self._arrived.wait()
            self._arrived.clear()  # before the backlog is taken: what comes from here on sets it again
            arrived, self._backlog = self._backlog, deque()
            for index in range(len(self.replies)):
                part = self._read_events(index, [event for i, event in arrived if i == index])
                if part.deltas or part.finish_reason:
                    yield part
                self._raise_error(index)
            if self._overrun:
                raise RequestError(f"the client lags by more than {MOST_WAITING} events", hint="Read faster.")

    async def whole_answers(self, request: Request) -> list[list[Delta]]:
        """Return all deltas of every answer, in order. If the client leaves, they are what came until then."""
        collected: list[list[Delta]] = [[] for _ in self.replies]
        async with on_disconnect(request.receive, self.cancel):
            async for part in self.parts():
                collected[part.index] += part.deltas
        return [
            join_neighbours(reply.settle_reasoning(deltas))
            for reply, deltas in zip(self.replies, collected, strict=True)
        ]

    def cancel(self) -> None:
        """End all answers within one decode. May be called again, and after the end."""
        for ticket in self._tickets:
            ticket.cancel()

    def end_reasoning(self) -> None:
        """Close the reasoning of all answers, so that the answers themselves begin."""
        for ticket in self._tickets:
            ticket.end_reasoning()

    def _read_events(self, index: int, events: Sequence[Event]) -> AnswerPart:
        reply = self.replies[index]
        deltas = join_neighbours([delta for event in events for delta in reply.feed(event)])
        if reply.stopped is not None:  # a stop text: the engine knows nothing of it and would go on
            self._tickets[index].cancel()
        if reply.finished is None or reply.finished.error is not None or not events:
            return AnswerPart(index, deltas, None)
        return AnswerPart(index, deltas, reply.finish_reason)

    def _raise_error(self, index: int) -> None:
        """Raise what an answer failed with. It is called when what came before the error has been handed out."""
        finished = self.replies[index].finished
        if finished is not None and finished.error is not None:
            raise finished.error

    def _submit(self, engine: Engine) -> None:
        try:
            for index, prepared in enumerate(self.prepared):
                self._tickets.append(engine.submit(prepared.request, partial(self._sink, index)))
        except BaseException:
            self.cancel()  # those before the one that was refused run already
            raise

    def _sink(self, index: int, event: Event) -> None:
        """Take an event of the engine, on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._arrive, index, event)

    def _arrive(self, index: int, event: Event) -> None:
        """Take an event on the event loop."""
        if isinstance(event, Tokens):
            self.n_generated += len(event.steps)
            if self._first[index]:
                self._first[index] = False
                self._watch.on_first_token(time.monotonic() - self._started)
        elif isinstance(event, Finished):
            self._watch.on_finished(event)
            if self.task is not None:
                self.task.count(event.timings)
        else:
            return  # Queued and Prefill: no dialect says how far the prompt is read
        if len(self._backlog) >= MOST_WAITING and not self._overrun:
            self._overrun = True
            self.cancel()  # nothing more is made for a reader who does not read
        if not self._overrun or isinstance(event, Finished):  # the end is needed: it is what parts() waits for
            self._backlog.append((index, event))
        self._arrived.set()


def join_neighbours(deltas: Sequence[Delta]) -> list[Delta]:
    """Return the deltas with neighbours of one kind and index as one. The name of a call is always a delta of its
    own."""
    joined: list[Delta] = []
    for (kind, index), run in groupby(deltas, lambda delta: (delta.kind, delta.index)):
        same = list(run)
        if kind == "call":
            joined += same
        else:
            steps = tuple(step for delta in same for step in delta.steps)
            joined.append(Delta(kind, "".join(delta.text for delta in same), index, steps))
    return joined
