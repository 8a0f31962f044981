"""llama-perplexity's statistics over the scores of all predictions (tools/perplexity, kl_divergence).

    mean x           sum x / n                    error  sqrt((E[x^2] - E[x]^2) / (n - 1)); 0 for n <= 10
    perplexity       exp(mean nll)                       perplexity * error of the mean
    ln ratio         mean nll - mean nll_base            sqrt(a^2 + b^2 - 2 cov), since both saw the same text
    RMS of delta p   sqrt(mean delta_p^2)                0.5 / RMS * error of the mean
    same top         share s                             sqrt(s (1 - s) / (n - 1))
    by rows          sum over rows r of (sum over r of x - n_r mean x)^2 = v:    sqrt(v R / (R - 1)) / n
    quantile f       between the two values around place f (n - 1), linearly, in float32

llama-perplexity takes predictions as independent, but those of one dialogue share what it is about. `error_by_rows` is
what resampling whole rows, R of them, comes to (for a mean of all, the linearized form): what another set of dialogues
may differ by. It is ours, and llama-perplexity has nothing like it.

Squares and products of float32 scores are taken in float32 and summed in float64, as llama-perplexity does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepgguf.evaluation.scores import Scores
from stepgguf.evaluation.softmax import Floats

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a file is from the reference, over n predictions. kld and ln_ratio are in nats.

    ppl, ppl_base: of the file and of the reference. ln_ratio: ln(ppl / ppl_base).
    correlation: of the two mean nll; None if one does not vary.
    kld_quantiles: by the share of predictions below. delta_p_rms, same_top: shares of 1.
    """

    n: int
    ppl: Estimate
    ppl_base: Estimate
    ln_ratio: Estimate
    correlation: float | None
    kld: Estimate
    kld_min: float
    kld_median: float
    kld_max: float
    kld_quantiles: dict[float, float]
    delta_p_rms: Estimate
    same_top: Estimate


def divergence(scores: Scores) -> Divergence:
    """Return the statistics of the scores of at least 100 predictions."""
    n = len(scores.kld)
    nll, nll_base = _mean(scores.nll), _mean(scores.nll_base)
    covariance = _covariance(scores.nll, scores.nll_base)
    variance = nll.error**2 + nll_base.error**2 - 2.0 * covariance
    kld = np.sort(scores.kld)
    return Divergence(
        n=n,
        ppl=_exponential(nll),
        ppl_base=_exponential(nll_base),
        ln_ratio=Estimate(nll.value - nll_base.value, math.sqrt(max(0.0, variance))),
        correlation=covariance / (nll.error * nll_base.error) if nll.error and nll_base.error else None,
        kld=_mean_of_wide(scores.kld),
        kld_min=float(kld[0]),
        kld_median=float(np.float32(0.5) * (kld[n // 2] + kld[(n - 1) // 2])),
        kld_max=float(kld[-1]),
        kld_quantiles={fraction: _quantile(kld, fraction) for fraction in QUANTILES},
        delta_p_rms=_root_mean_square(scores.delta_p),
        same_top=_share(scores.same_top),
    )


def error_by_rows(values: Floats, lengths: Sequence[int]) -> float:
    """Return the standard error of the mean of values [n] that come from rows of these lengths; 0 for one row."""
    n_rows, n = len(lengths), len(values)
    if n_rows < 2:
        return 0.0
    excess = values - values.mean(dtype=np.float64)
    by_row = np.bincount(np.repeat(np.arange(n_rows), lengths), excess)
    return math.sqrt(np.square(by_row).sum() * n_rows / (n_rows - 1)) / n


def _estimate(total: float, squares: float, n: int) -> Estimate:
    mean = total / n
    variance = squares / n - mean**2
    return Estimate(mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0)


def _sum(values: Floats) -> float:
    return float(values.sum(dtype=np.float64))


def _mean(values: Floats) -> Estimate:
    return _estimate(_sum(values), _sum(values * values), len(values))


def _mean_of_wide(values: Floats) -> Estimate:
    """The mean of what is squared in float64."""
    return _estimate(_sum(values), float(np.square(values, dtype=np.float64).sum()), len(values))


def _covariance(a: Floats, b: Floats) -> float:
    """The covariance of the two means."""
    n = len(a)
    return (_sum(a * b) / n - (_sum(a) / n) * (_sum(b) / n)) / (n - 1)


def _exponential(mean: Estimate) -> Estimate:
    return Estimate(math.exp(mean.value), math.exp(mean.value) * mean.error)


def _root_mean_square(values: Floats) -> Estimate:
    square = _mean_of_wide(values * values)
    root = math.sqrt(square.value)
    return Estimate(root, 0.5 / root * square.error if root else 0.0)


def _share(flags: np.typing.NDArray[np.bool_]) -> Estimate:
    share = float(flags.mean())
    return Estimate(share, math.sqrt(share * (1.0 - share) / (len(flags) - 1)))


def _quantile(ordered: Floats, fraction: float) -> float:
    """The value at a share of the places of ordered values, between its neighbours linearly, all in float32."""
    place = np.float32(fraction) * np.float32(len(ordered) - 1)
    below = int(place)
    part = place - np.float32(below)
    above = min(below + 1, len(ordered) - 1)
    return float((np.float32(1) - part) * ordered[below] + part * ordered[above])
