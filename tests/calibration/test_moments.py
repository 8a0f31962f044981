"""Moments of a quantized stream beside an exact one, against float64 sums over the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepgguf.calibration.moments import FLOOR, RIDGE, THIN, PairMoments, TokenSample

COLUMNS, ROWS, TOKENS = 24, 5, 60
CPU = torch.device("cpu")


class Tokens:
    """What both streams have for some tokens, and what they weigh."""

    def __init__(self, n: int = TOKENS, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.exact = torch.randn(n, COLUMNS, generator=rng) * torch.linspace(0.1, 2, COLUMNS)
        self.quantized = self.exact + 0.3 * torch.randn(n, COLUMNS, generator=rng)
        self.weights = torch.rand(n, generator=rng)

    def moments(self, *, weights: Tensor | None = None) -> PairMoments:
        moments = PairMoments(COLUMNS, CPU)
        w = self.weights if weights is None else weights
        for part in (slice(0, 20), slice(20, None)):
            moments.add(self.quantized[part], self.exact[part], w[part])
        return moments

    def wide(self) -> tuple[Any, Any, Any]:
        """Quantized, exact and weights in float64."""
        return self.quantized.double().numpy(), self.exact.double().numpy(), self.weights.double().numpy()


def matrix(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Any) -> None:
    # Float32 sums of 60 terms: 60 * 2^-24 of the largest is 4e-6.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_the_sums_are_those_over_weighted_tokens() -> None:
    tokens = Tokens()
    y, x, w = tokens.wide()
    moments = tokens.moments()
    near(moments.second, np.einsum("t,ti,tj->ij", w, y, y))
    near(moments.cross, np.einsum("t,ti,tj->ij", w, x - y, y))
    near(moments.importance(), (y**2).mean(0) * 1.0 + FLOOR * (y**2).mean())
    assert (moments.n, moments.n_own) == (TOKENS, TOKENS)
    assert moments.total == pytest.approx(w.sum(), rel=1e-5)


def test_the_target_s_error_differs_from_the_true_one_by_a_constant() -> None:
    """sum w |W x - q x~|^2 = (T - q) H (T - q)^T + const, which is the module's claim."""
    tokens, weights = Tokens(), matrix()
    y, x, w = tokens.wide()
    h, c = np.einsum("t,ti,tj->ij", w, y, y), np.einsum("t,ti,tj->ij", w, x - y, y)
    wide = weights.double().numpy()
    target = wide + wide @ c @ np.linalg.inv(h)
    sample = TokenSample(tokens.quantized, tokens.exact, tokens.weights)

    def constant(q: Tensor) -> float:
        difference = target - q.double().numpy()
        return sample.error(weights, q) - float(np.trace(difference @ h @ difference.T))

    first, second = constant(weights.round()), constant(matrix(2))
    assert first == pytest.approx(second, abs=1e-5 * sample.error(weights, matrix(2)))


def test_the_target_is_the_ridge_regression_of_the_exact_outputs() -> None:
    tokens, weights = Tokens(), matrix()
    y, x, w = tokens.wide()
    ridge = RIDGE * (1 + THIN / TOKENS) * np.einsum("t,ti->", w, y**2) / COLUMNS
    wide, root = weights.double().numpy(), np.sqrt(w)[:, None]
    inputs = np.concatenate([root * y, np.sqrt(ridge) * np.eye(COLUMNS)])
    outputs = np.concatenate([root * (x @ wide.T), np.sqrt(ridge) * wide.T])
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    np.testing.assert_allclose(tokens.moments().target(weights).numpy(), expected, rtol=0, atol=1e-5)


def test_where_the_streams_agree_the_target_is_the_weights() -> None:
    tokens, weights = Tokens(), matrix()
    tokens.exact = tokens.quantized
    assert torch.equal(tokens.moments().target(weights), weights)


