"""Drafter: guesses of the next tokens by the MTP blocks, which the model then checks in one decode.

MTP block i reads, for every position p, the token at p and the hidden state that the model (or, inside a draft, block
i-1) had at p-1; it guesses the token at p+1. Each block has keys and values of its own, so each must read every row:

    rows of a sequence         backlog: tokens that the model has read since      chain: the last token and the guesses
                               (token p, model's hidden p-1) ...                  (last, model's hidden) (g0, h'0) ...
    block 0                    all                                                last                 -> g0, h'0
    block 1                    all                                                last g0              -> g1, h'1
    block 2                    all                                                last g0 g1           -> g2, h'2

llama.cpp's own driver (common/speculative.cpp) reads the backlog and the chain in separate decodes, six for three
blocks; here they share three. The blocks have a sliding window, so of a long prompt only the last n_swa tokens are
read. What the blocks guess can only cost time: the model's own choice is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepgguf.runtime.llama import mtp_api
from stepgguf.runtime.llama.context import DecodeRows, Floats, LlamaContext
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Attention


@dataclass(frozen=True, slots=True, eq=False)
class DraftState:
    """The MTP blocks' cells of a sequence of n_tokens, and the model's hidden state at the last of them."""

    n_tokens: int
    cells: bytearray
    hidden: Floats

    @property
    def n_bytes(self) -> int:
        return len(self.cells) + self.hidden.nbytes


@dataclass
class _Backlog:
    """The tokens of a sequence that the MTP blocks have not read yet, from position `start` on. All before are in their
    cells, as far as the sliding window reaches.

    hidden: the model's at the last position, [n_embd]. rows: the hidden state to go in beside each token, [n, n_embd]
    each, together one row a token.
    """

    hidden: Floats
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    rows: list[Floats] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def joined_rows(self) -> Floats:
        """Return all rows as one array, [len(tokens), n_embd]."""
        if len(self.rows) != 1:
            self.rows = [np.concatenate(self.rows)] if self.rows else [np.zeros((0, len(self.hidden)), np.float32)]
        return self.rows[0]

    def drop(self, n: int) -> None:
        """Forget the first n tokens: they have been read, or are out of reach."""
        self.rows = [self.joined_rows()[n:]]
        self.start, self.tokens = self.start + n, self.tokens[n:]


class Drafter:
    """The MTP blocks' context beside the model's, and what they have to read.

    enabled: False while the model drafts nothing; then no state is saved, for that would make them read first.
    """

    def __init__(
        self, model: LlamaModel, target: LlamaContext, *, n_seq: int, threads: int, attention: Attention
    ) -> None:
        """Make the context of the MTP blocks of `model`. `target` is the context of the model whose tokens are
        guessed."""
        self._n_embd, self.n_mtp, self._n_swa = model.n_embd, model.n_mtp, model.n_swa
        self._context = LlamaContext(
            model,
            n_ctx=target.n_ctx,
            n_seq=n_seq,
            n_batch=target.n_batch,
            n_outputs=n_seq,
            threads=threads,
            attention=attention.of_mtp,
            drafts_for=target,
        )
        mtp_api.keep_hidden_states(target.handle, outputs_only=False)
        mtp_api.keep_hidden_states(self._context.handle, outputs_only=True)
        self._backlogs = {seq: _Backlog(self._zeros()) for seq in range(n_seq)}
        # A draft decodes backlog and chain of all sequences together, and a chain has up to n_mtp rows.
        self._most_backlog = target.n_batch // n_seq - self.n_mtp
        self.enabled = True

    def close(self) -> None:
        self._context.close()

    def _zeros(self) -> Floats:
        return np.zeros(self._n_embd, np.float32)

    # following the model ----------------------------------------------------------------------------------------

    def observe(self, seq: int, start: int, tokens: Sequence[int], hidden: Floats) -> None:
        """Take note that the model has read tokens at positions from start on; hidden [len(tokens), n_embd] is what it
        had there."""
        backlog = self._backlogs[seq]
        assert backlog.end == start
        # Beside each token goes the hidden state of the position before it: the rows are shifted by one.
        rows = np.empty((len(tokens), self._n_embd), np.float32)
        rows[0], rows[1:] = backlog.hidden, hidden[: len(tokens) - 1]
        backlog.hidden = hidden[len(tokens) - 1].copy()
        backlog.tokens += tokens
        backlog.rows.append(rows)
        if len(backlog.tokens) > 2 * self._n_swa:  # not each time: dropping copies all rows
            backlog.drop(len(backlog.tokens) - self._n_swa)

    def clear(self, seq: int) -> None:
        """Take note that the sequence is empty now."""
        self._context.remove(seq, 0)
        self._backlogs[seq] = _Backlog(self._zeros())

    def save(self, seq: int) -> DraftState | None:
        """Return the state of a sequence where the model is now. None while it is not used, or if there is no room to
        read the backlog."""
        backlog = self._backlogs[seq]
        if not self.enabled or not self._read_backlogs([seq], 0):
            return None
        return DraftState(backlog.start, self._context.save(seq, sliding_window_only=False), backlog.hidden.copy())

    def restore(self, seq: int, n_tokens: int, state: DraftState | None) -> None:
        """Take note that the sequence now has n_tokens, and put their state back.

        Without a state the blocks start from there with nothing behind them: they guess badly until they have read some
        more.
        """
        self.clear(seq)
        backlog = self._backlogs[seq]
        backlog.start = n_tokens
        if state is None or not self._context.restore(seq, state.cells, sliding_window_only=False):
            return
        self._context.remove(seq, n_tokens)
        if state.n_tokens == n_tokens:
            backlog.hidden = state.hidden.copy()

    # drafting ---------------------------------------------------------------------------------------------------

    def draft(self, last: dict[int, int], depth: int) -> dict[int, list[int]]:
        """Guess what follows: sequence -> its last token, which the model has not read -> up to depth guesses.

        Every block reads the backlogs, also those deeper than `depth`, which then guess nothing: they may be asked in
        the next step. Their cells of the chain are dropped again, because the guesses may be wrong.
        """
        guesses: dict[int, list[int]] = {seq: [] for seq in last}
        if not self._read_backlogs(list(last), self._most_backlog):
            return guesses
        chains = {seq: self._backlogs[seq].hidden[None] for seq in last}
        for block in range(self.n_mtp):
            guessing = block < depth
            rows = [self._rows(seq, [token, *guesses[seq]], chains[seq], guessing) for seq, token in last.items()]
            if not self._decode(block, [r for r in rows if r.tokens]):
                return {seq: [] for seq in last}
            if guessing:
                self._take_guesses(rows, guesses, chains)
        for seq in last:
            backlog = self._backlogs[seq]
            backlog.drop(len(backlog.tokens))
            self._context.remove(seq, backlog.start)
        return guesses

    def _rows(self, seq: int, chain: list[int], hidden: Floats, guessing: bool) -> DecodeRows:
        """Return the backlog of a sequence and, if a guess is wanted, the chain, whose last row gets logits."""
        backlog = self._backlogs[seq]
        if not guessing:
            return DecodeRows(seq, backlog.start, backlog.tokens, 0, backlog.joined_rows())
        both = np.concatenate([backlog.joined_rows(), hidden])
        return DecodeRows(seq, backlog.start, backlog.tokens + chain, 1, both)

    def _take_guesses(self, rows: list[DecodeRows], guesses: dict[int, list[int]], chains: dict[int, Floats]) -> None:
        """Add the most likely token of each sequence to its guesses, and its hidden state to the chain."""
        last_row = -1
        for part in rows:
            last_row += len(part.tokens)
            guesses[part.seq].append(int(self._context.logits(last_row).argmax()))
            chains[part.seq] = np.concatenate([chains[part.seq], self._context.hidden_states(last_row, 1)])

    def _read_backlogs(self, seqs: list[int], most: int) -> bool:
        """Let the blocks read until at most so many tokens are left in each backlog. False: there was no room."""
        for seq in seqs:
            backlog = self._backlogs[seq]
            if len(backlog.tokens) > self._n_swa:
                backlog.drop(len(backlog.tokens) - self._n_swa)
            # The blocks may have dropped tokens that they never read; llama.cpp wants positions without gaps.
            if 0 <= self._context.newest_position(seq) + 1 < backlog.start:
                self._context.remove(seq, 0)
            while len(backlog.tokens) > most:
                n = min(len(backlog.tokens), self._context.n_batch)
                part = DecodeRows(seq, backlog.start, backlog.tokens[:n], 0, backlog.joined_rows()[:n])
                if not all(self._decode(block, [part]) for block in range(self.n_mtp)):
                    return False
                backlog.drop(n)
        return True

    def _decode(self, block: int, rows: list[DecodeRows]) -> bool:
        """Run one block on rows of several sequences. False: it failed, and they have no backlog any more."""
        if not rows:
            return True
        for part in rows:  # all blocks decode the same positions in turn, and llama.cpp must not hold one twice
            self._context.remove(part.seq, part.start)
        mtp_api.use_mtp_block(self._context.handle, block)
        if self._context.decode(rows) == 0:
            return True
        for part in rows:  # no room, or worse: the blocks start anew behind what the model has read
            self.restore(part.seq, self._backlogs[part.seq].end, None)
        return False
