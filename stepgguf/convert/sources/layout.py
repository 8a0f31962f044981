"""Where the values of each tensor of the table lie in the shards, in the three layouts that checkpoints have.

    stacked      moe.gate_proj.weight [n, x, d]                        as published
    by expert    moe.experts.E.gate_proj.weight [x, d], n times        as many tools and quantizers write it
    gate and up  moe.gate_up_proj.weight [n, 2x, d]                    as transformers holds it in memory

A tensor is a StoredMatrix for each expert, or one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from stepgguf.convert.sources.encodings import DTYPES, StoredEncoding, encoding_of
from stepgguf.convert.sources.shards import StoredTensor
from stepgguf.convert.sources.source import Shape, rows_per_expert
from stepgguf.errors import ShapeMismatch
from stepgguf.model.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Rows from `first` on of a matrix of a stored tensor; `number` is the matrix's in its tensor.

    rows: of the whole matrix as it is stored. scales: those that `encoding` wants beside the data, None if not there.
    """

    data: StoredTensor
    encoding: StoredEncoding
    scales: tuple[StoredTensor | None, ...]
    number: int
    first: int
    rows: int

    @property
    def offset(self) -> int:
        """Where the first row lies in the shard."""
        return self.data.offset + (self.number * self.rows + self.first) * self.data.row_bytes


class Layout:
    """The stored tensors by their published names; finding a tensor marks what it takes as used."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self.used: set[str] = set()

    def find_matrices(self, spec: TensorSpec, lacking: list[str]) -> tuple[StoredMatrix, ...]:
        """The matrices of a tensor; or none, and the names of what is not there are added to `lacking`.

        Raises ShapeMismatch for a shape or a dtype that cannot be.
        """
        if spec.source in self.stored:
            return self._find_stacked(spec, spec.source, 0, 1)  # as published, and all that has no experts
        stem, _, matrix = spec.source.removesuffix(".weight").rpartition(".")
        fused = f"{stem}.gate_up_proj.weight"
        if fused in self.stored and matrix in ("gate_proj", "up_proj"):
            return self._find_stacked(spec, fused, int(matrix == "up_proj"), 2)  # gate's rows lie above up's
        n_experts = spec.shape[0] if len(spec.shape) == 3 else 0
        names = [f"{stem}.experts.{e}.{matrix}.weight" for e in range(n_experts)]
        absent = [name for name in names if name not in self.stored]
        if len(absent) == len(names):  # not one of them: it is not stored by expert
            absent = [spec.source]
        lacking += absent
        if absent:
            return ()
        found = tuple(self._first_matrix(name, spec.shape[1:], 0) for name in names)
        _check_alike(found)
        return found

    def _find_stacked(self, spec: TensorSpec, name: str, part: int, n_parts: int) -> tuple[StoredMatrix, ...]:
        """Part number `part` of n_parts, above each other in every matrix of a stored tensor."""
        if len(spec.shape) == 1:
            return (self._first_matrix(name, spec.shape, 0),)
        *lead, rows, columns = spec.shape
        first = self._first_matrix(name, (*lead, rows * n_parts, columns), part * rows)
        return tuple(replace(first, number=e) for e in range(lead[0] if lead else 1))

    def _first_matrix(self, name: str, shape: Shape, first: int) -> StoredMatrix:
        """The first matrix of a stored tensor, which must have such a shape, from row `first` on."""
        data, encoding = self.stored[name], encoding_of(name, self.stored)
        expected = encoding.data_shape(shape) if encoding is not None else shape
        if data.shape != expected:
            raise ShapeMismatch(
                f"{data.shard.name}: {data.name} has shape {list(data.shape)}, config.json implies {list(expected)}",
                hint="config.json and shards must belong together.",
            )
        if encoding is None:
            raise ShapeMismatch(
                f"{data.shard.name}: {data.name} has dtype {data.dtype}, expected one of {', '.join(DTYPES)}",
                hint="Convert from the BF16 or the FP8 checkpoint.",
            )
        names = [name + scale.suffix for scale in encoding.scales]
        scales = tuple(map(self.stored.get, names))
        for scale, found in zip(encoding.scales, scales, strict=True):
            if found is not None:
                scale.check_stored(found, shape)
        self.used |= {name, *names}
        return StoredMatrix(data, encoding, scales, 0, first, rows_per_expert(shape))


def _check_alike(matrices: Iterable[StoredMatrix]) -> None:
    by_encoding = {matrix.encoding: matrix.data for matrix in matrices}
    if len(by_encoding) > 1:
        one, other, *_ = by_encoding.values()
        raise ShapeMismatch(
            f"{one.name} is {one.dtype}, but {other.name} is {other.dtype}: experts of one tensor differ"
        )


def find_tensors(layout: Layout, specs: Iterable[TensorSpec]) -> tuple[dict[str, tuple[StoredMatrix, ...]], list[str]]:
    """The matrices of every tensor by its name in the table, and the names of what is not there, scales too."""
    lacking: list[str] = []
    found = {spec.source: layout.find_matrices(spec, lacking) for spec in specs}
    by_name = {matrix.data.name: matrix for matrices in found.values() for matrix in matrices}
    for name, matrix in by_name.items():
        scales = zip(matrix.encoding.scales, matrix.scales, strict=True)
        lacking += [name + scale.suffix for scale, stored in scales if stored is None]
    return found, lacking
