"""The plan: every output tensor with its type, size, offset and the reason. No tensor data is read here.

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

from stepgguf.convert.importance import Importance
from stepgguf.convert.sources.source import rows_per_expert
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key, TensorInfo
from stepgguf.model.names import TensorName
from stepgguf.quants.coverage import Coverage
from stepgguf.quants.kernels import KernelName
from stepgguf.quants.mixtures import TypeChoice
from stepgguf.quants.recipe import Recipe
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.types import row_size

F32 = GGMLQuantizationType.F32
UNIT_VALUES = 8 * 2**20
MTP_MODES = ("include", "separate", "drop")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose. type: a recipe, or its name as recipe.load takes it. mtp_type None: as the recipe says.

    allocated: types of tensors by name, chosen within a budget (budget.py); only the recipe's rules come before them.
    """

    type: str | Recipe
    mtp: str = "include"
    mtp_type: str | None = None
    split_max_size: int | None = None
    chat_template: Path | None = None
    name: str | None = None
    allow_requantize: bool = False
    importance: Importance | None = None
    kernel: KernelName = "lanes"
    allocated: Mapping[str, TypeChoice] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.type) if isinstance(self.type, str) else self.type


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor. Its values come from `source` in the TensorSource, or are `constant` bytes."""

    name: TensorName
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    reason: str
    source: str | None
    plus_one: bool = False
    constant: bytes | None = None

    @property
    def role(self) -> str:
        return self.name.role

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return row_size(self.ggml_type, self.shape[-1])

    @property
    def n_bytes(self) -> int:
        return self.n_values // self.shape[-1] * self.row_bytes

    @property
    def rows_per_expert(self) -> int:
        return rows_per_expert(self.shape)

    @property
    def n_experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def is_quantized(self) -> bool:
        return self.ggml_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

    @property
    def rows_per_unit(self) -> int:
        return min(self.rows_per_expert, max(1, UNIT_VALUES // self.shape[-1]))


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
        offsets, end = [], 0
        for tensor in self.tensors:
            offsets.append(end)
            end += tensor.n_bytes + -tensor.n_bytes % GGUF_DEFAULT_ALIGNMENT
        return tuple(offsets)

    @cached_property
    def header(self) -> bytes:
        infos = [TensorInfo(t.name, t.shape, t.ggml_type, o) for t, o in zip(self.tensors, self.offsets, strict=True)]
        return gguf_header.encode(self.keys, infos)

    @property
    def data_size(self) -> int:
        return sum(t.n_bytes + -t.n_bytes % GGUF_DEFAULT_ALIGNMENT for t in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.data_size


@dataclass(frozen=True)
class Plan:
    """All files of one conversion, in the order in which they are written."""

    recipe: Recipe
    mtp: str
    files: tuple[PlannedFile, ...]
    warnings: tuple[str, ...] = ()
    importance: Importance | None = None
    coverage: Coverage | None = None
    kernel: KernelName = "lanes"

    @property
    def type_name(self) -> str:
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
        return self.n_bytes * 8 / self.n_values

    @property
    def file_bytes(self) -> int:
        """All files with their headers and padding."""
        return sum(file.size for file in self.files)

    def units(self) -> Iterator[Unit]:
        for f, file in enumerate(self.files):
            for t, tensor in enumerate(file.tensors):
                yield from (Unit(f, t, start, stop) for start, stop in unit_rows(tensor))


def unit_rows(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """The row ranges of a tensor's units, in order."""
    return row_ranges(tensor.shape, tensor.rows_per_unit)


def row_ranges(shape: tuple[int, ...], rows_per_unit: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of at most rows_per_unit rows; none crosses an expert's end."""
    per_expert = rows_per_expert(shape)
    for first in range(0, math.prod(shape[:-1]), per_expert):
        for start in range(0, per_expert, rows_per_unit):
            yield first + start, first + min(start + rows_per_unit, per_expert)


def replan(target: Iterable[TensorInfo], plan: Plan) -> list[PlannedTensor]:
    """The plan's tensors with the types that an existing file has: what `verify --against` makes again."""
    planned: dict[str, PlannedTensor] = {tensor.name: tensor for tensor in plan.tensors}
    return [replace(planned[t.name], ggml_type=t.ggml_type) for t in target if t.name in planned]
