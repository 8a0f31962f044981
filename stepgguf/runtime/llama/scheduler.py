"""Which tokens of which requests go into the next decode, and what comes out of it.

A request in a sequence knows more tokens than the model has read of it: the rest of its prompt, or forced tokens, or
just the last token sampled. Each step reads some of them for every request in one batch; whoever has read all its
tokens gets the next one (with MTP: the guesses are read along, and as many are kept as the model itself would choose).

    row budget n_batch:   first every request that is generating   last token + guesses
                          then, in equal shares, prompts           up to the next checkpoint

All requests share one pool of cells. A request is let in when what is left of its prompt fits beside the others, after
idle sequences were put away. If generation then runs out of cells, the youngest request is set back into the queue
and goes on later from where it was; none fails because of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import FinishReason, Prefill, Stats, Step, Tokens
from stepgguf.runtime.llama.context import NO_ROOM, Rows
from stepgguf.runtime.llama.depth import DepthTuner
from stepgguf.runtime.llama.prefix import Prefixes, Sequence, TokenArray, common_prefix
from stepgguf.runtime.llama.run import Run
from stepgguf.runtime.llama.store import Entry, Store

HEADROOM = 64  # cells that a request needs beside its prompt to be let in
FEW = 32  # unread tokens; a request with more is reading a prompt, the others come first
SHARED = 0.5  # a prompt takes an idle sequence over if it goes on from at least so much of it
WORTH_WAITING = 256  # tokens that another request is about to read for both


class DecodeFailed(Exception):
    """llama_decode failed for a reason other than room: the context is not to be trusted any more."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a request contributes to a decode."""

    run: Run
    tokens: list[int]
    guesses: list[int]
    outputs: bool

    @property
    def n_rows(self) -> int:
        return len(self.tokens) + len(self.guesses)


