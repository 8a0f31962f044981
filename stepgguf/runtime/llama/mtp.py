"""Drafting with the MTP heads: guesses of the next tokens that the model then checks in one decode.

Head i reads, for every position p, the token at p and the hidden state that the model (or, inside a draft, head i-1)
had at p-1; it guesses the token at p+1. Each head is a layer of its own with its own keys and values, so every head
must read every row:

    rows of a sequence         backlog: tokens that the model has read since      chain: the last token and the guesses
                               (token p, model's hidden p-1) ...                  (last, model's hidden) (g0, h'0) ...
    head 0                     all                                                last                 -> g0, h'0
    head 1                     all                                                last g0              -> g1, h'1
    head 2                     all                                                last g0 g1           -> g2, h'2

llama.cpp's own driver (common/speculative.cpp) reads the backlog and the chain in separate decodes, six for three
heads; here they share three. The heads are sliding-window layers, so of a long prompt only the last n_swa tokens are
read. What the heads guess can only cost time: the model's own choice is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepgguf.runtime.llama import hooks
from stepgguf.runtime.llama.context import Context, Floats, Rows
from stepgguf.runtime.llama.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class DraftState:
    """The heads' cells after n tokens, and the model's hidden state at n-1."""

    n: int
    cells: bytearray
    hidden: Floats

    @property
    def n_bytes(self) -> int:
        return len(self.cells) + self.hidden.nbytes


@dataclass
class _Track:
    """One sequence. The cells hold positions up to `start`; from there on the backlog waits to be read."""

    hidden: Floats  # the model's at the last position, [n_embd]
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    rows: list[Floats] = field(default_factory=list)  # [n, n_embd] each, one row a token of the backlog

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def backlog(self) -> Floats:
        if len(self.rows) != 1:
            self.rows = [np.concatenate(self.rows)] if self.rows else [np.zeros((0, len(self.hidden)), np.float32)]
        return self.rows[0]

    def drop(self, n: int) -> None:
        """Forget the first n tokens of the backlog."""
        self.rows = [self.backlog()[n:]]
        self.start, self.tokens = self.start + n, self.tokens[n:]


class Drafter:
    """The heads' context beside the model's. `failed` counts decodes that found no room."""

    def __init__(self, model: Model, target: Context, *, n_seq: int, threads: int) -> None:
        self._n_embd, self.n_heads, self._window = model.n_embd, model.n_heads, model.n_swa
        self._context = Context(
            model, n_ctx=target.n_ctx, n_seq=n_seq, n_batch=target.n_batch, n_outputs=n_seq, threads=threads, of=target
        )
        hooks.emit_hidden(target.handle, outputs_only=False)
        hooks.emit_hidden(self._context.handle, outputs_only=True)
        self._tracks = {seq: _Track(self._zeros()) for seq in range(n_seq)}
        self._share = target.n_batch // n_seq - self.n_heads  # backlog rows of a sequence in one decode
        self.enabled = True

    def close(self) -> None:
        self._context.close()

    def _zeros(self) -> Floats:
        return np.zeros(self._n_embd, np.float32)

    # following the model ----------------------------------------------------------------------------------------

    def observe(self, seq: int, start: int, tokens: Sequence[int], hidden: Floats) -> None:
        """The model has read tokens at positions from start on; hidden [len(tokens), n_embd] is what it had there."""
        track = self._tracks[seq]
        assert track.end == start
        rows = np.empty((len(tokens), self._n_embd), np.float32)
        rows[0], rows[1:] = track.hidden, hidden[: len(tokens) - 1]
        track.hidden = hidden[len(tokens) - 1].copy()
        track.tokens += tokens
        track.rows.append(rows)
        if len(track.tokens) > 2 * self._window:
            track.drop(len(track.tokens) - self._window)

    def clear(self, seq: int) -> None:
        self._context.remove(seq, 0)
        self._tracks[seq] = _Track(self._zeros())

    def save(self, seq: int) -> DraftState | None:
        """None while it is not used."""
        track = self._tracks[seq]
        if not self.enabled or not self._catch_up([seq], 0):
            return None
        return DraftState(track.start, self._context.save(seq, window_only=False), track.hidden.copy())

    def restore(self, seq: int, n: int, state: DraftState | None) -> None:
        """The sequence now has n tokens. Without a state the heads start from there with nothing behind them."""
        self.clear(seq)
        track = self._tracks[seq]
        track.start = n
        if state is None or not self._context.restore(seq, state.cells, window_only=False):
            return
        self._context.remove(seq, n)
        if state.n == n:
            track.hidden = state.hidden.copy()

    # drafting ---------------------------------------------------------------------------------------------------

    def draft(self, last: dict[int, int], depth: int) -> dict[int, list[int]]:
        """Guess what follows: sequence -> its last token, which the model has not read -> up to depth guesses."""
        guesses: dict[int, list[int]] = {seq: [] for seq in last}
        if not self._catch_up(list(last), self._share):
            return guesses
        chains = {seq: self._tracks[seq].hidden[None] for seq in last}
        for head in range(self.n_heads):
            rows = [self._rows(seq, [token, *guesses[seq]], chains[seq], head < depth) for seq, token in last.items()]
            if not self._decode(head, [r for r in rows if r.tokens]):
                return {seq: [] for seq in last}
            if head < depth:
                at = -1
                for part in rows:
                    at += len(part.tokens)
                    guesses[part.seq].append(int(self._context.logits(at).argmax()))
                    chains[part.seq] = np.concatenate([chains[part.seq], self._context.hidden(at, 1)])
        for seq in last:
            track = self._tracks[seq]
            track.drop(len(track.tokens))
            self._context.remove(seq, track.start)
        return guesses

    def _rows(self, seq: int, chain: list[int], hidden: Floats, guess: bool) -> Rows:
        """The backlog of a sequence and, if a guess is wanted, the chain."""
        track = self._tracks[seq]
        if not guess:
            return Rows(seq, track.start, track.tokens, 0, track.backlog())
        return Rows(seq, track.start, track.tokens + chain, 1, np.concatenate([track.backlog(), hidden]))

    def _catch_up(self, seqs: list[int], most: int) -> bool:
        """Let the heads read the backlogs until at most so many tokens are left in each."""
        for seq in seqs:
            track = self._tracks[seq]
            if len(track.tokens) > self._window:
                track.drop(len(track.tokens) - self._window)
            if 0 <= self._end(seq) < track.start:  # the window has moved on: positions must not have gaps
                self._context.remove(seq, 0)
            while len(track.tokens) > most:
                n = min(len(track.tokens), self._context.n_batch)
                part = Rows(seq, track.start, track.tokens[:n], 0, track.backlog()[:n])
                if not all(self._decode(head, [part]) for head in range(self.n_heads)):
                    return False
                track.drop(n)
        return True

    def _end(self, seq: int) -> int:
        return self._context.newest(seq) + 1

    def _decode(self, head: int, rows: list[Rows]) -> bool:
        if not rows:
            return True
        for part in rows:
            self._context.remove(part.seq, part.start)
        hooks.use_head(self._context.handle, head)
        if self._context.decode(rows) == 0:
            return True
        for part in rows:  # no room, or worse: the heads start anew behind what the model has read
            end = self._tracks[part.seq].end
            self.restore(part.seq, end, None)
        return False
