"""ReasoningLimit: when reasoning must be closed. Every engine asks here.

    waiting ──opening──> open ──an end──> closed          the answer may start with the token that opens it
       └──another token──> closed
    open    ──budget used up, a loop, `close`──> closing tokens, once, of which one is an end

It only says what must be closed and with which tokens; putting them is the engine's.
"""

from __future__ import annotations

from stepgguf.runtime.engine import Reasoning, Timings
from stepgguf.runtime.loops import LoopDetector


class ReasoningLimit:
    """Counts the tokens of the reasoning of one answer. The closing tokens are handed out once, while it is open."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._reasoning = reasoning
        self._n_tokens = 0
        self._waiting = reasoning.opening is not None
        self._open, self._closing = not self._waiting, False
        self._loops = LoopDetector() if reasoning.break_loops else None

    @property
    def is_open(self) -> bool:
        """Whether the answer is in its reasoning."""
        return self._open

    @property
    def n_left(self) -> int | None:
        """Tokens until the budget is used up; None: no limit holds (any more)."""
        if self._reasoning.budget is None or not self._open or self._closing:
            return None
        return self._reasoning.budget - self._n_tokens

    def feed(self, token_id: int, timings: Timings) -> tuple[int, ...]:
        """Take the next token, sampled or forced, and return the tokens that must come after it, usually none.

        The timings are told how much reasoning there was, and why it was closed.
        """
        if self._waiting:
            self._waiting, self._open = False, token_id == self._reasoning.opening
            return ()
        if not self._open:
            return ()
        if token_id in self._reasoning.ends:
            self._open = False
            return ()
        self._n_tokens += 1
        timings.n_reasoning += not self._closing
        if self._loops is not None and self._loops.feed(token_id):
            closing = self.close()
            timings.loop_broken |= bool(closing)
            return closing
        return self.check_budget(timings)

    def check_budget(self, timings: Timings) -> tuple[int, ...]:
        """Return the closing tokens if the budget is used up. Ask before the first token too: 0 is used up then."""
        if self.n_left is None or self.n_left > 0:
            return ()
        timings.budget_reached = True
        return self.close()

    def close(self) -> tuple[int, ...]:
        """Return the closing tokens, once, while the reasoning is open. `feed` must still be told of them."""
        if not self._open or self._closing:
            return ()
        self._closing = True
        return self._reasoning.closing
