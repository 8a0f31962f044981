"""From the engine's thread to the event loop: requests that were taken, and what comes of them.

    engine thread --sink--> call_soon_threadsafe --> backlog --> parts()

`start` submits and raises what submit raises, so that a status can still be chosen. When its request is over, for
whatever reason, guard.Trace cancels it: that frees the slots within one decode. (A generator's own `finally` is not
enough: one that was never started has none, and one inside another is closed when the garbage collector comes by.) Only
what responses_store.py owns goes on. A reader that lags gets what came meanwhile in one part; one that lags too far is
given up, so that nobody can make the server hold his text.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
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
from stepgguf.server.http.sse import left

MOST_WAITING = 16384  # events; a token each, or some with MTP


class Watch(Protocol):
    """Is told what happens, on the event loop, also after the reader has gone."""

    def first_token(self, seconds: float) -> None: ...
    def finished(self, finished: Finished) -> None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """What came for one of the answers. finish_reason: with its last part, which may have no deltas."""

    index: int
    deltas: list[Delta]
    finish_reason: str | None


class Exchange:
    """Several answers that are made at the same time; usually one. `replies` are theirs, in order."""

    def __init__(self, prepared: Sequence[PreparedRequest], watch: Watch) -> None:
        self.prepared = tuple(prepared)
        self.replies = [Reply(p) for p in prepared]
        self.n_generated = 0
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._first = [True] * len(prepared)
        self._backlog: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self._tickets: list[Ticket] = []
        self._overrun = False

    @classmethod
    async def start(cls, engine: Engine, prepared: Sequence[PreparedRequest], watch: Watch) -> Exchange:
        """Submit all or none. Compiling a grammar takes time: it is done off the event loop."""
        exchange = cls(prepared, watch)
        await run_in_threadpool(exchange._submit, engine)
        return exchange

    @property
    def n_prompt(self) -> int:
        return sum(len(prompt) for prompt in {p.request.prompt for p in self.prepared})

    @property
    def warnings(self) -> list[str]:
        return [warning for reply in self.replies for warning in reply.warnings]

    @property
    def unfinished(self) -> list[int]:
        """Answers that have not come to a good end."""
        return [i for i, reply in enumerate(self.replies) if reply.finished is None or reply.finished.error]

    @property
    def reply(self) -> Reply:
        """The only one."""
        (reply,) = self.replies
        return reply

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Everything that comes, until all have finished. An answer that ends in an error raises that error."""
        while any(reply.finished is None for reply in self.replies):
            await self._arrived.wait()
            self._arrived.clear()
            arrived, self._backlog = self._backlog, deque()
            for index in range(len(self.replies)):
                part = self._read(index, [event for i, event in arrived if i == index])
                if part.deltas or part.finish_reason:
                    yield part
                self._raise_error(index)
            if self._overrun:
                raise RequestError(f"the client lags by more than {MOST_WAITING} events", hint="Read faster.")

    async def whole(self, request: Request) -> list[list[Delta]]:
        """All deltas of every answer. If the client leaves, what came until then."""
        collected: list[list[Delta]] = [[] for _ in self.replies]
        async with calling(self.cancel, request):
            async for part in self.parts():
                collected[part.index] += part.deltas
        return [join(reply.settle(deltas)) for reply, deltas in zip(self.replies, collected, strict=True)]

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def end_reasoning(self) -> None:
        for ticket in self._tickets:
            ticket.end_reasoning()

    def _read(self, index: int, events: Sequence[Event]) -> Part:
        reply = self.replies[index]
        deltas = join([delta for event in events for delta in reply.feed(event)])
        if reply.stopped is not None:
            self._tickets[index].cancel()
        if reply.finished is None or reply.finished.error is not None or not events:
            return Part(index, deltas, None)
        return Part(index, deltas, reply.finish_reason)

    def _raise_error(self, index: int) -> None:
        """After what came before it was handed out."""
        finished = self.replies[index].finished
        if finished is not None and finished.error is not None:
            raise finished.error

    def _submit(self, engine: Engine) -> None:
        try:
            for index, prepared in enumerate(self.prepared):
                self._tickets.append(engine.submit(prepared.request, partial(self._sink, index)))
        except BaseException:
            self.cancel()
            raise

    def _sink(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._arrive, index, event)

    def _arrive(self, index: int, event: Event) -> None:
        if isinstance(event, Tokens):
            self.n_generated += len(event.steps)
            if self._first[index]:
                self._first[index] = False
                self._watch.first_token(time.monotonic() - self._started)
        elif isinstance(event, Finished):
            self._watch.finished(event)
        else:
            return
        if len(self._backlog) >= MOST_WAITING and not self._overrun:
            self._overrun = True
            self.cancel()
        if not self._overrun or isinstance(event, Finished):
            self._backlog.append((index, event))
        self._arrived.set()


def join(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours that go on from each other become one. A call's name is always its own."""
    joined: list[Delta] = []
    for (kind, index), run in groupby(deltas, lambda delta: (delta.kind, delta.index)):
        same = list(run)
        if kind == "call":
            joined += same
        else:
            steps = tuple(step for delta in same for step in delta.steps)
            joined.append(Delta(kind, "".join(delta.text for delta in same), index, steps))
    return joined


@asynccontextmanager
async def calling(cancel: Callable[[], None], request: Request) -> AsyncGenerator[None, None]:
    """Call `cancel` when the client leaves."""

    async def watch() -> None:
        await left(request.receive)
        cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
