"""What the sequences of the context hold, and from where a new prompt can go on.

The full-attention layers keep every position of a sequence; the sliding-window layers keep the last ones only. To go
on from position n the positions [n - n_swa, n) must be there in both:

    tokens     0 ........................ n ............ end         the sequence
    full       #######################################
    window                            ##################             from `oldest` on
               go on from n: the window must reach back to n - n_swa, or else a checkpoint at or before n is restored

A checkpoint is a copy of the window at one position, with the MTP heads' state. It is made at every start of a user
message and near the end of the prompt, because the template drops old thinking: the next prompt always departs there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepgguf.runtime.llama.context import Context
from stepgguf.runtime.llama.mtp import Drafter, DraftState

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The window after n tokens."""

    n: int
    window: bytearray
    draft: DraftState | None

    @property
    def n_bytes(self) -> int:
        return len(self.window) + (self.draft.n_bytes if self.draft else 0)


class Sequence:
    """One of the context's sequences: the tokens that it holds, and its checkpoints, oldest first."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.busy = False
        self.last_used = 0.0
        self.checkpoints: list[Checkpoint] = []
        self._tokens = np.zeros(1024, np.int32)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def tokens(self) -> TokenArray:
        """A view."""
        return self._tokens[: self._n]

    @property
    def checkpoint_bytes(self) -> int:
        return sum(c.n_bytes for c in self.checkpoints)

    def extend(self, tokens: Tokens[int] | TokenArray) -> None:
        end = self._n + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(end, np.int32)])
        self._tokens[self._n : end] = tokens
        self._n = end

    def truncate(self, n: int) -> None:
        self._n = n
        self.checkpoints = [c for c in self.checkpoints if c.n <= n]

    def touch(self) -> None:
        self.last_used = time.monotonic()


def common_prefix(a: TokenArray, b: TokenArray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def latest(checkpoints: Tokens[Checkpoint], n: int) -> Checkpoint | None:
    """The last checkpoint at or before n."""
    return max((c for c in checkpoints if 0 < c.n <= n), key=lambda c: c.n, default=None)


@dataclass(frozen=True, slots=True)
class Start:
    """Go on from n; with `restore`, after putting that window back."""

    n: int = 0
    restore: Checkpoint | None = None


class Prefixes:
    """The sequences of one context and its drafter's."""

    def __init__(self, context: Context, drafter: Drafter | None, n_swa: int) -> None:
        self.context, self.drafter, self.n_swa = context, drafter, n_swa
        self.sequences = [Sequence(i) for i in range(context.n_seq)]

    def start(self, sequence: Sequence, prompt: TokenArray) -> Start:
        """Where in the prompt a sequence can go on. The prompt's last token is always read, for its logits."""
        n = common_prefix(sequence.tokens, prompt[:-1])
        if n and not sequence.busy and 0 <= self.context.oldest(sequence.id) <= max(0, n - self.n_swa):
            return Start(n)
        return self.fork_start(sequence, prompt)

    def fork_start(self, sequence: Sequence, prompt: TokenArray) -> Start:
        """Where another sequence could go on from this one's checkpoints."""
        checkpoint = latest(sequence.checkpoints, common_prefix(sequence.tokens, prompt[:-1]))
        return Start(checkpoint.n, checkpoint) if checkpoint else Start()

    def rewind(self, sequence: Sequence, start: Start) -> None:
        """Bring an idle sequence to a start in its own tokens. If there is no room for the window it is emptied."""
        self.context.remove(sequence.id, start.n)
        exact = start.n == len(sequence)
        sequence.truncate(start.n)
        if start.restore and not self.context.restore(sequence.id, start.restore.window, window_only=True):
            self.clear(sequence)
        elif self.drafter and not (exact and start.restore is None):
            self.drafter.restore(sequence.id, start.n, start.restore.draft if start.restore else None)

    def fork(self, source: Sequence, start: Start, target: Sequence) -> None:
        """Give an empty sequence the tokens of another up to a checkpoint; without room it stays empty.

        The full-attention cells are shared. The window is copied: llama.cpp does not reuse window cells that two
        sequences hold, and would run out of them."""
        assert start.restore is not None
        self.context.copy(source.id, target.id, start.n)
        if not self.context.restore(target.id, start.restore.window, window_only=True):
            self.clear(target)
            return
        target.extend(source.tokens[: start.n])
        if self.drafter:
            self.drafter.restore(target.id, start.n, start.restore.draft)
        target.checkpoints = [c for c in source.checkpoints if c.n <= start.n]

    def checkpoint(self, sequence: Sequence) -> Checkpoint:
        draft = self.drafter.save(sequence.id) if self.drafter else None
        return Checkpoint(len(sequence), self.context.save(sequence.id, window_only=True), draft)

    def clear(self, sequence: Sequence) -> None:
        self.context.remove(sequence.id, 0)
        if self.drafter:
            self.drafter.clear(sequence.id)
        sequence.truncate(0)
        sequence.checkpoints = []