def test_without_tokens_the_target_is_the_weights_and_channels_are_alike() -> None:
    empty, pool = PairMoments(COLUMNS, CPU), Tokens().moments()
    for moments in (empty, empty.own_with(8), empty.pooled_with(pool, 8)):
        assert torch.equal(moments.target(matrix()), matrix())
    assert len(empty.importance().unique()) == len(empty.own_with(8).importance().unique()) == 1
    near(empty.pooled_with(pool, 8).importance() / pool.importance(), np.ones(COLUMNS))


def test_a_pool_of_n_tokens_counts_like_them() -> None:
    own, others, ones = Tokens(), Tokens(seed=1), torch.ones(TOKENS)
    pooled = own.moments(weights=ones).pooled_with(others.moments(weights=ones), TOKENS)
    all_tokens = own.moments(weights=ones)
    all_tokens.add(others.quantized, others.exact, ones)
    near(pooled.second, all_tokens.second.numpy())
    near(pooled.importance(), all_tokens.importance().numpy())
    near(pooled.cross, own.moments(weights=ones).cross.numpy())  # what a stream lost is an expert's own
    assert pooled.total == all_tokens.total


def test_a_pool_s_tokens_weigh_what_own_ones_do() -> None:
    own, pool = Tokens(), Tokens(seed=1)
    near(
        own.moments(weights=1e-9 * own.weights).pooled_with(pool.moments(), 8).second * 1e9,
        own.moments().pooled_with(pool.moments(), 8).second.numpy(),
    )


def test_tokens_of_independent_channels_change_the_diagonal_only() -> None:
    own = Tokens().moments()
    prior = own.own_with(8).second - own.second
    diagonal = own.second.diagonal() / own.total
    share = TOKENS / (TOKENS + 8)
    expected = 8 * own.total / TOKENS * (share * diagonal + (1 - share) * diagonal.mean())
    np.testing.assert_allclose(prior.numpy(), torch.diag(expected).numpy(), rtol=0, atol=1e-5)


def test_matrices_share_the_factors() -> None:
    moments = Tokens().moments()
    assert moments.factored() is moments.factored()


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.3, 1.0, 1.7])
def test_a_target_is_believed_as_far_as_it_serves_the_sample(share: float) -> None:
    """What the exact model gives lies so far on the way from the weights to the target, and codes go no further."""
    tokens, target = Tokens(), matrix() + 0.1 * matrix().flip(0)
    between = torch.lerp(matrix(), target, share)
    sample = TokenSample(tokens.quantized, tokens.quantized, tokens.weights)
    # x with W x = between x~: of the same tokens, since all of it is linear.
    exact = tokens.quantized @ between.T @ torch.linalg.pinv(matrix().T)
    sample = TokenSample(tokens.quantized, exact, tokens.weights)
    expected = torch.lerp(matrix(), target, min(1.0, max(0.0, share)))
    torch.testing.assert_close(sample.believed(matrix(), target), expected, rtol=0, atol=2e-3)


def test_no_channel_weighs_nothing() -> None:
    """ggml's encoders make zeros of a block whose channels all weigh nothing, whatever its weights."""
    tokens = Tokens()
    tokens.quantized[:, :8] = 0
    assert (tokens.moments().importance() > 0).all()


def test_tokens_that_weigh_nothing_are_no_error() -> None:
    moments = Tokens().moments(weights=torch.zeros(TOKENS))
    assert torch.equal(moments.target(matrix()), matrix())
    assert not moments.factored().matrix.any()


def test_a_sample_s_error_is_the_weighted_square_of_the_outputs_difference() -> None:
    tokens, weights, q = Tokens(), matrix(), matrix(2)
    y, x, w = tokens.wide()
    difference = x @ weights.double().numpy().T - y @ q.double().numpy().T
    sample = TokenSample(tokens.quantized, tokens.exact, tokens.weights)
    assert sample.error(weights, q) == pytest.approx(float((difference**2).sum(1) @ w), rel=1e-5)
