"""A conversion whose codes are calibrated: the writer's units of the trunk's matrices are made by the sequential pass.

What else the file holds (norms, the router, the embedding, MTP blocks) is left to the pipeline, which makes every unit
that is not finished. The pass and the writer go on together: a layer's units are committed before its states are kept.
"""

from __future__ import annotations

from pathlib import Path

from stepgguf.calibration.code_search import Blocks, CalibratedCodes, Floats
from stepgguf.calibration.sequential import SequentialPass, TokenWeightsOf
from stepgguf.convert.journal import FinishedUnit
from stepgguf.convert.plan import Encode, PlannedTensor
from stepgguf.convert.writer import Writer
from stepgguf.model.names import TensorName
from stepgguf.quants.kernels import Kernel
from stepgguf.reference.stream import Progress
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader


def calibrate_units(
    reader: WeightReader,
    writer: Writer,
    rows: TokenRows,
    folder: Path,
    *,
    token_weights: TokenWeightsOf | None = None,
    progress: Progress = lambda done: None,
) -> None:
    """Make the units of the trunk's quantized matrices and commit them. folder: for the states (see SequentialPass)."""
    units = _CalibratedUnits(writer, reader.hp.n_layer)
    codes = CalibratedCodes(units.kernels, units.write, units.commit)
    calibration = SequentialPass(reader, rows, folder, codes, token_weights=token_weights, progress=progress)
    if not units.is_finished_before(calibration.next_layer):
        calibration.restart()  # the writer was begun anew
    calibration.run()


class _CalibratedUnits:
    """The units of a writer that hold the trunk's quantized matrices."""

    def __init__(self, writer: Writer, n_layer: int) -> None:
        self._writer = writer
        self._waiting: dict[int, FinishedUnit] = {}
        self._tensors: dict[TensorName, PlannedTensor] = {}
        self.kernels: dict[TensorName, Kernel] = {}  # what encodes each of the tensors
        self._units: dict[tuple[TensorName, int], list[int]] = {}  # tensor, expert -> numbers
        for number, unit in enumerate(writer.units):
            tensor = writer.plan.files[unit.file].tensors[unit.tensor]
            if isinstance(tensor.action, Encode) and _is_calibrated(tensor, n_layer):
                self._tensors[tensor.name], self.kernels[tensor.name] = tensor, tensor.action.kernel
                self._units.setdefault((tensor.name, unit.start // tensor.rows_per_expert), []).append(number)

    def is_finished_before(self, layer: int) -> bool:
        """Whether the units of all layers before this one are committed."""
        return all(
            self._writer.finished.keys() >= set(numbers)
            for (name, _), numbers in self._units.items()
            if name.layer is not None and name.layer < layer
        )

    def write(self, name: TensorName, expert: int, values: Floats, blocks: Blocks) -> None:
        """Write a matrix's blocks [rows, row bytes] where its units are; those that are finished are the same."""
        tensor = self._tensors[name]
        first = expert * tensor.rows_per_expert
        for number in self._units[name, expert]:
            if number not in self._writer.finished:
                unit = self._writer.units[number]
                rows = slice(unit.start - first, unit.stop - first)
                loss = self.kernels[name].measure(values[rows], blocks[rows], self._importance(tensor, expert))
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


def _is_calibrated(tensor: PlannedTensor, n_layer: int) -> bool:
    """Whether the pass makes it: what is encoded to blocks in the trunk, but for the embedding."""
    name = tensor.name
    in_trunk = name == "output.weight" or (name.layer is not None and name.layer < n_layer)
    return tensor.is_quantized and in_trunk
