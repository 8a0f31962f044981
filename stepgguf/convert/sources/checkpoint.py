"""A safetensors checkpoint as a TensorSource.

    folder -hub-> the snapshot -diagnosis-> shards -shards-> entries -spelling-> published names -layout-> matrices

Shards are found by their headers and never by model.safetensors.index.json: the index of the official FP8 repository
is stale (it is that of the BF16 one and lists none of the 126 scale tensors). Where both exist and disagree, a
warning names both. Everything that can be wrong with names, shapes, dtypes and sizes is found before a value is read.

Which tensors are needed follows from what is there and what is asked for. A checkpoint without any tensor of its MTP
blocks is one without MTP, as transformers leaves them out when it saves; one whose MTP blocks cannot be used is
refused only where they are asked for (`require_mtp`).

Data is read with pread into buffers of our own and not through a mapping: memory stays bounded by what is in flight,
and a disk error is an OSError with a name instead of a SIGBUS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.convert.plan import rows_per_expert
from stepgguf.convert.sources import diagnosis
from stepgguf.convert.sources.hub import checkpoint_folder, origin
from stepgguf.convert.sources.layout import Layout, Matrix, locate
from stepgguf.convert.sources.shards import Entry, Shard, read_shard
from stepgguf.convert.sources.source import SourceTensor
from stepgguf.errors import BadConfig, CheckpointError, TruncatedShard, UnexpectedTensor
from stepgguf.files import disk, jsonread
from stepgguf.model.hparams import HParams
from stepgguf.model.spelling import NO_WEIGHT, VISION_PREFIXES, published
from stepgguf.model.tensors import TensorSpec, is_beyond, tensor_specs
from stepgguf.quants.codec import FP8_TILE, Scaled, Values, widen

INDEX = "model.safetensors.index.json"
_GGML = {"BF16": GGMLQuantizationType.BF16, "F16": GGMLQuantizationType.F16, "F32": GGMLQuantizationType.F32}


class Checkpoint:
    """An opened and checked checkpoint. `warnings` are for the user; `hparams` and `specs` are what it can give.

    `path` may be its directory, one of its files, a cache folder of the Hub or a Hub id that was downloaded. Raises
    CheckpointError, which says what the folder is if it is something else, or UnsupportedModel.
    """

    def __init__(self, path: Path) -> None:
        self.path = checkpoint_folder(path)
        self.origin = origin(self.path)
        paths = diagnosis.check_files(self.path)
        document = jsonread.read(self.path / "config.json", BadConfig, "The checkpoint directory must hold this file.")
        self.config = document.object()
        described = HParams.from_config(self.config, document.document)
        shards = [read_shard(shard) for shard in paths]
        self._digests = {shard.path.name: shard.digest for shard in shards}
        entries = _entries(shards)
        diagnosis.check_weights(self.path, entries.values(), {shard.format or "" for shard in shards}, document)
        index = _read_index(self.path / INDEX)
        self.warnings = _compare_with_index(index, entries)
        layout, specs = Layout(entries), tensor_specs(described)
        self._matrices = self._locate(layout, [spec for spec in specs if not spec.is_mtp], paths, index)
        self.mtp_note: str | None = None  # why MTP blocks that config.json names are left out
        self._mtp_fault: CheckpointError | None = None
        has_mtp = self._add_mtp(layout, described, [spec for spec in specs if spec.is_mtp], paths, index)
        self.hparams = described if has_mtp else described.without_mtp()
        self.specs = [spec for spec in specs if has_mtp or not spec.is_mtp]
        self._check_others(layout, described)
        self.tensors = {spec.source: self._source_tensor(spec) for spec in self.specs}
        self._files = {shard: os.open(shard, os.O_RDONLY) for shard in paths}

    @property
    def name(self) -> str:
        """The model's name, for files that are made of it."""
        return self.origin.name

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require_mtp(self) -> None:
        """Raise what is wrong with the MTP blocks, if they are there and cannot be used."""
        if self._mtp_fault is not None:
            raise self._mtp_fault

    @property
    def notes(self) -> list[str]:
        """The warnings, and why MTP blocks that config.json names are left out."""
        return [*self.warnings, *([self.mtp_note] if self.mtp_note else [])]

    # opening ----------------------------------------------------------------------------------------------------

    def _locate(
        self, layout: Layout, specs: Sequence[TensorSpec], shards: Sequence[Path], index: Mapping[str, str]
    ) -> dict[str, tuple[Matrix, ...]]:
        found, lacking = locate(layout, specs)
        if lacking:
            raise diagnosis.missing(self.path, lacking, len(specs), shards, index)
        return found

    def _add_mtp(
        self, layout: Layout, hp: HParams, specs: Sequence[TensorSpec], shards: Sequence[Path], index: Mapping[str, str]
    ) -> bool:
        """Find the MTP blocks' tensors; whether they are all there. If not, note why."""
        present = [name for name in layout.entries if is_beyond(name, hp.n_layer) and not name.endswith(NO_WEIGHT)]
        if not specs:
            if present:
                self.warnings.append(f"config.json names no MTP blocks; {len(present)} tensors of such are left out")
            return False
        if not present and not any(is_beyond(name, hp.n_layer) for name in index):
            self.mtp_note = (
                f"the {hp.n_mtp} MTP blocks that config.json names are in no shard (programs that fine-tune and merge "
                "leave them out): the model is converted without them"
            )
            return False
        try:
            found = self._locate(layout, specs, shards, index)
            _refuse_unknown(layout, present, hp)
        except CheckpointError as error:
            self._mtp_fault = type(error)(
                f"the MTP blocks cannot be used: {error.message}",
                hint="`stepgguf convert --mtp drop` converts the model without them.",
            )
            self.mtp_note = self._mtp_fault.message
            return False
        self._matrices |= found
        return True

    def _check_others(self, layout: Layout, hp: HParams) -> None:
        """What no tensor of the table took: vision is left out, other tensors are refused."""
        others = [
            name
            for name in layout.entries
            if name not in layout.used and not is_beyond(name, hp.n_layer) and not name.endswith(NO_WEIGHT)
        ]
        vision = [name for name in others if "text_config" in self.config and name.startswith(VISION_PREFIXES)]
        _refuse_unknown(layout, set(others).difference(vision), hp)
        if vision:
            self.warnings.append(f"{len(vision)} tensors of the vision tower are left out; the text model is converted")

    def _source_tensor(self, spec: TensorSpec) -> SourceTensor:
        dtype = self._matrices[spec.source][0].entry.dtype
        return SourceTensor(spec.source, spec.shape, dtype, _GGML.get(dtype))

    # TensorSource -----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        return dict(self._digests)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for matrix, first, n in self._runs(name, start, stop):
            row_bytes = matrix.entry.row_bytes
            disk.prefetch_at(self._files[matrix.entry.shard], n * row_bytes, matrix.offset + first * row_bytes)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        parts = [self._read(matrix, first, n) for matrix, first, n in self._runs(name, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def values(self, name: str, start: int, stop: int) -> Values:
        data, dtype = self.raw(name, start, stop), self.tensors[name].dtype
        if dtype == "F8_E4M3":
            scales = [self._scale_rows(matrix, first, n) for matrix, first, n in self._runs(name, start, stop)]
            return Scaled(data, np.concatenate(scales))
        if dtype == "F16":
            return data.view(np.float16).astype(np.float32)
        return data.view(np.uint16) if dtype == "BF16" else data.view(np.float32)

    def _runs(self, name: str, start: int, stop: int) -> Iterator[tuple[Matrix, int, int]]:
        """Rows [start, stop) as (matrix, its first row, rows): one run unless they cross an expert's end."""
        rows = rows_per_expert(self.tensors[name].shape)
        while start < stop:
            expert, first = divmod(start, rows)
            n = min(stop - start, rows - first)
            yield self._matrices[name][expert], first, n
            start += n

    def _read(self, matrix: Matrix, first: int, n: int) -> NDArray[np.uint8]:
        entry = matrix.entry
        offset = matrix.offset + first * entry.row_bytes
        data = np.empty(n * entry.row_bytes, np.uint8)
        disk.read_at(self._files[entry.shard], data.data, offset, entry.name, TruncatedShard)
        return data.reshape(n, -1)

    def _scale_rows(self, matrix: Matrix, first: int, n: int) -> NDArray[np.float32]:
        """The scales of n rows from `first` on: [n, column tiles]."""
        assert matrix.scale is not None
        scales: NDArray[np.float32] = self._scale_tables[matrix.scale.name][matrix.number]
        return scales[(matrix.first + first + np.arange(n)) // FP8_TILE]

    @cached_property
    def _scale_tables(self) -> dict[str, NDArray[np.float32]]:
        """All scales, each [n, row tiles, column tiles]: 46 MB in the published FP8 checkpoint."""
        scales = {m.scale.name: m.scale for matrices in self._matrices.values() for m in matrices if m.scale}
        return {name: self._scale_table(entry) for name, entry in scales.items()}

    def _scale_table(self, entry: Entry) -> NDArray[np.float32]:
        data = np.empty(entry.n_bytes, np.uint8)
        disk.read_at(self._files[entry.shard], data.data, entry.offset, entry.name, TruncatedShard)
        table = np.empty((math.prod(entry.shape[:-2]), *entry.shape[-2:]), np.float32)
        widen((data.view(np.uint16) if entry.dtype == "BF16" else data.view(np.float32)).reshape(table.shape), table)
        return table


def _entries(shards: Iterable[Shard]) -> dict[str, Entry]:
    """The stored tensors by their published names."""
    found: dict[str, Entry] = {}
    for shard in shards:
        for entry in shard.entries:
            name = published(entry.name)
            if name in found:
                other = found[name]
                again = f"and again in {shard.path.name}" + (f" as {entry.name}" if entry.name != other.name else "")
                raise UnexpectedTensor(
                    f"{other.name} is in {other.shard.name} {again}",
                    hint="Remove the shard that does not belong to this checkpoint.",
                )
            found[name] = entry
    return found


def _compare_with_index(index: Mapping[str, str], entries: Mapping[str, Entry]) -> list[str]:
    """A warning, if the index disagrees with the shards."""
    found = {entry.name: entry.shard.name for entry in entries.values()}
    wrong = sorted(name for name in found.keys() | index.keys() if found.get(name) != index.get(name))
    if not index or not wrong:
        return []
    name = wrong[0]
    return [
        f"{INDEX} and the shard headers disagree on {len(wrong)} tensors (first: {name}, index: "
        f"{index.get(name, 'not listed')}, headers: {found.get(name, 'not found')}); the headers are used"
    ]


def _refuse_unknown(layout: Layout, names: Iterable[str], hp: HParams) -> None:
    for name in names:
        if name not in layout.used:
            entry = layout.entries[name]
            raise UnexpectedTensor(
                f"{entry.shard.name}: {entry.name} {list(entry.shape)} is not a tensor of {hp.architecture}",
                hint="The checkpoint is of another variant, or config.json does not belong to it.",
            )


def _read_index(path: Path) -> dict[str, str]:
    """The index: tensor name -> shard, a file name in the same directory. Empty without an index."""
    if not path.exists():
        return {}
    weight_map = jsonread.read(path, BadConfig, "Delete it: the shards are found without it.").get("weight_map")
    shards = dict(weight_map.members()) if weight_map is not None else {}
    for value in shards.values():
        name = value.text()
        if not 0 < len(name.encode()) < 256 or name == ".." or Path(name).name != name or "\0" in name:
            raise value.wrong("a file's name in this directory")
    return {name: value.text() for name, value in shards.items()}