class Scheduler:
    """Owns the sequences of a context and the runs in them. One thread calls it."""

    def __init__(
        self,
        prefixes: Prefixes,
        tuner: DepthTuner | None,
        store: Store,
        stats: Stats,
        ended: Callable[[Run, FinishReason], None],
    ) -> None:
        self._prefixes, self._context, self._drafter = prefixes, prefixes.context, prefixes.drafter
        self._tuner, self._store, self._stats, self._ended = tuner, store, stats, ended
        self.waiting: list[Run] = []
        self.running: list[Run] = []

    @property
    def n_context_used(self) -> int:
        return sum(len(s) for s in self._prefixes.sequences)

    @property
    def cache_bytes(self) -> int:
        return self._store.n_bytes + self._checkpoint_bytes()

    # requests ---------------------------------------------------------------------------------------------------

    def drop_cancelled(self) -> None:
        for run in [r for r in self.running if r.cancelled]:
            self._finish(run, "cancelled")
        for run in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(run)
            self._ended(run, "cancelled")

    def set_draft(self, depth: int | None) -> None:
        if self._tuner:
            self._tuner.fixed = depth

    def step(self) -> None:
        """Let requests in, decode once, hand out tokens. DecodeFailed: the context is lost."""
        self._admit()
        self._deliver()
        if not self.running:
            return
        started = time.monotonic()
        parts = self._plan()
        while parts:
            code = self._context.decode([_rows(part) for part in parts])
            if code == 0:
                break
            if code != NO_ROOM:
                raise DecodeFailed(f"llama_decode failed with code {code}")
            parts = self._make_room(parts)
        self._advance(parts)
        self._measure(parts, time.monotonic() - started)
        self._deliver()

    def _deliver(self) -> None:
        for run in [*self.running, *self.waiting]:
            run.deliver()

    def put_all_away(self) -> None:
        """Save what all sequences hold, before the context goes."""
        for sequence in self._prefixes.sequences:
            self._put_away(sequence)

    # letting in -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self._admit_next():
            pass
        for n_ahead, run in enumerate(sorted(self.waiting, key=lambda r: r.serial)):
            run.tell_queued(n_ahead)

    def _admit_next(self) -> bool:
        """The oldest request that need not wait for what another is reading. One that does not fit is not overtaken:
        it could wait for ever."""
        if all(s.busy for s in self._prefixes.sequences):
            return False
        for run in sorted(self.waiting, key=lambda r: r.serial):
            if not self._fits(run):
                return False
            if not self._another_reads(run.known):
                run.admit(self._choose_sequence(run.known))
                self.waiting.remove(run)
                self.running.append(run)
                return True
        return False

    def _fits(self, run: Run) -> bool:
        """Whether the tokens of the run fit beside the other runs, if every idle sequence gives way."""
        others = sum(len(r.tokens) for r in self.running)
        mine = min(len(run.tokens) + HEADROOM, run.most_tokens)
        return not self.running or others + mine <= self._context.n_ctx

    def _another_reads(self, prompt: TokenArray) -> bool:
        """Whether a running request is about to make a checkpoint that saves this prompt much of its reading."""
        mine = max(self._prefixes.start(s, prompt).n for s in self._prefixes.sequences)
        for run in self.running:
            shared = common_prefix(run.prompt, prompt[:-1])
            if any(max(run.n_read, mine + WORTH_WAITING) < n <= shared for n in run.checkpoints):
                return True
        return False

    def _choose_sequence(self, prompt: TokenArray) -> Sequence:
        """An idle sequence, brought to the position from which the least of the prompt has to be read."""
        prefixes = self._prefixes
        starts = {s: prefixes.start(s, prompt) for s in prefixes.sequences}
        source = max(starts, key=lambda s: (starts[s].n, not s.busy))
        start = starts[source]
        entry = self._store.best(prompt, prefixes.n_swa, start.n)
        idle = [s for s in starts if not s.busy and (s is not source or start.n == 0)]
        most_of_it = start.n >= SHARED * len(source)
        if entry is None and start.n and not source.busy and (most_of_it or not idle):
            if not most_of_it:
                self._put_away(source)
            prefixes.rewind(source, start)
            return source
        target = min(idle or [source], key=lambda s: (len(s) > 0, s.last_used))
        self._put_away(target)
        prefixes.clear(target)
        if entry is not None:
            self._bring_back(target, entry, prompt)
        elif (start := prefixes.fork_start(source, prompt)).n and source is not target:
            prefixes.fork(source, start, target)
        return target

    def _bring_back(self, sequence: Sequence, entry: Entry, prompt: TokenArray) -> None:
        restored = self._context.restore(sequence.id, entry.cells, window_only=False)
        if not restored or self._context.newest(sequence.id) != len(entry.tokens) - 1:
            self._prefixes.clear(sequence)
            return
        sequence.extend(entry.tokens)
        sequence.checkpoints = entry.checkpoints
        if self._drafter:
            self._drafter.restore(sequence.id, len(sequence), entry.draft)
        self._prefixes.rewind(sequence, self._prefixes.start(sequence, prompt))

    def _put_away(self, sequence: Sequence) -> None:
        """Copy a sequence into the store, if that can hold it."""
        if not len(sequence) or not self._store.has_room(self._context.size(sequence.id)):
            return
        # llama.cpp does not save the cells that the window has left
        oldest = max(self._context.oldest(sequence.id), len(sequence) - self._prefixes.n_swa)
        draft = self._drafter.save(sequence.id) if self._drafter else None
        cells = self._context.save(sequence.id, window_only=False)
        self._store.put(Entry(sequence.tokens.copy(), cells, draft, list(sequence.checkpoints), oldest))

    # planning ---------------------------------------------------------------------------------------------------

    def _plan(self) -> list[_Part]:
        generating = [r for r in self.running if r.n_unread <= FEW]
        reading = [r for r in self.running if r.n_unread > FEW]
        guesses = self._guess(generating)
        parts: list[_Part] = []
        budget = self._context.n_batch
        for i, run in enumerate(generating + reading):
            share = budget if run.n_unread <= FEW else budget // (len(self.running) - i)
            part = _cut(run, share, guesses.get(run, []))
            if part.tokens:
                parts.append(part)
                budget -= part.n_rows
        return parts

    def _guess(self, generating: list[Run]) -> dict[Run, list[int]]:
        if self._drafter is None or self._tuner is None or not generating:
            return {}
        depth = self._tuner.depth(len(generating))
        self._drafter.enabled = depth > 0
        last = {r.seq: r for r in generating if r.n_unread == 1 and r.n_left > 1}
        if depth == 0 or not last:
            return {}
        guesses = self._drafter.draft({seq: run.tokens[-1] for seq, run in last.items()}, depth)
        return {last[seq]: tokens for seq, tokens in guesses.items()}

    def _make_room(self, parts: list[_Part]) -> list[_Part]:
        """After a decode that found no room: put something away and say what to try next."""
        idle = [s for s in self._prefixes.sequences if not s.busy and len(s)]
        if idle:
            sequence = min(idle, key=lambda s: s.last_used)
            self._put_away(sequence)
            self._prefixes.clear(sequence)
            return parts
        if any(part.guesses for part in parts):
            return [_Part(p.run, p.tokens, [], p.outputs) for p in parts]
        youngest = max(self.running, key=lambda r: r.serial)
        if len(self.running) == 1:
            self._finish(youngest, "length")
        else:
            self._set_back(youngest)
        return [p for p in parts if p.run is not youngest]

    def _set_back(self, run: Run) -> None:
        """Into the queue again, to go on later."""
        sequence = run.leave()
        self.running.remove(run)
        self.waiting.append(run)
        self._put_away(sequence)
        self._prefixes.clear(sequence)

    # after a decode ---------------------------------------------------------------------------------------------

    def _advance(self, parts: Many[_Part]) -> None:
        row = 0
        ended: list[tuple[Run, FinishReason]] = []
        for part in parts:
            run, sequence = part.run, part.run.sequence
            assert sequence is not None
            start = len(sequence)
            sequence.extend(part.tokens)
            reason = self._take(part, row + len(part.tokens) - 1) if part.outputs else None
            if self._drafter:
                read = sequence.tokens[start:]
                self._drafter.observe(sequence.id, start, read.tolist(), self._context.hidden(row, len(read)))
            if len(sequence) in run.checkpoints:
                sequence.checkpoints.append(self._prefixes.checkpoint(sequence))
                self._shrink()
            if len(part.tokens) > 1 and not run.n_generated:
                run.emit(Prefill(len(sequence), run.timings.n_prompt, run.timings.n_cached))
            if reason is not None:
                ended.append((run, reason))
            row += part.n_rows
        for run, reason in ended:
            self._finish(run, reason)

    def _take(self, part: _Part, row: int) -> FinishReason | None:
        """Choose tokens from the row on, as long as the guesses were right. Why the request ends, if it does."""
        run, sequence = part.run, part.run.sequence
        assert sequence is not None
        steps: list[Step] = []
        accepted = 0
        reason: FinishReason | None = None
        for i, guess in enumerate([*part.guesses, None]):
            try:
                steps += run.next_steps(self._context, row + i)
            except BadGrammar as error:
                run.error, reason = error, "error"
                break
            if run.ended or run.n_left == 0:
                reason = "stop" if run.ended else "length"
                break
            if run.tokens[-1] != guess or run.n_unread > 1:
                break
            sequence.extend([guess])
            accepted += 1
        if part.guesses:
            self._context.remove(sequence.id, len(sequence))
        run.count(len(part.guesses), accepted, len(steps))
        if steps:
            run.emit(Tokens(tuple(steps)))
        return reason

    def _finish(self, run: Run, reason: FinishReason) -> None:
        self.running.remove(run)
        run.leave()
        self._ended(run, reason)

    def _measure(self, parts: Many[_Part], seconds: float) -> None:
        self._stats.n_steps += 1
        generating = [part for part in parts if len(part.tokens) == 1]
        if self._tuner and generating and len(generating) == len(parts):
            depth = max(len(part.guesses) for part in parts)
            tokens = sum(part.run.last_taken for part in parts)
            self._tuner.record(len(parts), depth, tokens, seconds)

    def _checkpoint_bytes(self) -> int:
        return sum(s.checkpoint_bytes for s in self._prefixes.sequences)

    def _shrink(self) -> None:
        """Keep store and checkpoints under the bound: first the store gives way, then the oldest checkpoints."""
        self._store.shrink(self._checkpoint_bytes())
        while self._checkpoint_bytes() > self._store.ram_bytes:
            holders = [s for s in self._prefixes.sequences if s.checkpoints]
            holder = min(holders, key=lambda s: (len(s.checkpoints) == 1, s.last_used))
            holder.checkpoints.pop(0)


def _cut(run: Run, share: int, guesses: list[int]) -> _Part:
    """The next unread tokens of a run, at most up to its next checkpoint."""
    start = run.n_read
    stop = min([start + share, len(run.tokens), *(n for n in run.checkpoints if n > start)])
    outputs = stop == len(run.tokens)
    return _Part(run, run.tokens[start:stop], guesses[: max(0, share - 1)] if outputs else [], outputs)


def _rows(part: _Part) -> Rows:
    n_outputs = 1 + len(part.guesses) if part.outputs else 0
    return Rows(part.run.seq, part.run.n_read, part.tokens + part.guesses, n_outputs)
