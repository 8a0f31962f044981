"""One request on its way: what it knows so far, what the model has read of it, when its thinking ends."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from stepgguf.errors import StepggufError
from stepgguf.runtime.engine import Event, Finished, FinishReason, Prefill, Queued, Request, Sink, Step, Timings
from stepgguf.runtime.llama.context import Context
from stepgguf.runtime.llama.model import Model
from stepgguf.runtime.llama.prefix import Sequence, TokenArray
from stepgguf.runtime.llama.sampler import Sampler, logprobs
from stepgguf.runtime.reasoning_limit import ReasoningLimit

NEAR_END = 64  # tokens: a turn that starts so near to the prompt's end makes another checkpoint needless
BEFORE_END = 4  # tokens: otherwise one is made so far from it
APART = 256  # tokens between checkpoints, but for the last

_serial = itertools.count()


class Run:
    """`tokens` is the prompt and all that was generated; the model has read the first n_read of them."""

    def __init__(self, model: Model, request: Request, sink: Sink, n_ctx: int) -> None:
        self.request, self._sink, self._model = request, sink, model
        self._outbox: list[Event] = []
        self.serial = next(_serial)  # older runs go first
        self.prompt = np.array(request.prompt, np.int32)  # to compare: a prompt can have 262,144 tokens
        self.tokens = list(request.prompt)
        self.sequence: Sequence | None = None
        self.checkpoints = _checkpoints(request)
        room = n_ctx - len(request.prompt)
        self._max_tokens = min(room, request.max_tokens or room)
        self._sampler = Sampler(model, request.sampling, request.prompt, request.grammar, ignore_end=request.ignore_end)
        self._reasoning = ReasoningLimit(request.reasoning) if request.reasoning is not None else None
        self.timings = Timings(n_prompt=len(request.prompt))
        self._forced: deque[int] = deque()
        if self._reasoning is not None:
            self._force(self._reasoning.check_budget(self.timings))
        else:
            self._sampler.ban(request.banned)
        self.cancelled = self.ended = False
        self.error: StepggufError | None = None
        self.last_taken = 0
        self._told_queued = False
        self._queued = time.monotonic()
        self._admitted = self._first_token = 0.0

    def emit(self, event: Event) -> None:
        """Tell the caller with the next `deliver`."""
        self._outbox.append(event)

    def deliver(self) -> None:
        """Whoever is told wakes up and takes the interpreter: do it when a decode is about to give it up anyway."""
        outbox, self._outbox = self._outbox, []
        for event in outbox:
            self._sink(event)

    @property
    def known(self) -> TokenArray:
        """`tokens`, to compare."""
        return np.array(self.tokens, np.int32) if self.n_generated else self.prompt

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def n_left(self) -> int:
        return self._max_tokens - self.n_generated

    @property
    def most_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.request.prompt) + self._max_tokens

    # in a sequence ----------------------------------------------------------------------------------------------

    def tell_queued(self, n_ahead: int) -> None:
        """Once, if it could not start at once."""
        if not self._told_queued:
            self._told_queued = True
            self.emit(Queued(n_ahead))

    def admit(self, sequence: Sequence) -> None:
        """Start, or go on, in a sequence that holds a prefix of `tokens`."""
        sequence.busy = True
        sequence.touch()
        self.sequence = sequence
        self.timings.queue_seconds += time.monotonic() - self._queued
        if not self._admitted:
            self._admitted = time.monotonic()
            self.timings.n_cached = len(sequence)
            self.emit(Prefill(len(sequence), self.timings.n_prompt, len(sequence)))

    def leave(self) -> Sequence:
        """Give the sequence back as it is."""
        sequence = self.sequence
        assert sequence is not None
        sequence.busy = False
        sequence.touch()
        self.sequence, self._queued = None, time.monotonic()
        return sequence

    @property
    def seq(self) -> int:
        assert self.sequence is not None
        return self.sequence.id

    @property
    def n_read(self) -> int:
        assert self.sequence is not None
        return len(self.sequence)

    @property
    def n_unread(self) -> int:
        """Reading the last of these gives the next token."""
        return len(self.tokens) - self.n_read

    # making tokens ----------------------------------------------------------------------------------------------

    def next_steps(self, context: Context, row: int) -> list[Step]:
        """The tokens after a row of the last decode: one that is sampled, or all that are forced. They are added to
        `tokens`. Nothing, and `ended` is set: an end token came."""
        if self._forced:
            return self._take_forced()
        n_top = self.request.top_logprobs
        raw = context.logits(row).copy() if n_top is not None else None
        token = self._sampler.sample(context, row)
        if token in self._model.ends:
            self.ended = True
            return []
        logprob, top = logprobs(self._model, raw, token, n_top) if raw is not None and n_top is not None else (None, ())
        self._add(token)
        return [Step(token, self._model.piece(token), False, logprob, top), *self._take_forced()]

    def _take_forced(self) -> list[Step]:
        steps = []
        while self._forced and self.n_left:
            token = self._forced.popleft()
            self._add(token)
            steps.append(Step(token, self._model.piece(token), forced=True))
        return steps

    def _add(self, token: int) -> None:
        if not self._first_token:
            self._first_token = time.monotonic()
            self.timings.prompt_seconds = self._first_token - self._admitted
        self.tokens.append(token)
        self._sampler.accept(token)
        if self._reasoning is not None:
            self._force(self._reasoning.feed(token, self.timings))

    def end_reasoning(self) -> None:
        if self._reasoning is not None:
            self._force(self._reasoning.close())

    def _force(self, closing: Iterable[int]) -> None:
        """Close the thinking, if `closing` says so. It stays closed."""
        self._forced.extend(closing)
        if self._forced:
            self._sampler.ban(self.request.banned)

    def count(self, n_guesses: int, n_accepted: int, n_taken: int) -> None:
        """What a decode brought."""
        timings = self.timings
        self.last_taken = n_taken
        timings.n_steps += 1
        for counts in (timings.drafted, timings.accepted):
            counts.extend([0] * (n_guesses - len(counts)))
        for i in range(n_guesses):
            timings.drafted[i] += 1
            timings.accepted[i] += i < n_accepted

    def finish(self, reason: FinishReason) -> Timings:
        """Tell the caller."""
        timings, now = self.timings, time.monotonic()
        timings.n_generated = self.n_generated
        if self._first_token:
            timings.generation_seconds = now - self._first_token
        elif self._admitted:
            timings.prompt_seconds = now - self._admitted
        self.close()
        self.emit(Finished(reason, timings, self.error))
        self.deliver()
        return timings

    def close(self) -> None:
        self._sampler.close()


def _checkpoints(request: Request) -> frozenset[int]:
    """Positions of the prompt at which its state is kept: starts of turns, and near its end."""
    end = len(request.prompt)
    turns = sorted(n for n in set(request.turns) if 0 < n < end)
    kept: list[int] = []
    for n in turns[:-1]:
        if n >= (kept[-1] if kept else 0) + APART:
            kept.append(n)
    kept += turns[-1:]
    if end > BEFORE_END and (not kept or kept[-1] < end - NEAR_END):
        kept.append(end - BEFORE_END)
    return frozenset(kept)
