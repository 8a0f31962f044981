"""LoopDetector: finds reasoning that repeats itself, at token level.

A loop of period p is a run of tokens each equal to the one p before it. For every p at once the length of that run
is kept, so a token costs one comparison of vectors. Only exact cycles count, of at least LEAST_TOKENS and four rounds:
a table, a list or a proof by cases varies somewhere in so many tokens, a stuck model does not.
"""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 1024
LEAST_TOKENS = 256
LEAST_ROUNDS = 4


class LoopDetector:
    """Feed it every token of the reasoning. It never forgets: one detector is for one answer."""

    def __init__(self) -> None:
        periods = np.arange(1, LONGEST_PERIOD + 1)
        # Runs that make a loop of each period. The first round has nothing to be equal to, so it does not count.
        self._limits = np.maximum(LEAST_TOKENS, periods * (LEAST_ROUNDS - 1))
        self._run_lengths = np.zeros(LONGEST_PERIOD, np.int64)
        self._recent = np.full(2 * LONGEST_PERIOD, -1, np.int64)  # twice, so that the last ones are always contiguous
        self._n = 0

    def feed(self, token_id: int) -> bool:
        """Take the next token. Returns whether it makes the last tokens a loop."""
        at = self._n % LONGEST_PERIOD
        newest_first = self._recent[at : at + LONGEST_PERIOD][::-1]
        self._run_lengths = (self._run_lengths + 1) * (newest_first == token_id)
        self._recent[at] = self._recent[at + LONGEST_PERIOD] = token_id
        self._n += 1
        return bool((self._run_lengths >= self._limits).any())
