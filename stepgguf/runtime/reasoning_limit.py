"""When a request's thinking must be closed: its budget is used up, or it repeats itself. Every engine asks here."""

from __future__ import annotations

from stepgguf.runtime.engine import Reasoning, Timings
from stepgguf.runtime.loops import LoopDetector


class ReasoningLimit:
    """Counts the tokens of the thinking. What must be forced is handed out once, while the thinking is open."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._reasoning = reasoning
        self._n = 0
        self._waiting = reasoning.opening is not None  # for the first token, which may open it
        self._open, self._closing = not self._waiting, False
        self._loops = LoopDetector() if reasoning.break_loops else None

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def n_left(self) -> int | None:
        """Tokens until the budget is used up; None: no limit holds (any more)."""
        if self._reasoning.budget is None or not self._open or self._closing:
            return None
        return self._reasoning.budget - self._n

    def feed(self, token: int, timings: Timings) -> tuple[int, ...]:
        """Take a token. What is to be forced after it, usually nothing."""
        if self._waiting:
            self._waiting, self._open = False, token == self._reasoning.opening
            return ()
        if not self._open:
            return ()
        if token in self._reasoning.ends:
            self._open = False
            return ()
        self._n += 1
        if self._loops is not None and self._loops.feed(token):
            closing = self.close()
            timings.loop_broken |= bool(closing)
            return closing
        return self.check_budget(timings)

    def check_budget(self, timings: Timings) -> tuple[int, ...]:
        """The closing tokens if the budget is used up. A budget of 0 is, before the first token."""
        if self.n_left is None or self.n_left > 0:
            return ()
        timings.budget_reached = True
        return self.close()

    def close(self) -> tuple[int, ...]:
        """The closing tokens, once, while the thinking is open."""
        if not self._open or self._closing:
            return ()
        self._closing = True
        return self._reasoning.closing
