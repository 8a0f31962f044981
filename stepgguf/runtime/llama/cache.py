"""Which tokens stay where: in the context's sequences, or put away in the store; and where a new prompt starts.

a new prompt       goes on in the sequence, or from the stored one, that saves it the most reading
a sequence         is kept when its request ends; the one used longest ago gives way to a prompt that needs a place,
                   or to requests that need its cells, and is put away
the store          takes what is put away, in RAM and then on disk
RAM                one bound for the store and for the saved states of the sequences
"""

from __future__ import annotations

from stepgguf.runtime.llama.sequence_file import StoredSequence
from stepgguf.runtime.llama.sequences import ContextSequence, ContextSequences, TokenArray
from stepgguf.runtime.llama.store import SequenceStore

# An idle sequence is taken over by a prompt that goes on from at least so much of it. Of a smaller part (a system
# prompt that both share) another sequence takes a copy, so that the rest is not lost.
LEAST_REUSED_SHARE = 0.5


class SequenceCache:
    """The sequences of a context and the store behind them."""

    def __init__(self, sequences: ContextSequences, store: SequenceStore) -> None:
        self.sequences, self._store = sequences, store
        self._context, self._drafter = sequences.context, sequences.drafter

    @property
    def n_context_used(self) -> int:
        """Tokens that the sequences hold."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def n_bytes(self) -> int:
        """RAM that is taken beside the context."""
        return self._store.n_bytes + self._saved_bytes

    @property
    def _saved_bytes(self) -> int:
        return sum(sequence.saved_bytes for sequence in self.sequences)

    @property
    def all_busy(self) -> bool:
        """Whether a request is in every sequence of the context."""
        return all(sequence.busy for sequence in self.sequences)

    def most_reusable(self, prompt: TokenArray) -> int:
        """Return how many tokens of the prompt the sequences of the context save it at most."""
        return max(self.sequences.start_point(sequence, prompt).n_tokens for sequence in self.sequences)

    def place(self, prompt: TokenArray) -> ContextSequence:
        """Return an idle sequence, brought to the position from which the least of the prompt has to be read."""
        starts = {sequence: self.sequences.start_point(sequence, prompt) for sequence in self.sequences}
        source = max(starts, key=lambda s: (starts[s].n_tokens, not s.busy))
        start = starts[source]
        stored = self._store.take_best(prompt, self.sequences.n_swa, start.n_tokens)
        others = [s for s in starts if not s.busy and (s is not source or start.n_tokens == 0)]
        mostly_reused = start.n_tokens >= LEAST_REUSED_SHARE * len(source)
        if stored is None and start.n_tokens and not source.busy and (mostly_reused or not others):
            if not mostly_reused:
                self.put_away(source)
            self.sequences.rewind(source, start)
            return source
        # An empty sequence, or else the one used longest ago.
        target = min(others or [source], key=lambda s: (len(s) > 0, s.last_used))
        self.put_away(target)
        self.sequences.clear(target)
        if stored is not None:
            self._bring_back(target, stored, prompt)
        elif (start := self.sequences.fork_point(source, prompt)).n_tokens and source is not target:
            self.sequences.fork(source, start, target)
        return target

    def _bring_back(self, target: ContextSequence, stored: StoredSequence, prompt: TokenArray) -> None:
        """Fill an empty sequence with a stored one, up to where the prompt departs. Without room it stays empty."""
        restored = self._context.restore(target.id, stored.cells, sliding_window_only=False)
        if not restored or self._context.newest_position(target.id) != len(stored.tokens) - 1:
            self.sequences.clear(target)
            return
        target.extend(stored.tokens)
        target.saved_states = stored.saved_states
        if self._drafter:
            self._drafter.restore(target.id, len(target), stored.draft)
        self.sequences.rewind(target, self.sequences.start_point(target, prompt))

    def put_away(self, sequence: ContextSequence) -> None:
        """Copy a sequence into the store, if that can hold it. The sequence itself stays as it is."""
        if not len(sequence) or not self._store.can_hold(self._context.n_bytes(sequence.id)):
            return
        # llama.cpp still has cells that the sliding window has left, but does not save them
        oldest = max(self._context.oldest_position(sequence.id), len(sequence) - self.sequences.n_swa)
        draft = self._drafter.save(sequence.id) if self._drafter else None
        cells = self._context.save(sequence.id, sliding_window_only=False)
        self._store.put(StoredSequence(sequence.tokens.copy(), cells, draft, list(sequence.saved_states), oldest))

    def put_all_away(self) -> None:
        """Save what all sequences hold, before the context goes."""
        for sequence in self.sequences:
            self.put_away(sequence)

    def free_idle(self) -> bool:
        """Put the sequence away that is idle for the longest time, and free its cells. False: none is idle."""
        idle = [s for s in self.sequences if not s.busy and len(s)]
        if not idle:
            return False
        sequence = min(idle, key=lambda s: s.last_used)
        self.put_away(sequence)
        self.sequences.clear(sequence)
        return True

    def save_state(self, sequence: ContextSequence) -> None:
        """Make a saved state of a sequence where it is now, under the bound of RAM: for that first the store gives
        way, then the oldest saved states, of a sequence that has others before one that has not."""
        self.sequences.save_state(sequence)
        self._store.shrink(self._saved_bytes)
        while self._saved_bytes > self._store.ram_bytes:
            holders = [s for s in self.sequences if s.saved_states]
            holder = min(holders, key=lambda s: (len(s.saved_states) == 1, s.last_used))
            holder.saved_states.pop(0)
