"""Second moments of what a product is given, in a quantized model beside the exact one.

A layer behind quantized layers is given x~ where the exact model has x. Its weights W are to be chosen as q, so that
q x~ comes near W x. Over the calibration tokens, each weighing w,

    sum w |W x - q x~|^2 = (T - q) H (T - q)^T + const      H = sum w x~ x~^T
                                                            T = W + W C H^-1,   C = sum w (x - x~) x~^T

so two sums are all that is needed of any number of tokens. T is taken with a ridge added to H, more where there are few
tokens: with few, C is mostly chance.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepgguf.quants.second_moments import SecondMoments, factor_moments

DAMPING = 0.05  # of H's mean diagonal
RIDGE = 0.5  # of H's mean diagonal, in T: with 0.1, tokens unlike the text lose more
FLOOR = 1e-6  # of the mean importance, to each channel's
THIN = 512  # tokens at which the ridge is twice as large


class PairMoments:
    """The sums H and C [columns, columns] over n tokens, which weigh `total` together. Threads may share it.

    n counts tokens of a pool, too, where there are some (pooled_with, own_with); n_own does not.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.second = torch.zeros(columns, columns, device=device)
        self.cross = torch.zeros(columns, columns, device=device)
        self.squares = torch.zeros(columns, device=device)  # of x~, every token alike: what importance is
        self.n, self.n_own, self.total = 0.0, 0, 0.0
        self._lock = threading.Lock()
        self._factored: SecondMoments | None = None
        self._ridge_root: Tensor | None = None

    def add(self, quantized: Tensor, exact: Tensor, weights: Tensor) -> None:
        """Count tokens [n, columns] that weigh `weights` [n]."""
        weighted = quantized * weights[:, None]
        self.second += weighted.T @ quantized
        self.cross += (exact - quantized).T @ weighted
        self.squares += quantized.square().sum(0)
        self.n, self.n_own = self.n + len(quantized), self.n_own + len(quantized)
        self.total += float(weights.sum())

    def pooled_with(self, pool: PairMoments, n_tokens: float) -> PairMoments:
        """These moments and n_tokens more of a pool's."""
        return self._plus(pool.second / max(pool.total, 1e-30), pool.squares / max(pool.n, 1), n_tokens)

    def own_with(self, n_tokens: float) -> PairMoments:
        """These moments and n_tokens more whose channels are independent, for what no other expert has.

        Of such tokens the own diagonal is believed as far as own tokens made it, and its mean for the rest. Without
        any own tokens all channels are alike.
        """
        mine = self.second.diagonal() / max(self.total, 1e-30)
        share = self.n / (self.n + n_tokens)
        mean_squares = self.importance()
        return self._plus(
            torch.diag(mine * share + mine.mean() * (1 - share)),
            mean_squares * share + mean_squares.mean() * (1 - share),
            n_tokens,
        )

    def _plus(self, mean_second: Tensor, mean_squares: Tensor, n_tokens: float) -> PairMoments:
        result = PairMoments(0, self.second.device)
        weight = n_tokens * (self.total / self.n if self.n else 1.0)
        result.second, result.cross = self.second + weight * mean_second, self.cross
        result.squares = self.squares + n_tokens * mean_squares
        result.n, result.n_own, result.total = self.n + n_tokens, self.n_own, self.total + weight
        return result

    def factored(self) -> SecondMoments:
        """H, ready to quantize against. Matrices share it."""
        with self._lock:
            if self._factored is None:
                self._factored = factor_moments(self.second.cpu().numpy(), DAMPING)
            return self._factored

    def target(self, weights: Tensor) -> Tensor:
        """T of weights [rows, columns]; the weights themselves where no token was counted."""
        if not self.n_own:
            return weights
        with self._lock:
            if self._ridge_root is None:
                h = self.second.clone()
                h.diagonal().add_(RIDGE * (1 + THIN / self.n_own) * h.diagonal().mean() + 1e-30)
                self._ridge_root = torch.linalg.cholesky(h)
        return weights + torch.cholesky_solve((weights @ self.cross).T, self._ridge_root).T

    def importance(self) -> Tensor:
        """The mean x~^2 of each channel, and a little: encoders make zeros of a block that weighs nothing."""
        if not self.squares.any():
            return torch.ones_like(self.squares)
        mean = self.squares / self.n
        return mean + FLOOR * mean.mean()


@dataclass(frozen=True, eq=False, slots=True)
class TokenSample:
    """Tokens that were held out of the moments: x~ and x [n, columns], and what they weigh, [n]."""

    quantized: Tensor
    exact: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, samples: Sequence[TokenSample]) -> TokenSample:
        """All their tokens."""
        columns = zip(*((sample.quantized, sample.exact, sample.weights) for sample in samples), strict=True)
        return cls(*(torch.cat(values) for values in columns))

    def believed(self, weights: Tensor, target: Tensor) -> Tensor:
        """As far from the weights [rows, columns] to their target as these tokens would have it, before any rounding.

        The point on the way between the two that has the least error.
        """
        missing = (self.exact - self.quantized) @ weights.T
        moved = self.quantized @ (target - weights).T
        most = float((moved.square().sum(1) * self.weights).sum())
        share = float(((missing * moved).sum(1) * self.weights).sum()) / most if most else 0.0
        return torch.lerp(weights, target, min(1.0, max(0.0, share)))

    def error(self, weights: Tensor, q: Tensor) -> float:
        """sum w |W x - q x~|^2 for weights and their quantized values [rows, columns]."""
        difference = self.exact @ weights.T - self.quantized @ q.T
        return float((difference.square().sum(1) * self.weights).sum())
