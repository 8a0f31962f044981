"""How many tokens to draft: the depth that has brought the most tokens a second, 0 included.

Nothing is modelled: tokens and seconds of the steps at each depth are averaged, forgetting slowly, separately for each
number of requests in the batch (what a drafted row costs depends on it). Now and then another depth is tried for a few
steps, so a change of subject, of machine load or of context length is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_STEPS = 4  # at each depth before any comparison
BETWEEN_TRIALS = 90
TRIAL_STEPS = 6
FORGET = 0.1  # weight of a new step in the averages
MARGIN = 1.02  # by so much must another depth be better


@dataclass
class _Rate:
    tokens: float = 0.0
    seconds: float = 0.0
    n: int = 0

    def add(self, tokens: float, seconds: float) -> None:
        self.n += 1
        weight = max(FORGET, 1 / self.n)
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _Tuner:
    """For one size of batch."""

    def __init__(self, deepest: int) -> None:
        self.rates = [_Rate() for _ in range(deepest + 1)]
        self._best = deepest
        self._steps = 0
        self._trial: int | None = None
        self._n_trials = 0
        self._last: int | None = None

    def record(self, depth: int, tokens: int, seconds: float) -> None:
        if depth == self._last:  # the first step at a new depth pays for what the heads have not read
            self.rates[depth].add(tokens, seconds)
        self._last = depth

    def depth(self) -> int:
        for depth in reversed(range(len(self.rates))):
            if self.rates[depth].n < FIRST_STEPS:
                return depth
        self._steps += 1
        phase = self._steps % (BETWEEN_TRIALS + TRIAL_STEPS)
        if phase < BETWEEN_TRIALS:
            self._trial = None
            best = max(range(len(self.rates)), key=lambda d: self.rates[d].value)
            if self.rates[best].value > MARGIN * self.rates[self._best].value:
                self._best = best
            return self._best
        if self._trial is None:
            others = [d for d in range(len(self.rates)) if d != self._best]
            self._n_trials += 1
            self._trial = others[self._n_trials % len(others)]
        return self._trial


class DepthTuner:
    """`depth` before a step of n requests, `record` after it. With `fixed` the depth is always that."""

    def __init__(self, deepest: int, fixed: int | None = None) -> None:
        self._deepest, self.fixed = deepest, fixed
        self._tuners: dict[int, _Tuner] = {}

    def depth(self, n_requests: int) -> int:
        return self._tuner(n_requests).depth() if self.fixed is None else min(self.fixed, self._deepest)

    def record(self, n_requests: int, depth: int, tokens: int, seconds: float) -> None:
        self._tuner(n_requests).record(depth, tokens, seconds)

    def _tuner(self, n_requests: int) -> _Tuner:
        size = n_requests.bit_length()  # 1, 2-3, 4-7, ...
        if size not in self._tuners:
            self._tuners[size] = _Tuner(self._deepest)
        return self._tuners[size]
