"""A conversion whose codes are calibrated: the writer's units of the trunk's matrices are made by the sequential pass.

What else the file holds (norms, the router, MTP blocks) is left to the pipeline, which makes every unit
that is not finished. The pass and the writer go on together: a layer's units are committed before its states are kept.
"""

from __future__ import annotations

import math

from gguf import GGMLQuantizationType

from stepgguf.calibration.code_search import Blocks, CalibratedCodes, Floats
from stepgguf.calibration.sequential import EMBEDDING, SequentialPass, TokenWeightsOf
from stepgguf.convert.journal import FinishedUnit
from stepgguf.convert.pipeline import encode_values
from stepgguf.convert.plan import Encode, PlannedTensor
from stepgguf.convert.writer import Writer
from stepgguf.model.names import TensorName
from stepgguf.quants.kernels import Kernel
from stepgguf.quants.types import F32
from stepgguf.reference.stream import LayerStream, Progress


class CalibratedUnits:
    """The units of a writer that hold the trunk's matrices, embedding and head included: what the pass makes."""

    def __init__(self, writer: Writer, n_layer: int) -> None:
        self._writer, self._n_layer = writer, n_layer
        self._waiting: dict[int, FinishedUnit] = {}
        # A separate MTP file, which comes last, has an embedding and a head of its own: it drafts with stock codes.
        self._tensors = {tensor.name: tensor for tensor in reversed(writer.plan.tensors) if _is_encoded(tensor)}
        self._units: dict[tuple[TensorName, int], list[int]] = {}  # tensor, expert -> numbers
        for number, unit in enumerate(writer.units):
            tensor = writer.plan.files[unit.file].tensors[unit.tensor]
            if tensor is self._tensors.get(tensor.name) and self._is_calibrated(tensor.name):
                self._units.setdefault((tensor.name, unit.start // tensor.rows_per_expert), []).append(number)

    @property
    def are_finished(self) -> bool:
        """Whether all of them are committed."""
        return self.are_finished_before(None)

    def are_finished_before(self, layer: int | None) -> bool:
        """Whether those of all layers before this one are committed; None: those of the head, too."""
        return all(
            self._writer.finished.keys() >= set(numbers)
            for (name, _), numbers in self._units.items()
            if layer is None or _layer_of(name) < layer
        )

    def type_of(self, name: TensorName) -> GGMLQuantizationType | None:
        """What a tensor is encoded to; None if it keeps its values."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.ggml_type

    def encode(self, name: TensorName, expert: int, values: Floats, importance: Floats) -> Blocks:
        """Stock blocks [rows, row bytes] of rows of a matrix. CorruptTensor, QuantError: see RowMaker.make_rows."""
        tensor = self._tensors[name]
        return encode_values(tensor, _kernel(tensor), values, expert * tensor.rows_per_expert, importance)

    def write(self, name: TensorName, expert: int, values: Floats, blocks: Blocks) -> None:
        """Write a matrix's blocks [rows, row bytes] where its units are; those that are finished are the same."""
        tensor = self._tensors[name]
        first = expert * tensor.rows_per_expert
        for number in self._units[name, expert]:
            if number not in self._writer.finished:
                unit = self._writer.units[number]
                rows = slice(unit.start - first, unit.stop - first)
                loss = _kernel(tensor).measure(values[rows], blocks[rows], self._importance(tensor, expert))
                self._waiting[number] = self._writer.write_unit(number, blocks[rows], loss)

    def commit(self) -> None:
        """Commit what is written."""
        if self._waiting:
            self._writer.commit(self._waiting)
            self._waiting = {}

    def _importance(self, tensor: PlannedTensor, expert: int) -> Floats | None:
        """What the ledger weighs losses with: as of any other file, the importance matrix that was given."""
        importance = self._writer.plan.importance
        return None if importance is None else importance.expert_row(tensor.name, tensor.shape, expert)

    def _is_calibrated(self, name: TensorName) -> bool:
        return name.layer is None or name.layer < self._n_layer


def calibrate_units(
    units: CalibratedUnits,
    writer: Writer,
    exact: LayerStream,
    token_weights: TokenWeightsOf,
    at_embedding: Floats,
    *,
    n_threads: int,
    progress: Progress = lambda done: None,
) -> None:
    """Make the writer's calibrated units and commit them. See SequentialPass for the rest."""
    codes = CalibratedCodes(units, n_threads)
    calibration = SequentialPass(
        exact,
        codes,
        token_weights,
        at_embedding,
        identity={"run": writer.label},
        n_threads=n_threads,
        progress=progress,
    )
    if not units.are_finished_before(calibration.next_layer) or not calibration.has_inputs:
        calibration.restart()  # journal or folder was damaged: all layers again
        exact.folder.restart()
        exact.run_trunk()
    calibration.run()


def _layer_of(name: TensorName) -> float:
    """When its codes are chosen: the embedding's before all layers, the head's after them."""
    if name.layer is not None:
        return name.layer
    return EMBEDDING if name.role == "token_embd" else math.inf


def _is_encoded(tensor: PlannedTensor) -> bool:
    """Whether it is a matrix whose values change: norms and the router are F32."""
    return isinstance(tensor.action, Encode) and tensor.ggml_type != F32


def _kernel(tensor: PlannedTensor) -> Kernel:
    assert isinstance(tensor.action, Encode)
    return tensor.action.kernel
