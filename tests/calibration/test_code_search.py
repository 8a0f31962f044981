"""Which codes are taken: others than stock only where held-out tokens are better off with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from stepgguf.calibration import code_search
from stepgguf.calibration.code_search import Blocks, CalibratedCodes, Floats
from stepgguf.calibration.held_out import HeldOut
from stepgguf.calibration.moments import PairMoments, TokenSample
from stepgguf.model.names import TensorName
from stepgguf.quants import ggml
from stepgguf.quants.kernels import decoder_for
from stepgguf.quants.types import row_size

T = GGMLQuantizationType
COLUMNS = 256
DENSE, EXPERT = TensorName("blk.0.attn_q.weight"), TensorName("blk.1.ffn_up_exps.weight")


class Units:
    """The matrices of a file in memory; stock blocks are ggml's own."""

    def __init__(self, ggml_type: GGMLQuantizationType | None) -> None:
        self._type = ggml_type
        self.written: list[tuple[TensorName, int, Blocks]] = []
        self.commits = 0

    def type_of(self, name: TensorName) -> GGMLQuantizationType | None:
        return self._type

    def encode(self, name: TensorName, expert: int, values: Floats, importance: Floats) -> Blocks:
        return stock_blocks(self._type, values, importance)

    def write(self, name: TensorName, expert: int, values: Floats, blocks: Blocks) -> None:
        self.written.append((name, expert, blocks))

    def commit(self) -> None:
        self.commits += 1


def stock_blocks(ggml_type: Any, values: Floats, importance: Floats | None) -> Blocks:
    library = ggml.load_library()
    assert library is not None
    blocks = np.empty((len(values), row_size(ggml_type, values.shape[1])), np.uint8)
    library.quantize(ggml_type, values, blocks, importance)
    return blocks


def weights(rows: int = 16) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(5))


def tokens(n: int, seed: int, basis: Tensor | None = None) -> Tensor:
    """Inputs of low rank, as activations are; of another basis, unlike those before."""
    basis = subspace(0) if basis is None else basis
    mixed = torch.randn(n, len(basis), generator=torch.Generator().manual_seed(seed)) @ basis
    return mixed + 0.05 * torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(seed + 1))


def subspace(seed: int) -> Tensor:
    return torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(100 + seed))


def moments_of(x: Tensor) -> PairMoments:
    moments = PairMoments(COLUMNS, torch.device("cpu"))
    moments.add(x, x, torch.ones(len(x)))
    return moments


def sample_of(x: Tensor) -> TokenSample:
    return TokenSample(x, x, torch.ones(len(x)))


def choose(
    ggml_type: GGMLQuantizationType | None,
    seen: Tensor,
    text: Tensor,
    guard: Tensor | None = None,
    name: TensorName = EXPERT,
    rows: int = 16,
) -> tuple[Tensor, Units]:
    units = Units(ggml_type)
    held_out = HeldOut(sample_of(text), sample_of(tokens(0, 0) if guard is None else guard))
    q = CalibratedCodes(units, 2).choose(name, 3, weights(rows), moments_of(seen), held_out)
    return q, units


def stock(ggml_type: GGMLQuantizationType, seen: Tensor) -> Blocks:
    return stock_blocks(ggml_type, weights().numpy(), moments_of(seen).importance().numpy())


@pytest.mark.parametrize("ggml_type", [T.Q2_K, T.Q4_K, T.IQ4_XS], ids=lambda kind: kind.name)
def test_codes_that_serve_held_out_tokens_better_are_taken(ggml_type: GGMLQuantizationType) -> None:
    seen, held_out = tokens(600, 1), tokens(60, 7)
    q, units = choose(ggml_type, seen, held_out)
    [(name, expert, blocks)] = units.written
    assert (name, expert) == (EXPERT, 3)
    decoded = np.empty((16, COLUMNS), np.float32)
    decoder_for(ggml_type).decode(blocks, decoded)
    np.testing.assert_array_equal(q.numpy(), decoded)
    decoder_for(ggml_type).decode(stock(ggml_type, seen), decoded)
    sample = sample_of(held_out)
    assert sample.error(weights(), q) < 0.8 * sample.error(weights(), torch.from_numpy(decoded))


@pytest.mark.parametrize("ggml_type", [T.Q2_K, T.Q4_K, T.IQ3_XXS], ids=lambda kind: kind.name)
def test_codes_that_serve_only_the_tokens_they_were_chosen_for_are_not(ggml_type: GGMLQuantizationType) -> None:
    """What is held out is nothing like what the moments are of, so codes that give up the one for the other lose."""
    seen = tokens(600, 1)
    _, units = choose(ggml_type, seen, tokens(200, 7, subspace(1)))
    np.testing.assert_array_equal(units.written[0][2], stock(ggml_type, seen))


@pytest.mark.parametrize("ggml_type", [T.Q2_K, T.Q4_K, T.IQ4_XS], ids=lambda kind: kind.name)
def test_codes_that_are_bought_with_other_tokens_are_not_taken(ggml_type: GGMLQuantizationType) -> None:
    """They would serve the text better, as the test above has it, and lose on what guards."""
    seen, text, guard = tokens(600, 1), tokens(60, 7), tokens(200, 7, subspace(1))
    bought, _ = choose(ggml_type, seen, text)
    _, units = choose(ggml_type, seen, text, guard)
    np.testing.assert_array_equal(units.written[0][2], stock(ggml_type, seen))
    plain = np.empty((16, COLUMNS), np.float32)
    decoder_for(ggml_type).decode(stock(ggml_type, seen), plain)
    error = sample_of(guard).error
    assert error(weights(), bought) > error(weights(), torch.from_numpy(plain))


@pytest.mark.parametrize(("n_seen", "n_held_out"), [(600, 0), (0, 60), (0, 0)])
def test_without_tokens_on_either_side_stock_codes_stay(n_seen: int, n_held_out: int) -> None:
    seen = tokens(600, 1)[:n_seen]
    _, units = choose(T.Q3_K, seen, tokens(60, 7)[:n_held_out])
    np.testing.assert_array_equal(units.written[0][2], stock(T.Q3_K, seen))


def test_without_any_token_the_codes_are_those_of_plain_weights() -> None:
    q, _ = choose(T.Q3_K, tokens(0, 1), tokens(0, 7))
    assert (q - weights()).square().mean() < 0.05 * weights().square().mean()


def test_what_is_not_encoded_keeps_its_values() -> None:
    q, units = choose(None, tokens(60, 1), tokens(60, 7))
    assert torch.equal(q, weights())
    assert not units.written


def test_floats_are_rounded() -> None:
    q, units = choose(T.F16, tokens(60, 1), tokens(60, 7))
    assert torch.equal(q, weights().half().float())
    assert len(units.written) == 1


def test_a_dense_matrix_is_made_in_parts_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows depend on each other only by how BLAS rounds products of different sizes."""
    seen, held_out = tokens(600, 1), tokens(60, 7)
    whole, _ = choose(T.Q4_K, seen, held_out, name=DENSE, rows=64)
    monkeypatch.setattr(code_search, "PART_ROWS", 24)
    parted, units = choose(T.Q4_K, seen, held_out, name=DENSE, rows=64)
    assert len(units.written[0][2]) == 64
    assert (parted != whole).float().mean() < 0.01
