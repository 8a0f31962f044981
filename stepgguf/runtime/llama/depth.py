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
NEW_STEP_WEIGHT = 0.1  # in the averages, which so forget what is long ago
LEAST_GAIN = 1.02  # by so much must another depth be better, or the choice would flutter


@dataclass
class _DepthRate:
    """Averages of the steps at one depth, over n of them."""

    tokens: float = 0.0
    seconds: float = 0.0
    n: int = 0

    def add(self, tokens: float, seconds: float) -> None:
        self.n += 1
        weight = max(NEW_STEP_WEIGHT, 1 / self.n)
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _BatchSizeTuner:
    """Chooses the depth for one size of batch: see DepthTuner.

    In turn: the best depth for BETWEEN_TRIALS steps, then another one for TRIAL_STEPS.
    """

    def __init__(self, deepest: int) -> None:
        self.rates = [_DepthRate() for _ in range(deepest + 1)]
        self._best = deepest
        self._steps = 0
        self._trial: int | None = None
        self._n_trials = 0
        self._last_depth: int | None = None

    def record(self, depth: int, tokens: int, seconds: float) -> None:
        if depth == self._last_depth:  # the first step at a new depth pays for what the MTP blocks have not read
            self.rates[depth].add(tokens, seconds)
        self._last_depth = depth

    def depth(self) -> int:
        # First each depth, the deepest first: while nothing is known, drafting is the better guess.
        for depth in reversed(range(len(self.rates))):
            if self.rates[depth].n < FIRST_STEPS:
                return depth
        self._steps += 1
        phase = self._steps % (BETWEEN_TRIALS + TRIAL_STEPS)
        if phase < BETWEEN_TRIALS:
            self._trial = None
            best = max(range(len(self.rates)), key=lambda d: self.rates[d].tokens_per_second)
            if self.rates[best].tokens_per_second > LEAST_GAIN * self.rates[self._best].tokens_per_second:
                self._best = best
            return self._best
        if self._trial is None:
            others = [d for d in range(len(self.rates)) if d != self._best]
            self._n_trials += 1
            self._trial = others[self._n_trials % len(others)]
        return self._trial


class DepthTuner:
    """Ask for the `depth` before a step of n requests, and `record` what the step brought.

    deepest: how many MTP blocks there are. With `fixed` the depth is always that.
    """

    def __init__(self, deepest: int, fixed: int | None = None) -> None:
        self._deepest, self.fixed = deepest, fixed
        self._tuners: dict[int, _BatchSizeTuner] = {}

    def depth(self, n_requests: int) -> int:
        """Return how many tokens to draft in a step of n requests."""
        return self._tuner(n_requests).depth() if self.fixed is None else min(self.fixed, self._deepest)

    def record(self, n_requests: int, depth: int, tokens: int, seconds: float) -> None:
        """Take note of a step of n requests: its depth, the tokens that all of them got, and its seconds."""
        self._tuner(n_requests).record(depth, tokens, seconds)

    def _tuner(self, n_requests: int) -> _BatchSizeTuner:
        size = n_requests.bit_length()  # 1, 2-3, 4-7, ...
        if size not in self._tuners:
            self._tuners[size] = _BatchSizeTuner(self._deepest)
        return self._tuners[size]
