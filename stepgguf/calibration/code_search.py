"""Chooses each matrix's codes: stock ones, or some that were chosen against its moments, as held-out tokens say.

Rows of a matrix do not depend on each other, so a dense one is worked on in parts, side by side; the parts are the same
whatever the number of threads. Routed experts are worked on side by side by the pass, each on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from typing import Protocol

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.moments import PairMoments, TokenSample
from stepgguf.model.names import TensorName
from stepgguf.quants.calibrated import encode_calibrated
from stepgguf.quants.kernels import decoder_for
from stepgguf.quants.types import FLOATS

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

SHRINKAGES = (0.0, 0.4)  # of the moments' off-diagonal values, that are tried
PART_ROWS = 1024  # of a dense matrix, that are worked on together


class MatrixUnits(Protocol):
    """The matrices of a file that is made. expert: 0 where there are none."""

    def type_of(self, name: TensorName) -> GGMLQuantizationType | None:
        """What a tensor is encoded to; None if it keeps its values."""

    def encode(self, name: TensorName, expert: int, values: Floats, importance: Floats | None) -> Blocks:
        """Stock blocks [rows, row bytes] of a matrix's values [rows, columns], or of some rows of it."""

    def write(self, name: TensorName, expert: int, values: Floats, blocks: Blocks) -> None:
        """Take the blocks of a whole matrix. Called from many threads."""

    def commit(self) -> None:
        """Make durable what was taken."""


class CodeSearch(Protocol):
    """Chooses the codes of a matrix."""

    def embed(self, name: TensorName, values: Floats) -> Floats:
        """What the codes of some of the embedding's rows [n, hidden] stand for."""

    def choose(
        self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: TokenSample
    ) -> Tensor:
        """The values [rows, columns] that the chosen codes of these weights stand for. Called from many threads."""

    def end_layer(self) -> None:
        """All codes of a layer, or of the head, are chosen: they must be safe before the pass goes on."""


class CalibratedCodes:
    """Chooses codes of the tensors' types, and hands each matrix's blocks on."""

    def __init__(self, units: MatrixUnits, n_threads: int) -> None:
        self._units, self._n_threads = units, n_threads

    def embed(self, name: TensorName, values: Floats) -> Floats:
        """What the stock codes of some of the embedding's rows [n, hidden] stand for."""
        ggml_type = self._units.type_of(name)
        return values if ggml_type is None else _decode(ggml_type, self._units.encode(name, 0, values, None), values)

    def choose(
        self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: TokenSample
    ) -> Tensor:
        """The values [rows, columns] of the codes that lose least on the held-out tokens; without any, stock ones."""
        ggml_type = self._units.type_of(name)
        if ggml_type is None:
            return weights
        values = weights.cpu().numpy()
        importance = moments.importance().cpu().numpy()
        stock = self._units.encode(name, expert, values, importance)
        best, blocks, least = torch.empty(0), stock, math.inf
        candidates = [stock]
        if ggml_type not in FLOATS and len(held_out.weights) and moments.n_own:
            target = moments.target(weights).cpu().numpy()
            candidates += self._calibrated(name, ggml_type, values, target, stock, moments, importance)
        for candidate in candidates:
            decoded = torch.from_numpy(_decode(ggml_type, candidate, values)).to(weights.device)
            error = held_out.error(weights, decoded)
            if error < least:
                least, best, blocks = error, decoded, candidate
        self._units.write(name, expert, values, blocks)
        return best

    def end_layer(self) -> None:
        self._units.commit()

    def _calibrated(
        self,
        name: TensorName,
        ggml_type: GGMLQuantizationType,
        values: Floats,
        target: Floats,
        stock: Blocks,
        moments: PairMoments,
        importance: Floats,
    ) -> Iterator[Blocks]:
        """Blocks that are chosen against the moments, for each shrinkage."""

        def encode(shrinkage: float, rows: slice) -> Blocks:
            factored = moments.factored(shrinkage)
            return encode_calibrated(
                ggml_type, values[rows], factored, importance, target=target[rows], stock=stock[rows]
            )

        ranges = [slice(start, start + PART_ROWS) for start in range(0, len(values), PART_ROWS)]
        jobs = [(shrinkage, rows) for shrinkage in SHRINKAGES for rows in ranges]
        made = list(starmap(encode, jobs)) if name.is_expert else self._on_threads(encode, jobs)
        for first in range(0, len(made), len(ranges)):
            yield np.concatenate(made[first : first + len(ranges)])

    def _on_threads(self, encode: Callable[[float, slice], Blocks], jobs: list[tuple[float, slice]]) -> list[Blocks]:
        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(lambda job: encode(*job), jobs))


def _decode(ggml_type: GGMLQuantizationType, blocks: Blocks, values: Floats) -> Floats:
    decoded = np.empty(values.shape, np.float32)
    decoder_for(ggml_type).decode(blocks, decoded)
    return decoded
