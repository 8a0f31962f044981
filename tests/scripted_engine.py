"""An engine that says what a script says: everything above it is the real thing, and no model is loaded.

    ScriptedEngine("Let me see.", "</think>", "Yes.")                three tokens for every request, then "stop"
    ScriptedEngine("Well", EngineDied("it broke", recovered=True))   fails under the request after its first token
    ScriptedEngine(lambda request: ...)     a script for each request; what it raises, `submit` raises

A script is an iterable of parts; an endless one is an answer without end. A part is

    str                one token with this text. Texts of special tokens (`</think>`) are these tokens
    Event of an engine (Queued, Prefill, Tokens, Finished): handed on as it is; Finished is the end
    StepggufError      the end: Finished("error", ...) with it
    threading.Event    waited for, unless the request is cancelled; `Pause` and `UntilEndReasoning` are such events

`requests`, `prompts` and `tickets` say what was asked, in order, and `refused` what was too long for the context. `say`
gives the next requests another script. Reasoning is counted and never cut: a script is played as it is written.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from importlib.resources import files

from stepgguf.errors import ContextLengthExceeded, EngineDied, StepggufError
from stepgguf.runtime.engine import (
    Event,
    Finished,
    ModelInfo,
    Prefill,
    Request,
    Sampling,
    Sink,
    Stats,
    Step,
    Timings,
    Tokens,
)
from stepgguf.runtime.reasoning_limit import ReasoningLimit

Part = str | Event | StepggufError | threading.Event
Script = Iterable[Part]
TEMPLATE = files("stepgguf.demo") / "model" / "chat_template.jinja"
# A token is about as much text as one of a real vocabulary.
_PIECE = re.compile(r"<\|im_start\|>|<\|im_end\|>|</?think>|</?tool_call>|\s?\w{1,4}|.", re.DOTALL)


class Pause(threading.Event):
    """In a script: so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(self._seconds)
        return True


class UntilEndReasoning(threading.Event):
    """In a script: until the request is asked to end its reasoning."""


class ScriptedTicket(threading.Thread):
    """One answer by script, made in a thread of its own; it is its own ticket."""

    def __init__(self, engine: ScriptedEngine, request: Request, script: Script, sink: Sink) -> None:
        super().__init__(daemon=True)
        self.cancelled = threading.Event()
        self.end_reasoning_asked = threading.Event()
        self._engine, self._request, self._script, self._sink = engine, request, script, sink
        self._timings = Timings(n_prompt=len(request.prompt))
        self._limit = ReasoningLimit(request.reasoning) if request.reasoning is not None else None

    def cancel(self) -> None:
        self.cancelled.set()

    def end_reasoning(self) -> None:
        self.end_reasoning_asked.set()

    def run(self) -> None:
        finished = self._play()
        self._engine.count(finished)
        self._sink(finished)

    def _play(self) -> Finished:
        timings = self._timings
        for part in self._script:
            self._wait_for(part)
            if self.cancelled.is_set():
                return Finished("cancelled", timings)
            if isinstance(part, Finished):
                return part
            if isinstance(part, StepggufError):
                return Finished("error", timings, part)
            if timings.n_generated == self._request.max_tokens:
                return Finished("length", timings)
            self._hand_on(part)
        return Finished("stop", timings)

    def _wait_for(self, part: Part) -> None:
        """Polls, so that a cancel is seen while the event does not come."""
        event = self.end_reasoning_asked if isinstance(part, UntilEndReasoning) else part
        while isinstance(event, threading.Event) and not self.cancelled.is_set() and not event.wait(0.01):
            pass

    def _hand_on(self, part: Part) -> None:
        if isinstance(part, str):
            part = Tokens((Step(self._engine.add_token(part), part.encode()),))
        if isinstance(part, Tokens):
            self._timings.n_generated += len(part.steps)
            for step in part.steps if self._limit is not None else ():
                self._limit.feed(step.token_id, self._timings)
        if isinstance(part, Prefill):
            self._timings.n_cached = part.n_cached
        if not isinstance(part, threading.Event | StepggufError):
            self._sink(part)


class ScriptedEngine:
    """Implements `stepgguf.runtime.engine.Engine`. Instead of a script it takes a function from a request to one. Its
    vocabulary grows with the texts that it meets."""

    def __init__(self, *script: Part | Callable[[Request], Script], n_ctx: int = 4096) -> None:
        self.info = ModelInfo("scripted", TEMPLATE.read_text(), Sampling(), n_ctx, n_ctx, 2**20, "script")
        self.requests: list[Request] = []
        self.tickets: list[ScriptedTicket] = []
        self.refused: list[str] = []
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}
        self._stats = Stats()
        self.say(*script)

    def say(self, *script: Part | Callable[[Request], Script]) -> None:
        """What the next requests are answered with; those before are forgotten."""
        first = script[0] if script else None
        self._script: Callable[[Request], Script] = first if callable(first) else lambda request: parts
        parts = [part for part in script if not callable(part)]
        self.requests.clear()
        self.tickets.clear()

    @property
    def prompts(self) -> list[str]:
        """The texts of the requests' prompts."""
        return [b"".join(map(self.piece, request.prompt)).decode() for request in self.requests]

    def split(self, text: str) -> list[str]:
        """A text as the parts of a script, one for each token."""
        return _PIECE.findall(text)

    def add_token(self, text: str) -> int:
        """The id of the token with this text, which may be new."""
        with self._lock:
            if text not in self._ids:
                self._ids[text] = len(self._pieces)
                self._pieces.append(text)
            return self._ids[text]

    def count(self, finished: Finished) -> None:
        with self._lock:
            self._stats.n_running -= 1
            self._stats.add(finished.timings, failed=finished.error is not None)
            if isinstance(finished.error, EngineDied) and not finished.error.recovered:
                self._stats.alive = False

    # the protocol -----------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        return [self.add_token(piece) for piece in self.split(text)]

    tokenize_piece = tokenize_plain = tokenize

    def token_id(self, text: str) -> int | None:
        ids = self.tokenize(text)
        return ids[0] if len(ids) == 1 else None

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id].encode()

    def submit(self, request: Request, sink: Sink) -> ScriptedTicket:
        if len(request.prompt) >= self.info.n_ctx:
            error = ContextLengthExceeded(len(request.prompt), self.info.n_ctx, self.info.n_ctx_train)
            self.refused.append(error.message)
            raise error
        self.requests.append(request)
        ticket = ScriptedTicket(self, request, self._script(request), sink)
        self.tickets.append(ticket)
        with self._lock:
            self._stats.n_requests += 1
            self._stats.n_running += 1
        ticket.start()
        return ticket

    def stats(self) -> Stats:
        return self._stats

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()
