"""What the sequences of the context hold, and from where a new prompt can go on.

The full-attention layers keep every position of a sequence; the layers with a sliding window keep the last ones only.
To go on from position n the positions [n - n_swa, n) must be there in both:

    tokens           0 ........................ n ............ end         the sequence
    full             #######################################
    sliding window                          ##################             from `oldest_position` on
                     go on from n: the sliding window must reach back to n - n_swa,
                                   or else a state that was saved at or before n is restored

A SavedState is a copy of the sliding window at one position, with the MTP blocks' state. It is made at every start of a
user message and near the end of the prompt (see request.py), because the template drops the reasoning of earlier turns:
the next prompt always departs there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepgguf.runtime.llama.context import LlamaContext
from stepgguf.runtime.llama.mtp import Drafter, DraftState

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class SavedState:
    """What the layers with a sliding window, and the MTP blocks, held of a sequence when it had n_tokens."""

    n_tokens: int
    sliding_window: bytearray
    draft: DraftState | None

    @property
    def n_bytes(self) -> int:
        return len(self.sliding_window) + (self.draft.n_bytes if self.draft else 0)


class ContextSequence:
    """One of the context's sequences: the tokens that it holds, and its saved states, oldest first.

    busy: a request is in it. last_used: on the monotonic clock, 0 if never.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        self.busy = False
        self.last_used = 0.0
        self.saved_states: list[SavedState] = []
        self._tokens = np.zeros(1024, np.int32)  # grows by more than is needed: most tokens come one by one
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def tokens(self) -> TokenArray:
        """The tokens in the order of their positions. A view, until the next `extend`."""
        return self._tokens[: self._n]

    @property
    def saved_bytes(self) -> int:
        return sum(state.n_bytes for state in self.saved_states)

    def extend(self, tokens: Sequence[int] | TokenArray) -> None:
        """Take note that the context has read these tokens too."""
        end = self._n + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(end, np.int32)])
        self._tokens[self._n : end] = tokens
        self._n = end

    def truncate(self, n: int) -> None:
        """Take note that the context has forgotten the tokens from n on."""
        self._n = n
        self.saved_states = [state for state in self.saved_states if state.n_tokens <= n]

    def mark_used(self) -> None:
        self.last_used = time.monotonic()


def common_prefix(a: TokenArray, b: TokenArray) -> int:
    """Return how many first tokens are the same in both."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def latest_state(states: Sequence[SavedState], n: int) -> SavedState | None:
    """Return the last state that was saved at or before n tokens."""
    before = (state for state in states if 0 < state.n_tokens <= n)
    return max(before, key=lambda state: state.n_tokens, default=None)


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where a sequence goes on: after n_tokens; with `restore`, after putting that state back."""

    n_tokens: int = 0
    restore: SavedState | None = None


class ContextSequences:
    """The sequences of one context, and of the MTP blocks' context beside it: both are always changed together."""

    def __init__(self, context: LlamaContext, drafter: Drafter | None, n_swa: int) -> None:
        self.context, self.drafter, self.n_swa = context, drafter, n_swa
        self._all = [ContextSequence(i) for i in range(context.n_seq)]

    def __iter__(self) -> Iterator[ContextSequence]:
        return iter(self._all)

    def start_point(self, sequence: ContextSequence, prompt: TokenArray) -> StartPoint:
        """Return where in the prompt a sequence can go on. The prompt's last token is always read, for its logits."""
        n = common_prefix(sequence.tokens, prompt[:-1])
        oldest = self.context.oldest_position(sequence.id)
        if n and not sequence.busy and 0 <= oldest <= max(0, n - self.n_swa):
            return StartPoint(n)
        return self.fork_point(sequence, prompt)

    def fork_point(self, sequence: ContextSequence, prompt: TokenArray) -> StartPoint:
        """Return where another sequence could go on from this one's saved states."""
        state = latest_state(sequence.saved_states, common_prefix(sequence.tokens, prompt[:-1]))
        return StartPoint(state.n_tokens, state) if state else StartPoint()

    def rewind(self, sequence: ContextSequence, start: StartPoint) -> None:
        """Bring an idle sequence to a start in its own tokens. Without room for the sliding window it is emptied."""
        self.context.remove(sequence.id, start.n_tokens)
        nothing_removed = start.n_tokens == len(sequence)
        sequence.truncate(start.n_tokens)
        if start.restore and not self._restore_sliding_window(sequence, start.restore):
            self.clear(sequence)
        elif self.drafter and not (nothing_removed and start.restore is None):
            self.drafter.restore(sequence.id, start.n_tokens, start.restore.draft if start.restore else None)

    def fork(self, source: ContextSequence, start: StartPoint, target: ContextSequence) -> None:
        """Give an empty sequence the tokens of another up to a saved state; without room it stays empty.

        The full-attention cells are shared. The sliding window is copied: llama.cpp does not reuse cells of a window
        that two sequences hold, and would run out of them.
        """
        assert start.restore is not None
        self.context.share(source.id, target.id, start.n_tokens)
        if not self._restore_sliding_window(target, start.restore):
            self.clear(target)
            return
        target.extend(source.tokens[: start.n_tokens])
        if self.drafter:
            self.drafter.restore(target.id, start.n_tokens, start.restore.draft)
        target.saved_states = [state for state in source.saved_states if state.n_tokens <= start.n_tokens]

    def save_state(self, sequence: ContextSequence) -> None:
        """Add a saved state for the position where the sequence is now."""
        draft = self.drafter.save(sequence.id) if self.drafter else None
        sliding_window = self.context.save(sequence.id, sliding_window_only=True)
        sequence.saved_states.append(SavedState(len(sequence), sliding_window, draft))

    def clear(self, sequence: ContextSequence) -> None:
        """Forget everything that the sequence holds."""
        self.context.remove(sequence.id, 0)
        if self.drafter:
            self.drafter.clear(sequence.id)
        sequence.truncate(0)
        sequence.saved_states = []

    def _restore_sliding_window(self, sequence: ContextSequence, state: SavedState) -> bool:
        return self.context.restore(sequence.id, state.sliding_window, sliding_window_only=True)
