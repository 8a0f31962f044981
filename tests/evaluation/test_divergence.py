"""Statistics against numpy's own, where llama-perplexity's definition is a known one."""

from __future__ import annotations

import numpy as np
import pytest

from stepgguf.evaluation.divergence import QUANTILES, Divergence, divergence, error_by_rows
from stepgguf.evaluation.scores import Scores

RNG = np.random.default_rng(0)
N = 1001


def made(n: int) -> Scores:
    nll = RNG.gamma(2.0, 2.0, n)
    nll_base = 0.9 * nll + RNG.normal(0, 0.3, n)
    wide = (nll, nll_base, RNG.exponential(0.1, n), RNG.normal(0, 0.02, n))
    return Scores(*(x.astype(np.float32) for x in wide), RNG.random(n) < 0.9)


def test_means_and_their_errors() -> None:
    scores = made(N)
    d = divergence(scores)
    # numpy's error of a mean; float32 squares are off by 6e-8 each
    for found, values in ((d.kld, scores.kld), (d.same_top, scores.same_top)):
        assert found.value == pytest.approx(values.mean(dtype=float), rel=1e-6)
        assert found.error == pytest.approx(values.std(dtype=float) / np.sqrt(N - 1), rel=1e-5)
    assert d.ppl.value == pytest.approx(np.exp(scores.nll.mean(dtype=float)), rel=1e-6)
    assert d.delta_p_rms.value == pytest.approx(np.sqrt(np.square(scores.delta_p, dtype=float).mean()), rel=1e-6)


def test_the_ratio_of_perplexities_knows_that_both_saw_the_same_text() -> None:
    scores = made(N)
    d = divergence(scores)
    difference = scores.nll.astype(float) - scores.nll_base
    assert d.ln_ratio.value == pytest.approx(difference.mean(), rel=1e-5)
    assert d.ln_ratio.error == pytest.approx(difference.std() / np.sqrt(N - 1), rel=1e-4)
    assert d.correlation == pytest.approx(np.corrcoef(scores.nll, scores.nll_base)[0, 1], rel=1e-5)


@pytest.mark.parametrize("n", [N, N + 1])
def test_quantiles_and_the_median(n: int) -> None:
    scores = made(n)
    d = divergence(scores)
    expected = np.quantile(scores.kld.astype(float), QUANTILES)
    # The place f (n - 1) is a float32 around 1000, off by up to 3e-5 steps; the widest step is at the upper end.
    steps = float(np.diff(np.sort(scores.kld)).max())
    assert list(d.kld_quantiles.values()) == pytest.approx(expected, abs=3e-5 * steps + 1e-7)
    assert d.kld_median == pytest.approx(np.median(scores.kld))
    assert (d.kld_min, d.kld_max) == (scores.kld.min(), scores.kld.max())


def test_an_identical_file_has_no_error_to_divide_by() -> None:
    flat = np.ones(N, np.float32)
    d: Divergence = divergence(Scores(flat, flat, 0 * flat, 0 * flat, flat == 1))
    assert (d.correlation, d.delta_p_rms.value, d.delta_p_rms.error, d.ln_ratio.error) == (None, 0.0, 0.0, 0.0)
    assert (d.same_top.value, d.same_top.error) == (1.0, 0.0)


def test_the_error_by_rows_is_what_resampling_whole_rows_gives() -> None:
    lengths = RNG.integers(20, 200, 50)
    rows = [np.exp(RNG.normal(0, 1)) * RNG.exponential(0.1, n) for n in lengths]  # what a row is about moves all of it
    values = np.concatenate(rows).astype(np.float32)
    sums = np.array([row.sum() for row in rows])
    drawn = RNG.integers(50, size=(4000, 50))
    resampled = (sums[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)).std()
    found = error_by_rows(values, lengths.tolist())
    # 4,000 draws give a deviation within 1 / sqrt(8000) = 1.1 %; of 50 rows what is linearized is about 1 / 50.
    assert found == pytest.approx(resampled, rel=3 * 0.011 + 1 / 50)
    assert found > 2 * values.std() / np.sqrt(len(values))


def test_of_rows_of_one_value_it_is_the_error_of_the_mean() -> None:
    values = RNG.normal(0, 1, N).astype(np.float32)
    assert error_by_rows(values, [1] * N) == pytest.approx(values.std(ddof=1, dtype=float) / np.sqrt(N))
    assert error_by_rows(values, [N]) == 0.0
