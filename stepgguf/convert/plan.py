"""The plan: every output tensor with its type, size, offset, the reason, and what is done to make it.

Everything is decided here and no tensor data is read: a tensor is Constant, a Copy, or is to Encode by a kernel that
was chosen for it, so that the pipeline only executes.

Sizes follow from types and shapes, so header, offsets, splits, progress and resume are known before the first byte.
A file's data is cut into units: runs of rows inside one expert, at most UNIT_VALUES values. The cut depends on shapes
alone, so that another number of threads or another memory limit can resume the same file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from stepgguf.convert import MtpMode
from stepgguf.convert.importance import Importance
from stepgguf.convert.sources.source import SourceTensor, rows_per_expert
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key, TensorInfo
from stepgguf.model.names import TensorName
from stepgguf.quants import KernelName
from stepgguf.quants.coverage import Coverage
from stepgguf.quants.kernels import Decoder, Kernel, choose_kernel, decoder_for, scratch_bytes
from stepgguf.quants.mixtures import TypeChoice
from stepgguf.quants.recipe import Recipe
from stepgguf.quants.types import FLOATS, row_size

UNIT_VALUES = 8 * 2**20  # 16 MB of BF16: long enough to read and encode at full speed, short enough to lose


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose. mtp_type None: as the recipe says.

    allocated: types of tensors by name, chosen within a budget (budget.py); only the recipe's rules come before them.
    calibration: in words, what the codes of the trunk's matrices are calibrated on; None if they are not.
    predicted_kld: what the allocated types are to have with stock codes, in nats a token; None if nothing is known.
    """

    recipe: Recipe
    mtp: MtpMode = "include"
    mtp_type: str | None = None
    split_max_size: int | None = None
    chat_template: Path | None = None
    name: str | None = None
    allow_requantize: bool = False
    importance: Importance | None = None
    kernel: KernelName = "lanes"
    allocated: Mapping[str, TypeChoice] = field(default_factory=dict)
    calibration: str | None = None
    predicted_kld: float | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """The tensor's bytes are these: they follow from the configuration, and nothing is read."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """The tensor's bytes are the stored ones. `decoder` looks whether they are finite numbers."""

    stored: SourceTensor
    decoder: Decoder


@dataclass(frozen=True, slots=True)
class Encode:
    """The stored numbers are encoded.

    plus_one: norms, stored less one. weighted: the imatrix has this tensor, or calibration finds its importance.
    """

    stored: SourceTensor
    kernel: Kernel
    plus_one: bool
    weighted: bool


Action = Constant | Copy | Encode


