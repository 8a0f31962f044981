"""What chooses blocks against second moments in one step of 256 columns, for all of whose rows one metric holds.

    begin      the steps before are done, those behind will make up for it. Metric: S = R R^T of the step's own part of
               R (second_moments.py), for the error is a sum over steps of |(e + f R^-1) R|^2, where e are the step's
               errors and f is what the steps before carry into it. Hence the weights to aim at are w + f R^-1.
    improve    all other steps are as they are. Metric: H of the step's columns.

BlockEncoder aims ggml's own encoder at what would be best if values were not rounded: for every type, lattices too.
code_encoder.py chooses single codes, for types that have them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from gguf import GGMLQuantizationType

from stepgguf.errors import QuantError
from stepgguf.quants.kernels import Blocks, choose_kernel, decoder_for
from stepgguf.quants.second_moments import Floats, SecondMoments
from stepgguf.quants.types import row_size


def encode_as_ggml(ggml_type: GGMLQuantizationType, weights: Floats, importance: Floats) -> Blocks:
    """ggml's own blocks of weights [rows, columns]. QuantError if they are not finite, or too large for the type."""
    out = np.empty((len(weights), row_size(ggml_type, weights.shape[1])), np.uint8)
    if not choose_kernel(ggml_type, weighted=True).encode(np.ascontiguousarray(weights), out, importance):
        raise QuantError("the weights have values that are not finite")
    return out


def decode(ggml_type: GGMLQuantizationType, blocks: Blocks, columns: int) -> Floats:
    """The values [rows, columns] of blocks [rows, row bytes]."""
    out = np.empty((len(blocks), columns), np.float32)
    decoder_for(ggml_type).decode(np.ascontiguousarray(blocks), out)
    return out


class StepEncoder(ABC):
    """Rows as their blocks come to be.

    target      [rows, columns]: what decoded values should be
    importance  [columns]: what ggml's encoder weighs columns with
    errors      [rows, columns]: target - decoded values, of the steps that were begun
    """

    def __init__(
        self, ggml_type: GGMLQuantizationType, target: Floats, moments: SecondMoments, importance: Floats
    ) -> None:
        self.ggml_type, self.moments, self.importance = ggml_type, moments, importance
        self.target = np.ascontiguousarray(target)
        self.errors = np.empty_like(self.target)

    def begin(self, step: slice, carried: Floats) -> None:
        """Choose the step's blocks; carried [rows, columns of the step]: f."""
        root = self.moments.root[step, step]
        ideal = self.target[:, step] + carried @ np.linalg.inv(root)
        self._begin(step, carried, root, encode_as_ggml(self.ggml_type, ideal, self.importance[step]))

    @abstractmethod
    def _begin(self, step: slice, carried: Floats, root: Floats, blocks: Blocks) -> None:
        """Choose the step's blocks; `blocks` are ggml's of the ideal weights."""

    @abstractmethod
    def improve(self, step: slice, residuals: Floats) -> None:
        """Lower the error; residuals [rows, columns of the step]: errors times the damped moments."""

    @abstractmethod
    def blocks(self) -> Blocks:
        """The blocks [rows, row bytes], when all steps were begun."""


class BlockEncoder(StepEncoder):
    """Blocks as ggml's encoder makes them, of weights that make up for the errors of other steps."""

    def __init__(
        self, ggml_type: GGMLQuantizationType, target: Floats, moments: SecondMoments, importance: Floats
    ) -> None:
        super().__init__(ggml_type, target, moments, importance)
        self._blocks = np.empty((len(target), row_size(ggml_type, target.shape[1])), np.uint8)

    def _begin(self, step: slice, carried: Floats, root: Floats, blocks: Blocks) -> None:
        self._blocks[:, self._bytes(step)] = blocks
        self.errors[:, step] = self.target[:, step] - decode(self.ggml_type, blocks, step.stop - step.start)

    def improve(self, step: slice, residuals: Floats) -> None:
        metric, errors = self.moments.damped_block(step), self.errors[:, step]
        ideal = self.target[:, step] - errors + residuals @ np.linalg.inv(metric)
        blocks = encode_as_ggml(self.ggml_type, ideal, self.importance[step])
        new = self.target[:, step] - decode(self.ggml_type, blocks, errors.shape[1])
        change = errors - new
        is_better = (change * (2 * residuals - change @ metric)).sum(1) > 0
        self.errors[is_better, step] = new[is_better]
        self._blocks[is_better, self._bytes(step)] = blocks[is_better]

    def blocks(self) -> Blocks:
        return self._blocks

    def _bytes(self, step: slice) -> slice:
        return slice(row_size(self.ggml_type, step.start), row_size(self.ggml_type, step.stop))
