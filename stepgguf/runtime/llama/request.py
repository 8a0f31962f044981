"""ActiveRequest: what a request knows so far, what the model has read of it, and which tokens come next.

    submit ──> waiting ──admit──> running ──finish──> Finished          a cancel finishes it from either state
                  └──<──leave──<─────┘                                  set back: generation ran out of cells

While it runs, `tokens` is ahead of what the model has read:

    tokens    prompt .......................... generated .........
    read      ########################|<----- n_unread ----------->

n_unread is 1 in the middle of an answer: reading the last token gives the next. It is more while the prompt is read,
and after tokens were forced. The next token is sampled, unless some are forced: the closing tokens of the reasoning,
once its budget is used up, it repeats itself, or `end_reasoning` is called.

Its sequence holds what is read. A request that is set back keeps its tokens, and is admitted later to a sequence that
holds as much of them as the cache still has; so nothing that was told to its sink is ever taken back.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from stepgguf.errors import StepggufError
from stepgguf.runtime.engine import Event, Finished, FinishReason, Prefill, Queued, Request, Sink, Step, Timings
from stepgguf.runtime.llama.context import LlamaContext
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.llama.sampler import Sampler, logprobs_of
from stepgguf.runtime.llama.sequences import ContextSequence, TokenArray
from stepgguf.runtime.reasoning_limit import ReasoningLimit

# Where the prompt's states are saved, in tokens: see `_save_points`.
SAVE_NEAR_END = 64  # a turn that starts so near to the prompt's end makes another save point needless
SAVE_BEFORE_END = 4  # otherwise there is one so far from it
SAVE_SPACING = 256  # between two save points at least, but for the last: each is a copy of the sliding window

_serial_numbers = itertools.count()


class ActiveRequest:
    """A request between submit and its end. Only the engine's thread touches it, but for `cancelled`.

    tokens: the prompt and all that was generated; the model has read the first n_read of them. save_points: the
    positions of the prompt where the state of its sequence is to be saved. ended: an end token came. error: why it
    failed. last_taken: tokens that the last decode brought.
    """

    def __init__(self, model: LlamaModel, request: Request, sink: Sink, n_ctx: int) -> None:
        """Prepare a request; `close` it if it is not submitted after all. BadGrammar if its grammar does not
        compile."""
        self.request, self._sink, self._model = request, sink, model
        self._outbox: list[Event] = []
        self.serial = next(_serial_numbers)  # the oldest request goes first
        self.prompt = np.array(request.prompt, np.int32)  # to compare: a prompt can have 262,144 tokens
        self.tokens = list(request.prompt)
        self.sequence: ContextSequence | None = None  # where it runs; None while it waits
        self.save_points = _save_points(request)
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
        self._queued_emitted = False
        self._queued_at = time.monotonic()
        self._admitted_at = self._first_token_at = 0.0  # 0: not yet

    def emit(self, event: Event) -> None:
        """Give the event to the sink with the next `deliver`."""
        self._outbox.append(event)

    def deliver(self) -> None:
        """Give the sink what was emitted.

        Whoever hears of it wakes up and takes the interpreter: so this is done when a decode is about to give it up
        anyway, and not between two tokens.
        """
        outbox, self._outbox = self._outbox, []
        for event in outbox:
            self._sink(event)

    @property
    def token_array(self) -> TokenArray:
        """All of `tokens`, as an array to compare with others."""
        return np.array(self.tokens, np.int32) if self.n_generated else self.prompt

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def n_left(self) -> int:
        """Tokens that may still be generated."""
        return self._max_tokens - self.n_generated

    @property
    def most_tokens(self) -> int:
        """How many tokens prompt and answer can have together."""
        return len(self.request.prompt) + self._max_tokens

    # in a sequence ----------------------------------------------------------------------------------------------

    def emit_queued(self, n_ahead: int) -> None:
        """Emit Queued, once, to a request that could not start at once."""
        if not self._queued_emitted:
            self._queued_emitted = True
            self.emit(Queued(n_ahead))

    def admit(self, sequence: ContextSequence) -> None:
        """Start, or go on, in a sequence that holds a prefix of `tokens`."""
        sequence.busy = True
        sequence.mark_used()
        self.sequence = sequence
        self.timings.queue_seconds += time.monotonic() - self._queued_at
        if not self._admitted_at:
            self._admitted_at = time.monotonic()
            self.timings.n_cached = len(sequence)
            self.emit(Prefill(len(sequence), self.timings.n_prompt, len(sequence)))

    def leave(self) -> ContextSequence:
        """Give the sequence back as it is, because the request has ended or must wait again."""
        sequence = self.sequence
        assert sequence is not None
        sequence.busy = False
        sequence.mark_used()
        self.sequence, self._queued_at = None, time.monotonic()
        return sequence

    @property
    def seq(self) -> int:
        """The number by which llama.cpp knows its sequence."""
        assert self.sequence is not None
        return self.sequence.id

    @property
    def n_read(self) -> int:
        assert self.sequence is not None
        return len(self.sequence)

    @property
    def n_unread(self) -> int:
        """Tokens that the model has not read. Reading the last of them gives the next token."""
        return len(self.tokens) - self.n_read

    # making tokens ----------------------------------------------------------------------------------------------

    def next_steps(self, context: LlamaContext, row: int) -> list[Step]:
        """Choose the tokens after a row of the last decode, add them to `tokens` and return them: those that are
        forced, or one that is sampled and whatever it makes forced. If an end token comes there are none, and `ended`
        is set."""
        if self._forced:
            return self._take_forced()
        n_top = self.request.top_logprobs
        # The sampler writes biases and penalties into the logits; log probabilities are of before.
        raw = context.logits(row).copy() if n_top is not None else None
        token = self._sampler.sample(context, row)
        if token in self._model.ends:
            self.ended = True
            return []
        logprob, top = (
            logprobs_of(self._model, raw, token, n_top) if raw is not None and n_top is not None else (None, ())
        )
        self._add_token(token)
        return [Step(token, self._model.piece(token), False, logprob, top), *self._take_forced()]

    def _take_forced(self) -> list[Step]:
        steps = []
        while self._forced and self.n_left:
            token = self._forced.popleft()
            self._add_token(token)
            steps.append(Step(token, self._model.piece(token), forced=True))
        return steps

    def _add_token(self, token: int) -> None:
        if not self._first_token_at:
            self._first_token_at = time.monotonic()
            self.timings.prompt_seconds = self._first_token_at - self._admitted_at
        self.tokens.append(token)
        self._sampler.accept(token)
        if self._reasoning is not None:
            self._force(self._reasoning.feed(token, self.timings))

    def end_reasoning(self) -> None:
        """Close the reasoning now, if it is open."""
        if self._reasoning is not None:
            self._force(self._reasoning.close())

    def _force(self, closing: Iterable[int]) -> None:
        """Let these tokens come next, which close the reasoning; usually there are none. It stays closed: from now on
        the request's banned tokens are not sampled."""
        self._forced.extend(closing)
        if self._forced:
            self._sampler.ban(self.request.banned)

    def count_decode(self, n_guesses: int, n_accepted: int, n_taken: int) -> None:
        """Add to the timings what a decode brought: n_taken tokens, n_accepted of them guessed."""
        timings = self.timings
        self.last_taken = n_taken
        timings.n_steps += 1
        for counts in (timings.drafted, timings.accepted):
            counts.extend([0] * (n_guesses - len(counts)))
        for i in range(n_guesses):
            timings.drafted[i] += 1
            timings.accepted[i] += i < n_accepted

    def finish(self, reason: FinishReason) -> Timings:
        """Give the sink what is left and Finished, and free the sampler."""
        timings, now = self.timings, time.monotonic()
        timings.n_generated = self.n_generated
        if self._first_token_at:
            timings.generation_seconds = now - self._first_token_at
        elif self._admitted_at:
            timings.prompt_seconds = now - self._admitted_at
        self.close()
        self.emit(Finished(reason, timings, self.error))
        self.deliver()
        return timings

    def close(self) -> None:
        """Free what llama.cpp has for it."""
        self._sampler.close()


def _save_points(request: Request) -> frozenset[int]:
    """Return the positions of the prompt where a later prompt may depart from it: starts of turns, and near its end."""
    end = len(request.prompt)
    turns = sorted(n for n in set(request.turns) if 0 < n < end)
    kept: list[int] = []
    for n in turns[:-1]:
        if n >= (kept[-1] if kept else 0) + SAVE_SPACING:
            kept.append(n)
    kept += turns[-1:]
    if end > SAVE_BEFORE_END and (not kept or kept[-1] < end - SAVE_NEAR_END):
        kept.append(end - SAVE_BEFORE_END)
    return frozenset(kept)