def choose_action(
    name: TensorName,
    stored: SourceTensor,
    ggml_type: GGMLQuantizationType,
    importance: Importance | None,
    *,
    plus_one: bool = False,
    is_calibrated: bool = False,
    wish: KernelName = "lanes",
) -> Copy | Encode:
    """How a stored tensor becomes `name` of this type. QuantError if nothing here can encode it."""
    if stored.ggml_type == ggml_type and not plus_one:
        return Copy(stored, decoder_for(ggml_type))
    weighted = is_calibrated or (importance is not None and importance.has(name, stored.shape))
    return Encode(stored, choose_kernel(ggml_type, wish, weighted=weighted), plus_one, weighted)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor: its type, why it has that, and what is done to make its units."""

    name: TensorName
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    reason: str
    action: Action  # follows from the type: as_type changes both

    @property
    def role(self) -> str:
        return self.name.role

    @property
    def source(self) -> str | None:
        """The name of the stored tensor; None of a constant."""
        return None if isinstance(self.action, Constant) else self.action.stored.name

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return row_size(self.ggml_type, self.shape[-1])

    @property
    def n_bytes(self) -> int:
        return self.bytes_as(self.ggml_type)

    def bytes_as(self, ggml_type: GGMLQuantizationType) -> int:
        """What it would take as another type."""
        return self.n_values // self.shape[-1] * row_size(ggml_type, self.shape[-1])

    def as_type(
        self, ggml_type: GGMLQuantizationType, importance: Importance | None, wish: KernelName = "lanes"
    ) -> PlannedTensor:
        """The same numbers as another type. QuantError if nothing here can encode it."""
        if isinstance(self.action, Constant):
            return replace(self, ggml_type=ggml_type)
        plus_one = isinstance(self.action, Encode) and self.action.plus_one
        action = choose_action(self.name, self.action.stored, ggml_type, importance, plus_one=plus_one, wish=wish)
        return replace(self, ggml_type=ggml_type, action=action)

    @property
    def rows_per_expert(self) -> int:
        return rows_per_expert(self.shape)

    @property
    def n_experts(self) -> int:
        """Routed experts; 1 of a dense tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def is_quantized(self) -> bool:
        """Whether it is made of blocks, and so loses something; floats only round."""
        return self.ggml_type not in FLOATS

    @property
    def rows_per_unit(self) -> int:
        """Rows of a unit; the last one of an expert may have fewer."""
        return rows_per_unit(self.shape)

    @property
    def unit_memory(self) -> int:
        """The most bytes that making a unit of it holds.

        A copy is the unit as it is stored. What is encoded is held as numbers of at most 4 bytes and as blocks; and if
        its stored bytes are no numbers that a kernel takes, they are held too while such numbers are made of them.
        """
        columns, n_rows = self.shape[-1], self.rows_per_unit
        row = self.row_bytes
        if isinstance(self.action, Encode):
            stored = self.action.stored
            row += 4 * columns + (0 if stored.is_view else stored.row_bytes)
        return n_rows * row + scratch_bytes(n_rows * columns)


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of tensor number `tensor` in file number `file`; what is redone as a whole."""

    file: int
    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedFile:
    """One output file. Offsets of tensors are relative to its data section."""

    path: Path
    keys: tuple[Key, ...]
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins, aligned as GGUF wants it."""
        offsets, end = [], 0
        for tensor in self.tensors:
            offsets.append(end)
            end += tensor.n_bytes + -tensor.n_bytes % GGUF_DEFAULT_ALIGNMENT
        return tuple(offsets)

    @cached_property
    def header(self) -> bytes:
        """The file up to its data section."""
        infos = [TensorInfo(t.name, t.shape, t.ggml_type, o) for t, o in zip(self.tensors, self.offsets, strict=True)]
        return gguf_header.encode(self.keys, infos)

    @property
    def data_size(self) -> int:
        """Bytes of the data section, padding included."""
        return sum(t.n_bytes + -t.n_bytes % GGUF_DEFAULT_ALIGNMENT for t in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.data_size


@dataclass(frozen=True)
class Plan:
    """All files of one conversion, in the order in which they are written."""

    recipe: Recipe
    mtp: MtpMode
    files: tuple[PlannedFile, ...]
    warnings: tuple[str, ...] = ()
    importance: Importance | None = None
    coverage: Coverage | None = None
    kernel: KernelName = "lanes"
    calibration: str | None = None
    predicted_kld: float | None = None

    @property
    def type_name(self) -> str:
        """What the user asked for: a stock type, a recipe, or a budget in words."""
        return self.recipe.name

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_values(self) -> int:
        return sum(tensor.n_values for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight of all tensors, norms and the router among them."""
        return self.n_bytes * 8 / self.n_values

    @property
    def file_bytes(self) -> int:
        """All files with their headers and padding."""
        return sum(file.size for file in self.files)

    def units(self) -> Iterator[Unit]:
        """Yield every unit in the order of the files' bytes: its number in this order is its name in the journal."""
        for f, file in enumerate(self.files):
            for t, tensor in enumerate(file.tensors):
                yield from (Unit(f, t, start, stop) for start, stop in unit_rows(tensor))


def rows_per_unit(shape: tuple[int, ...]) -> int:
    """Rows of a unit of a tensor of this shape; the last one of an expert may have fewer."""
    return min(rows_per_expert(shape), max(1, UNIT_VALUES // shape[-1]))


def unit_rows(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """The row ranges of a tensor's units, in order."""
    return row_ranges(tensor.shape, tensor.rows_per_unit)


def row_ranges(shape: tuple[int, ...], rows_per_unit: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of at most rows_per_unit rows; none crosses an expert's end."""
    per_expert = rows_per_expert(shape)
    for first in range(0, math.prod(shape[:-1]), per_expert):
        for start in range(0, per_expert, rows_per_unit):
            yield first + start, first + min(start + rows_per_unit, per_expert)


def retype_tensors(target: Iterable[TensorInfo], plan: Plan) -> list[PlannedTensor]:
    """The plan's tensors with the types that an existing file has: what `verify --against` makes again."""
    planned: dict[str, PlannedTensor] = {tensor.name: tensor for tensor in plan.tensors}
    return [planned[t.name].as_type(t.ggml_type, plan.importance, plan.kernel) for t in target if t.name in planned]
