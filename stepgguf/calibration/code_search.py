"""Chooses each matrix's codes: stock ones, or some that were chosen against its moments, as held-out tokens say.

Left out for what they did on the embedded model: smaller off-diagonal moments (no less lost on random tokens, and more
on text), and codes chosen with an output's gradients too, rows one after the other against E[g g^T] (Q3_K_M, weights
alone: 0.13 and 0.15 of stock's KL divergence against 0.13 without; 0.68 against 0.74 on a language model).

Rows of a matrix do not depend on each other, so a dense one is worked on in parts, side by side; the parts are the same
whatever the number of threads. Routed experts are worked on side by side by the pass, each on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.held_out import HeldOut
from stepgguf.calibration.moments import PairMoments
from stepgguf.model.names import TensorName
from stepgguf.quants.calibrated import encode_calibrated
from stepgguf.quants.step_encoder import decode
from stepgguf.quants.types import FLOATS

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

N_TRIES = 2  # besides stock codes
PART_ROWS = 1024  # of a dense matrix, that are worked on together


class MatrixUnits(Protocol):
    """The matrices of a file that is made. expert: 0 where there are none."""

    def type_of(self, name: TensorName) -> GGMLQuantizationType | None:
        """What a tensor is encoded to; None if it keeps its values."""

    def encode(self, name: TensorName, expert: int, values: Floats, importance: Floats) -> Blocks:
        """Stock blocks [rows, row bytes] of a matrix's values [rows, columns], or of some rows of it."""

    def write(self, name: TensorName, expert: int, values: Floats, blocks: Blocks) -> None:
        """Take the blocks of a whole matrix. Called from many threads."""

    def commit(self) -> None:
        """Make durable what was taken."""


class CodeSearch(Protocol):
    """Chooses the codes of a matrix."""

    def choose(self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: HeldOut) -> Tensor:
        """The values [rows, columns] that the chosen codes of these weights stand for. Called from many threads."""

    def end_layer(self) -> None:
        """All codes of a layer, the embedding or the head are chosen: they must be safe before the pass goes on."""


class CalibratedCodes:
    """Chooses codes of the tensors' types, and hands each matrix's blocks on."""

    def __init__(self, units: MatrixUnits, n_threads: int) -> None:
        self._units, self._n_threads = units, n_threads

    def choose(self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: HeldOut) -> Tensor:
        """The values [rows, columns] of the codes that lose least on held-out text, of those that are taken.

        None is taken that loses more than stock codes on guard tokens. Without moments, or text to try codes on, it is
        stock codes.
        """
        ggml_type = self._units.type_of(name)
        if ggml_type is None:
            return weights
        values = weights.cpu().numpy()
        importance = moments.importance().cpu().numpy()
        blocks = stock = self._units.encode(name, expert, values, importance)
        best = self._decoded(ggml_type, stock, weights)
        if ggml_type not in FLOATS and len(held_out.text.weights) and moments.n_own:
            least, bound = (sample.error(weights, best) for sample in (held_out.text, held_out.guard))
            for tried in self._try(name, ggml_type, weights, stock, moments, importance, held_out):
                decoded = self._decoded(ggml_type, tried, weights)
                error = held_out.text.error(weights, decoded)
                if error < least and held_out.guard.error(weights, decoded) <= bound:
                    least, best, blocks = error, decoded, tried
        self._units.write(name, expert, values, blocks)
        return best

    def end_layer(self) -> None:
        self._units.commit()

    def _try(
        self,
        name: TensorName,
        ggml_type: GGMLQuantizationType,
        weights: Tensor,
        stock: Blocks,
        moments: PairMoments,
        importance: Floats,
        held_out: HeldOut,
    ) -> Iterator[Blocks]:
        """Blocks that are chosen against the moments: such as make up for the errors of layers before, and plain ones.

        The first aim at the moments' target, as far as held-out text bears it out; the others at the weights.
        """
        values, factored = weights.cpu().numpy(), moments.factored()
        target = held_out.text.believed(weights, moments.target(weights)).cpu().numpy()
        for aim in (values,) if np.array_equal(target, values) else (target, values):

            def encode(rows: slice, aim: Floats = aim) -> Blocks:
                return encode_calibrated(
                    ggml_type, values[rows], factored, importance, target=aim[rows], stock=stock[rows]
                )

            parts = [slice(start, start + PART_ROWS) for start in range(0, len(values), PART_ROWS)]
            yield np.concatenate(list(map(encode, parts)) if name.is_expert else self._on_threads(encode, parts))

    def _on_threads(self, encode: Callable[[slice], Blocks], parts: list[slice]) -> list[Blocks]:
        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(encode, parts))

    @staticmethod
    def _decoded(ggml_type: GGMLQuantizationType, blocks: Blocks, weights: Tensor) -> Tensor:
        """The values that blocks stand for, where the weights are."""
        return torch.from_numpy(decode(ggml_type, blocks, weights.shape[1])).to(weights.device)
