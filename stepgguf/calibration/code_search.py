"""Chooses each matrix's codes: stock ones, or some that were chosen against its moments, as held-out tokens say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.moments import PairMoments, TokenSample
from stepgguf.model.names import TensorName
from stepgguf.quants.kernels import Kernel
from stepgguf.quants.types import row_size

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]
Emit = Callable[[TensorName, int, Floats, Blocks], None]  # tensor, expert, its weights and their blocks


class CalibratedCodes:
    """Chooses codes of the tensors' types, and hands each matrix's blocks on. kernels: of each tensor to be quantized."""

    def __init__(self, kernels: Mapping[TensorName, Kernel], emit: Emit) -> None:
        self._kernels, self._emit = kernels, emit

    def embed(self, values: Floats) -> Floats:
        kernel = self._kernels.get(TensorName("token_embd.weight"))
        return values if kernel is None else _decode(kernel, _encode(kernel, values, None), values.shape)

    def choose(
        self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: TokenSample
    ) -> Tensor:
        kernel = self._kernels.get(name)
        if kernel is None:
            return weights
        values = weights.cpu().numpy()
        blocks = _encode(kernel, values, moments.importance().cpu().numpy())
        self._emit(name, expert, values, blocks)
        return torch.from_numpy(_decode(kernel, blocks, values.shape)).to(weights.device)


def _encode(kernel: Kernel, values: Floats, importance: Floats | None) -> Blocks:
    blocks = np.empty((len(values), row_size(kernel.ggml_type, values.shape[1])), np.uint8)
    kernel.encode(np.ascontiguousarray(values), blocks, importance)
    return blocks


def _decode(kernel: Kernel, blocks: Blocks, shape: tuple[int, ...]) -> Floats:
    values = np.empty(shape, np.float32)
    kernel.decode(blocks, values)
    return values
