"""Chooses each matrix's codes: stock ones, or some that were chosen against its moments, as held-out tokens say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.moments import PairMoments, TokenSample
from stepgguf.model.names import TensorName
from stepgguf.quants import parts
from stepgguf.quants.calibrated import encode_calibrated
from stepgguf.quants.kernels import Kernel
from stepgguf.quants.types import row_size

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]
Emit = Callable[[TensorName, int, Floats, Blocks], None]  # tensor, expert, its weights and their blocks


SHRINKAGES = (0.0, 0.4)  # of the moments' off-diagonal values, that are tried


class CalibratedCodes:
    """Chooses codes of the tensors' types, and hands each matrix's blocks on.

    kernels: of each tensor to be quantized; others keep their values. end_layer: called when a layer's are chosen.
    """

    def __init__(self, kernels: Mapping[TensorName, Kernel], emit: Emit, end_layer: Callable[[], None]) -> None:
        self._kernels, self._emit, self.end_layer = kernels, emit, end_layer

    def embed(self, values: Floats) -> Floats:
        """What the stock codes of the embedding's rows [n, hidden] stand for."""
        kernel = self._kernels.get(TensorName("token_embd.weight"))
        return values if kernel is None else _decode(kernel, _encode(kernel, values, None), values.shape)

    def choose(
        self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: TokenSample
    ) -> Tensor:
        """The values [rows, columns] of the codes that lose least on the held-out tokens; without any, stock ones."""
        kernel = self._kernels.get(name)
        if kernel is None:
            return weights
        values = weights.cpu().numpy()
        best, blocks = torch.empty(0), np.empty(0, np.uint8)
        least = math.inf
        for candidate in self._candidates(kernel, weights, values, moments, held_out):
            decoded = torch.from_numpy(_decode(kernel, candidate, values.shape)).to(weights.device)
            error = held_out.error(weights, decoded)
            if error < least:
                least, best, blocks = error, decoded, candidate
        self._emit(name, expert, values, blocks)
        return best

    def _candidates(
        self, kernel: Kernel, weights: Tensor, values: Floats, moments: PairMoments, held_out: TokenSample
    ) -> Iterator[Blocks]:
        importance = moments.importance().cpu().numpy()
        yield _encode(kernel, values, importance)
        if kernel.ggml_type in parts.TABLE and len(held_out.weights) and moments.n:
            target = moments.target(weights).cpu().numpy()
            for shrinkage in SHRINKAGES:
                factored = moments.factored(shrinkage)
                yield encode_calibrated(kernel.ggml_type, values, factored, importance, target=target)


def _encode(kernel: Kernel, values: Floats, importance: Floats | None) -> Blocks:
    blocks = np.empty((len(values), row_size(kernel.ggml_type, values.shape[1])), np.uint8)
    kernel.encode(np.ascontiguousarray(values), blocks, importance)
    return blocks


def _decode(kernel: Kernel, blocks: Blocks, shape: tuple[int, ...]) -> Floats:
    values = np.empty(shape, np.float32)
    kernel.decode(blocks, values)
    return values
