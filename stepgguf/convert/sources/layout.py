"""Where the values of each tensor of the table lie in the shards, in the three layouts that checkpoints have.

    stacked      moe.gate_proj.weight [n, x, d]                        as published
    by expert    moe.experts.E.gate_proj.weight [x, d], n times        as many tools and quantizers write it
    gate and up  moe.gate_up_proj.weight [n, 2x, d]                    as transformers holds it in memory

A tensor is a Matrix for each expert, or one. Block-FP8: value = fp8 * scale, one scale for each 128 x 128 tile of a
stored matrix, F32 or BF16, in a tensor called NAME_scale_inv. quantization_config's module list uses runtime names and
matches nothing on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from stepgguf.convert.sources.shards import DTYPE_BYTES, Entry
from stepgguf.errors import ShapeMismatch
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.values import FP8_TILE

SCALE = "_scale_inv"


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows [first, first + n) of a matrix of a stored tensor; `number` is the matrix's in its tensor.

    `rows`: the rows of a whole stored matrix. `scale`: the tensor with its tiles' scales.
    """

    entry: Entry
    number: int
    first: int
    rows: int
    scale: Entry | None

    @property
    def offset(self) -> int:
        """Where the first row lies in the shard."""
        return self.entry.offset + (self.number * self.rows + self.first) * self.entry.row_bytes


class Layout:
    """The stored tensors by their published names; finding a tensor marks what it takes as used."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self.used: set[str] = set()

    def find(self, spec: TensorSpec, lacking: list[str]) -> tuple[Matrix, ...]:
        """The matrices of a tensor; or none, and the names of what is not there are added to `lacking`.

        Raises ShapeMismatch for a shape or a dtype that cannot be.
        """
        if spec.source in self.entries:
            return self._stacked(spec, spec.source, 0, 1)
        stem, _, matrix = spec.source.removesuffix(".weight").rpartition(".")
        fused = f"{stem}.gate_up_proj.weight"
        if fused in self.entries and matrix in ("gate_proj", "up_proj"):
            return self._stacked(spec, fused, int(matrix == "up_proj"), 2)
        n_experts = spec.shape[0] if len(spec.shape) == 3 else 0
        names = [f"{stem}.experts.{e}.{matrix}.weight" for e in range(n_experts)]
        absent = [name for name in names if name not in self.entries]
        if len(absent) == len(names):
            absent = [spec.source]
        lacking += absent
        if absent:
            return ()
        found = tuple(self._matrix(name, spec.shape[1:], 0) for name in names)
        _check_dtypes(found)
        return found

    def _stacked(self, spec: TensorSpec, name: str, part: int, n_parts: int) -> tuple[Matrix, ...]:
        """Part number `part` of n_parts, above each other in every matrix of a stored tensor."""
        if len(spec.shape) == 1:
            return (self._matrix(name, spec.shape, 0),)
        *lead, rows, columns = spec.shape
        first = self._matrix(name, (*lead, rows * n_parts, columns), part * rows)
        return tuple(replace(first, number=e) for e in range(lead[0] if lead else 1))

    def _matrix(self, name: str, shape: tuple[int, ...], first: int) -> Matrix:
        """The first matrix of a stored tensor, which must have such a shape, from row `first` on."""
        entry, scale = self.entries[name], self.entries.get(name + SCALE)
        if name not in self.used:
            _check_entry(name, entry, scale, shape)
            self.used |= {name, name + SCALE} if entry.dtype == "F8_E4M3" else {name}
        rows = shape[-2] if len(shape) > 1 else 1
        return Matrix(entry, 0, first, rows, scale if entry.dtype == "F8_E4M3" else None)


def _check_entry(name: str, entry: Entry, scale: Entry | None, shape: tuple[int, ...]) -> None:
    shard = entry.shard.name
    if entry.shape != shape:
        raise ShapeMismatch(
            f"{shard}: {entry.name} has shape {list(entry.shape)}, config.json implies {list(shape)}",
            hint="config.json and shards must belong together.",
        )
    if entry.dtype not in DTYPE_BYTES:
        raise ShapeMismatch(
            f"{shard}: {entry.name} has dtype {entry.dtype}, expected one of {', '.join(DTYPE_BYTES)}",
            hint="Convert from the BF16 or the FP8 checkpoint.",
        )
    if entry.dtype != "F8_E4M3" or scale is None:
        return
    *lead, rows, columns = shape if len(shape) > 1 else (1, *shape)
    expected = (*lead, -(-rows // FP8_TILE), -(-columns // FP8_TILE))
    if scale.shape != expected or scale.dtype not in ("F32", "BF16"):
        raise ShapeMismatch(
            f"{scale.shard.name}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected F32 {list(expected)} "
            f"({FP8_TILE} x {FP8_TILE} blocks)",
            hint="Convert from the BF16 or the FP8 checkpoint.",
        )


def _check_dtypes(matrices: Iterable[Matrix]) -> None:
    by_dtype = {matrix.entry.dtype: matrix.entry for matrix in matrices}
    if len(by_dtype) > 1:
        one, other, *_ = by_dtype.values()
        raise ShapeMismatch(
            f"{one.name} is {one.dtype}, but {other.name} is {other.dtype}: experts of one tensor differ"
        )


def locate(layout: Layout, specs: Iterable[TensorSpec]) -> tuple[dict[str, tuple[Matrix, ...]], list[str]]:
    """The matrices of every tensor by its name in the table, and the names of what is not there, scales of FP8 too."""
    lacking: list[str] = []
    found = {spec.source: layout.find(spec, lacking) for spec in specs}
    entries = {m.entry.name: m for matrices in found.values() for m in matrices if m.entry.dtype == "F8_E4M3"}
    lacking += [name + SCALE for name, matrix in entries.items() if matrix.scale is None]
    return found, lacking
