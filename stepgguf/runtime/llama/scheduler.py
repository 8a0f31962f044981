"""Scheduler: which requests run, step by step.

    step:   admit -> guess -> compose -> decode ──no room──> give cells back, decode again
                                           └──> advance: sequences grow, states are saved, tokens are chosen
                                                measure, deliver

A request in a sequence knows more tokens than the model has read of it: the rest of its prompt, or forced tokens, or
just the last token sampled. Each step reads some of them for every request in one batch (see batch.py); whoever has
read all its tokens gets the next one.

All requests share one pool of cells. A request is let in when what is left of its prompt fits beside the others, after
idle sequences were put away. If generation then runs out of cells, the youngest request is set back into the queue
and goes on later from where it was; none fails because of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from stepgguf.runtime.engine import FinishReason, Prefill, Stats
from stepgguf.runtime.llama.batch import BatchPart, compose_batch, is_generating, take_tokens
from stepgguf.runtime.llama.cache import SequenceCache
from stepgguf.runtime.llama.context import NO_ROOM
from stepgguf.runtime.llama.depth import DepthTuner
from stepgguf.runtime.llama.request import ActiveRequest
from stepgguf.runtime.llama.sequences import TokenArray, common_prefix

HEADROOM_CELLS = 64  # that a request needs beside its prompt to be let in: else it would be set back at once
WORTH_WAITING_TOKENS = 256  # that another request is about to read for both


class DecodeFailed(Exception):
    """llama_decode failed for a reason other than room: the context is not to be trusted any more."""


class Scheduler:
    """Owns the requests, and the sequences of a context in which they run. One thread calls it.

    waiting, running: every request that was submitted and has not ended is in one of them. ended: is told each that
    has, with the reason; the scheduler has let go of it by then.
    """

    def __init__(
        self,
        cache: SequenceCache,
        tuner: DepthTuner | None,
        stats: Stats,
        ended: Callable[[ActiveRequest, FinishReason], None],
    ) -> None:
        """Schedule over an empty cache. tuner: how deep to draft, None if there are no MTP blocks. stats: decodes are
        counted there."""
        self.cache = cache
        self._context, self._drafter = cache.sequences.context, cache.sequences.drafter
        self._tuner, self._stats, self._ended = tuner, stats, ended
        self.waiting: list[ActiveRequest] = []
        self.running: list[ActiveRequest] = []

    def drop_cancelled(self) -> None:
        """End the requests whose callers have cancelled them. Their sequences stay, as if they had ended."""
        for request in [r for r in self.running if r.cancelled]:
            self._finish(request, "cancelled")
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            self._ended(request, "cancelled")

    def set_draft(self, depth: int | None) -> None:
        """Draft so many tokens from the next step on. None: as many as are fastest."""
        if self._tuner:
            self._tuner.fixed = depth

    def step(self) -> None:
        """Let requests in, decode once, hand out tokens. DecodeFailed: the context is lost."""
        self._admit()
        self._deliver()
        if not self.running:
            return
        started = time.monotonic()
        parts = compose_batch(self.running, self._guess(), self._context.n_batch)
        while parts:
            code = self._context.decode([part.decode_rows() for part in parts])
            if code == 0:
                break
            if code != NO_ROOM:
                raise DecodeFailed(f"llama_decode failed with code {code}")
            parts = self._make_room(parts)
        self._advance(parts)
        self._measure(parts, time.monotonic() - started)
        self._deliver()

    def _deliver(self) -> None:
        for request in [*self.running, *self.waiting]:
            request.deliver()

    # letting in -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self._admit_next():
            pass
        for n_ahead, request in enumerate(sorted(self.waiting, key=lambda r: r.serial)):
            request.emit_queued(n_ahead)

    def _admit_next(self) -> bool:
        """Let in the oldest request that need not wait for what another is reading. One that does not fit is not
        overtaken: it could wait for ever. False: nobody was let in."""
        if self.cache.all_busy:
            return False
        for request in sorted(self.waiting, key=lambda r: r.serial):
            if not self._fits(request):
                return False
            tokens = request.token_array
            if not self._another_reads(tokens):
                request.admit(self.cache.place(tokens))
                self.waiting.remove(request)
                self.running.append(request)
                return True
        return False

    def _fits(self, request: ActiveRequest) -> bool:
        """Whether the tokens of a request fit beside the running ones, if every idle sequence gives way."""
        others = sum(len(r.tokens) for r in self.running)
        mine = min(len(request.tokens) + HEADROOM_CELLS, request.most_tokens)
        return not self.running or others + mine <= self._context.n_ctx

    def _another_reads(self, prompt: TokenArray) -> bool:
        """Whether a running request is about to reach a save point that spares this prompt much of its reading."""
        mine = self.cache.most_reusable(prompt)
        for request in self.running:
            shared = common_prefix(request.prompt, prompt[:-1])
            if any(max(request.n_read, mine + WORTH_WAITING_TOKENS) < n <= shared for n in request.save_points):
                return True
        return False

    # before a decode --------------------------------------------------------------------------------------------

    def _guess(self) -> dict[ActiveRequest, list[int]]:
        """Return guesses for the requests that are generating and have read all but their last token."""
        generating = [request for request in self.running if is_generating(request)]
        if self._drafter is None or self._tuner is None or not generating:
            return {}
        depth = self._tuner.depth(len(generating))
        self._drafter.enabled = depth > 0
        # Nothing is guessed for the last token that a request may have: no guess could be kept.
        by_seq = {r.seq: r for r in generating if r.n_unread == 1 and r.n_left > 1}
        if depth == 0 or not by_seq:
            return {}
        guesses = self._drafter.draft({seq: request.tokens[-1] for seq, request in by_seq.items()}, depth)
        return {by_seq[seq]: tokens for seq, tokens in guesses.items()}

    def _make_room(self, parts: list[BatchPart]) -> list[BatchPart]:
        """Give cells back after a decode that found no room, the cheapest way first, and return what to try next."""
        if self.cache.free_idle():
            return parts
        if any(part.guesses for part in parts):
            return [part.without_guesses() for part in parts]
        youngest = max(self.running, key=lambda r: r.serial)
        if len(self.running) == 1:  # the whole context is its own, so it can never go on
            self._finish(youngest, "length")
        else:
            self.set_back(youngest)
        return [part for part in parts if part.request is not youngest]

    def set_back(self, request: ActiveRequest) -> None:
        """Put a running request into the queue again, to go on later; what it has read goes to the store.

        It keeps its serial number, so it is let in before those that came after it.
        """
        sequence = request.leave()
        self.running.remove(request)
        self.waiting.append(request)
        self.cache.put_away(sequence)
        self.cache.sequences.clear(sequence)

    # after a decode ---------------------------------------------------------------------------------------------

    def _advance(self, parts: Sequence[BatchPart]) -> None:
        """Take what the decode brought each part. Requests end only when all have theirs: the rows stay as they are."""
        row = 0
        ended: list[tuple[ActiveRequest, FinishReason]] = []
        for part in parts:
            reason = self._advance_part(part, row)
            if reason is not None:
                ended.append((part.request, reason))
            row += part.n_rows
        for request, reason in ended:
            self._finish(request, reason)

    def _advance_part(self, part: BatchPart, row: int) -> FinishReason | None:
        """Take what the decode brought one request: its sequence holds more, maybe its state is saved, and it gets its
        next tokens.

        `row` is its first of the decode. Returns why it ends, None if it does not.
        """
        request, sequence = part.request, part.request.sequence
        assert sequence is not None
        start = len(sequence)
        sequence.extend(part.tokens)
        reason = take_tokens(part, self._context, row + len(part.tokens) - 1) if part.outputs else None
        if self._drafter:
            # After `take_tokens`: the MTP blocks are to read the guesses that were right, too, and no others.
            read = sequence.tokens[start:]
            self._drafter.observe(sequence.id, start, read.tolist(), self._context.hidden_states(row, len(read)))
        if len(sequence) in request.save_points:
            self.cache.save_state(sequence)
        if len(part.tokens) > 1 and not request.n_generated:
            request.emit(Prefill(len(sequence), request.timings.n_prompt, request.timings.n_cached))
        return reason

    def _finish(self, request: ActiveRequest, reason: FinishReason) -> None:
        self.running.remove(request)
        request.leave()
        self._ended(request, reason)

    def _measure(self, parts: Sequence[BatchPart], seconds: float) -> None:
        """Tell the tuner what the step brought, if nothing in it but generating took time."""
        self._stats.n_steps += 1
        generating = [part for part in parts if len(part.tokens) == 1]
        if self._tuner and generating and len(generating) == len(parts):
            depth = max(len(part.guesses) for part in parts)
            n_tokens = sum(part.request.last_taken for part in parts)
            self._tuner.record(len(parts), depth, n_tokens, seconds)
