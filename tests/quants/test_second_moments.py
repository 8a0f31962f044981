"""The metric of second moments: factors, errors and targets against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepgguf.errors import QuantError
from stepgguf.quants.second_moments import factor_moments, output_error
from tests.quants.moments import correlated, error, rank_one, with_dead_columns, zero

EPS = 2.0**-24  # float32 rounds by at most this share


@pytest.mark.parametrize("columns", [32, 320, 512])
@pytest.mark.parametrize("make", [correlated, rank_one, with_dead_columns, zero])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_the_factor_is_that_of_the_damped_moments(make: Any, size: float, columns: int) -> None:
    moments = make(columns) * np.float32(size)
    ready = factor_moments(moments, 0.05)
    mean = float(np.trace(moments, dtype=np.float64)) / columns or 1.0
    wanted = moments / mean + 0.05 * np.eye(columns)
    root = ready.root.astype(np.float64)
    assert ready.damping == 0.05
    assert not np.tril(ready.root, -1).any()
    # Each element is a sum of at most `columns` products, bounded by the roots of the diagonal's two.
    diagonal = np.sqrt(np.diagonal(wanted))
    assert (np.abs(root @ root.T - wanted) <= (columns + 10) * EPS * np.outer(diagonal, diagonal)).all()


def test_damping_grows_until_the_moments_can_be_factored() -> None:
    indefinite = correlated(64) - 0.5 * np.eye(64, dtype=np.float32) * np.trace(correlated(64)) / 64
    ready = factor_moments(indefinite, 1e-3)
    assert 0.1 <= ready.damping <= 10
    assert np.isfinite(ready.root).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    moments = correlated(64)
    moments[3, 5] = np.nan
    with pytest.raises(QuantError, match="second moments have values that are not finite"):
        factor_moments(moments)


@pytest.mark.parametrize("columns", [32, 256, 320, 800])
def test_the_output_error_is_the_quadratic_form(columns: int) -> None:
    rng, moments = np.random.default_rng(0), correlated(columns)
    weights, decoded = rng.standard_normal((2, 17, columns)).astype(np.float32)
    exact = error(weights - decoded, moments).sum()
    assert output_error(weights, decoded, moments) == pytest.approx(exact, rel=columns * EPS)


def test_the_output_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1000, 64)).astype(np.float32)
    weights, decoded = rng.standard_normal((2, 8, 64)).astype(np.float32)
    outputs = inputs.astype(np.float64) @ (weights - decoded).T.astype(np.float64)
    moments = inputs.T @ inputs / 1000
    assert output_error(weights, decoded, moments) == pytest.approx((outputs**2).mean(0).sum(), rel=1000 * EPS)
