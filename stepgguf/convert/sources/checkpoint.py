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

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.metadata import CheckpointMetadata, read_metadata
from stepgguf.convert.sources import diagnosis
from stepgguf.convert.sources.encodings import widen_scales
from stepgguf.convert.sources.hub import checkpoint_folder, origin
from stepgguf.convert.sources.layout import Layout, StoredMatrix, find_tensors
from stepgguf.convert.sources.shards import Shard, StoredTensor, read_shard
from stepgguf.convert.sources.source import SourceTensor, rows_per_expert
from stepgguf.errors import BadConfig, CheckpointError, TruncatedShard, UnexpectedTensor
from stepgguf.files import disk, jsonread
from stepgguf.model.hparams import HParams
from stepgguf.model.names import TensorName
from stepgguf.model.rope import ROPE_FREQS, rope_freqs
from stepgguf.model.spelling import NO_WEIGHT, VISION_PREFIXES, published
from stepgguf.model.tensors import TensorSpec, tensor_specs
from stepgguf.quants.values import Values

Number = TypeVar("Number", np.uint8, np.float32)
INDEX = "model.safetensors.index.json"


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
        stored = _by_published_name(shards)
        diagnosis.check_weights(self.path, stored, {shard.format or "" for shard in shards}, document)
        index = _read_index(self.path / INDEX)
        self.warnings = _compare_with_index(index, stored)
        layout, specs = Layout(stored), tensor_specs(described)
        self._matrices = self._locate(layout, [spec for spec in specs if not spec.is_mtp], paths, index)
        self.mtp_note: str | None = None  # why MTP blocks that config.json names are left out
        self._mtp_fault: CheckpointError | None = None
        has_mtp = self._add_mtp(layout, described, [spec for spec in specs if spec.is_mtp], paths, index)
        self.hparams = described if has_mtp else described.without_mtp()
        self.specs = [spec for spec in specs if has_mtp or not spec.is_mtp]
        self._check_others(layout, described)
        self.tensors = {spec.source: self._source_tensor(spec) for spec in self.specs}
        freqs = rope_freqs(self.hparams)
        self.constants = {} if freqs is None else {ROPE_FREQS: freqs}
        self.own_types = None
        self._files = {shard: os.open(shard, os.O_RDONLY) for shard in paths}

    @property
    def name(self) -> str:
        """The model's name, for files that are made of it."""
        return self.origin.name

    @property
    def title(self) -> str:
        """The model's name, its class, and how its matrices are stored."""
        dtypes = sorted({tensor.dtype for tensor in self.tensors.values()} - {"F32"})
        return f"{self.origin.name} ({self.hparams.architecture}, {' and '.join(dtypes) or 'F32'})"

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    def metadata(self, name: str | None, chat_template: Path | None) -> CheckpointMetadata:
        """What the files beside the shards say. BadConfig for what cannot be used."""
        return read_metadata(self.path, self.config, self.origin, self.hparams, name=name, template=chat_template)

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
    ) -> dict[str, tuple[StoredMatrix, ...]]:
        found, lacking = find_tensors(layout, specs)
        if lacking:
            raise diagnosis.missing(self.path, lacking, len(specs), shards, index)
        return found

    def _add_mtp(
        self, layout: Layout, hp: HParams, specs: Sequence[TensorSpec], shards: Sequence[Path], index: Mapping[str, str]
    ) -> bool:
        """Find the MTP blocks' tensors; whether they are all there. If not, note why."""
        present = [
            name for name in layout.stored if TensorName(name).is_mtp(hp.n_layer) and not name.endswith(NO_WEIGHT)
        ]
        if not specs:
            if present:
                self.warnings.append(f"config.json names no MTP blocks; {len(present)} tensors of such are left out")
            return False
        if not present and not any(TensorName(name).is_mtp(hp.n_layer) for name in index):
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
            for name in layout.stored
            if name not in layout.used and not TensorName(name).is_mtp(hp.n_layer) and not name.endswith(NO_WEIGHT)
        ]
        vision = [name for name in others if "text_config" in self.config and name.startswith(VISION_PREFIXES)]
        _refuse_unknown(layout, set(others).difference(vision), hp)
        if vision:
            self.warnings.append(f"{len(vision)} tensors of the vision tower are left out; the text model is converted")

    def _source_tensor(self, spec: TensorSpec) -> SourceTensor:
        first = self._matrices[spec.source][0]
        return SourceTensor(
            name=spec.source,
            shape=spec.shape,
            dtype=first.encoding.dtype,
            ggml_type=first.encoding.ggml_type,
            row_bytes=first.data.row_bytes,
            is_view=first.encoding.is_view,
        )

    # TensorSource -----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        return dict(self._digests)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for matrix, first, n in self._runs(name, start, stop):
            row_bytes = matrix.data.row_bytes
            disk.prefetch_at(self._files[matrix.data.shard], n * row_bytes, matrix.offset + first * row_bytes)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return _joined([self._read_data(matrix, first, n) for matrix, first, n in self._runs(name, start, stop)])

    def values(self, name: str, start: int, stop: int) -> Values:
        runs = list(self._runs(name, start, stop))
        encoding = runs[0][0].encoding
        scales = [
            _joined([self._read_scales(matrix, i, first, n) for matrix, first, n in runs])
            for i in range(len(encoding.scales))
        ]
        return encoding.decode(self.raw(name, start, stop), scales)

    def _runs(self, name: str, start: int, stop: int) -> Iterator[tuple[StoredMatrix, int, int]]:
        """Rows [start, stop) as (matrix, its first row, rows): one run unless they cross an expert's end."""
        rows = rows_per_expert(self.tensors[name].shape)
        while start < stop:
            expert, first = divmod(start, rows)
            n = min(stop - start, rows - first)
            yield self._matrices[name][expert], first, n
            start += n

    def _read_data(self, matrix: StoredMatrix, first: int, n: int) -> NDArray[np.uint8]:
        return self._read_rows(matrix.data, matrix.offset + first * matrix.data.row_bytes, n)

    def _read_scales(self, matrix: StoredMatrix, i: int, first: int, n: int) -> NDArray[np.float32]:
        """For each of n rows from `first` on the scales of its tiles, from the encoding's i-th tensor of scales."""
        stored, height = matrix.scales[i], matrix.encoding.scales[i].tile[0]
        assert stored is not None
        tiles = (matrix.first + first + np.arange(n)) // height
        start = matrix.number * stored.shape[-2] + int(tiles[0])
        data = self._read_rows(stored, stored.offset + start * stored.row_bytes, int(tiles[-1] - tiles[0]) + 1)
        scales: NDArray[np.float32] = widen_scales(stored.dtype, data)[tiles - tiles[0]]
        return scales

    def _read_rows(self, stored: StoredTensor, offset: int, n: int) -> NDArray[np.uint8]:
        data = np.empty(n * stored.row_bytes, np.uint8)
        disk.read_at(self._files[stored.shard], data.data, offset, stored.name, TruncatedShard)
        return data.reshape(n, -1)


def _joined(parts: list[NDArray[Number]]) -> NDArray[Number]:
    """The runs of rows as one array: a copy only where there are several."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _by_published_name(shards: Iterable[Shard]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            name = published(tensor.name)
            if name in found:
                other = found[name]
                again = f"and again in {shard.path.name}" + (f" as {tensor.name}" if tensor.name != other.name else "")
                raise UnexpectedTensor(
                    f"{other.name} is in {other.shard.name} {again}",
                    hint="Remove the shard that does not belong to this checkpoint.",
                )
            found[name] = tensor
    return found


def _compare_with_index(index: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> list[str]:
    """A warning, if the index disagrees with the shards."""
    found = {tensor.name: tensor.shard.name for tensor in stored.values()}
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
            tensor = layout.stored[name]
            raise UnexpectedTensor(
                f"{tensor.shard.name}: {tensor.name} {list(tensor.shape)} is not a tensor of {hp.architecture}",
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
