"""A safetensors checkpoint as a TensorSource.

    path -place-> files -diagnosis-> shards -shards-> stored tensors -spelling-> published names
           -encodings, layout, contents-> stored matrices of each tensor of the table

Everything that can be wrong with names, shapes, dtypes and sizes is found before a value is read.

Data is read by position (random_access) into buffers of our own and not through a mapping: memory stays bounded by what
is in flight, and a disk error is an OSError with a name instead of a SIGBUS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.metadata import CheckpointMetadata, read_metadata
from stepgguf.convert.sources import diagnosis
from stepgguf.convert.sources.checkpoint_place import open_place
from stepgguf.convert.sources.contents import CheckpointContents
from stepgguf.convert.sources.encodings import widen_scales
from stepgguf.convert.sources.hub import model_origin
from stepgguf.convert.sources.layout import StoredMatrix
from stepgguf.convert.sources.place import Place
from stepgguf.convert.sources.shards import StoredTensor, read_shard
from stepgguf.convert.sources.source import SourceTensor, rows_per_expert
from stepgguf.errors import BadConfig
from stepgguf.files import jsonread
from stepgguf.model.hparams import HParams
from stepgguf.model.rope import ROPE_FREQS, rope_freqs
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.values import Values

Number = TypeVar("Number", np.uint8, np.float32)


class Checkpoint:
    """An opened and checked checkpoint. `warnings` are for the user; `hparams` and `specs` are what it can give.

    `where` is its place, or a path: its directory, one of its files, a cache folder of the Hub, an id that was
    downloaded, or (to read it from the Hub) hf:ORG/NAME[@REVISION]. Raises CheckpointError, which says what the folder
    is if it is something else, or UnsupportedModel.
    """

    def __init__(self, where: Path | Place) -> None:
        with ExitStack() as opened:
            place = opened.enter_context(closing(open_place(where) if isinstance(where, Path) else where))
            self._place, self.path, self._folder = place, place.path, place.folder
            self.origin = model_origin(self._folder)
            paths = diagnosis.check_files(self.path, place.list_files())
            document = jsonread.read(
                self._folder / "config.json", BadConfig, "The checkpoint directory must hold this file."
            )
            self.config = document.object()
            # Before the shards: another architecture shall be called that, and not a checkpoint with strange tensors.
            described = HParams.from_config(self.config, document.document)
            files = [opened.enter_context(closing(place.open_file(path))) for path in paths]
            self._files = {file.path: file for file in files}
            shards = [read_shard(file) for file in files]
            self._digests = {shard.path.name: shard.digest for shard in shards}
            self._contents = CheckpointContents(self._folder, described, shards, document)
            self.hparams, self.specs = self._contents.hparams, self._contents.specs
            self.warnings, self._matrices = self._contents.warnings, self._contents.matrices
            self.tensors = {spec.source: self._source_tensor(spec) for spec in self.specs}
            freqs = rope_freqs(self.hparams)
            self.constants = {} if freqs is None else {ROPE_FREQS: freqs}
            self.own_types = None  # nothing is of a GGUF's type yet
            self._opened = opened.pop_all()

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
        """The shards."""
        return list(self._files)

    def metadata(self, name: str | None, chat_template: Path | None) -> CheckpointMetadata:
        """What the files beside the shards say. BadConfig for what cannot be used."""
        return read_metadata(self._folder, self.config, self.origin, self.hparams, name=name, template=chat_template)

    def stop_waiting(self) -> None:
        self._place.stop_waiting()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require_mtp(self) -> None:
        """Raise what is wrong with the MTP blocks, if they are there and cannot be used."""
        if self._contents.mtp_fault is not None:
            raise self._contents.mtp_fault

    @property
    def notes(self) -> list[str]:
        """The warnings, and why MTP blocks that config.json names are left out."""
        return [*self.warnings, *filter(None, [self._contents.mtp_note])]

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

    # rows -------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        return {**self._place.identity, **self._digests}

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for matrix, first, n in self._split_at_experts(name, start, stop):
            row_bytes = matrix.data.row_bytes
            # Without the scales: of FP8 blocks they are few, and in memory once a neighbour has read them.
            self._files[matrix.data.shard].prefetch_at(n * row_bytes, matrix.offset + first * row_bytes)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return _join_runs(
            [self._read_data(matrix, first, n) for matrix, first, n in self._split_at_experts(name, start, stop)]
        )

    def values(self, name: str, start: int, stop: int) -> Values:
        runs = list(self._split_at_experts(name, start, stop))
        encoding = runs[0][0].encoding
        scales = [
            _join_runs([self._read_scales(matrix, i, first, n) for matrix, first, n in runs])
            for i in range(len(encoding.scales))
        ]
        return encoding.decode(self.raw(name, start, stop), scales)

    def _split_at_experts(self, name: str, start: int, stop: int) -> Iterator[tuple[StoredMatrix, int, int]]:
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
        stored = matrix.scales[i]
        assert stored is not None  # find_tensors has named what is not there
        rows = matrix.encoding.scales[i].stored_rows(stored, matrix.number, matrix.first + first + np.arange(n))
        start, stop = int(rows[0]), int(rows[-1]) + 1
        data = self._read_rows(stored, stored.offset + start * stored.row_bytes, stop - start)
        scales: NDArray[np.float32] = widen_scales(stored.dtype, data)[rows - start]
        return scales

    def _read_rows(self, stored: StoredTensor, offset: int, n: int) -> NDArray[np.uint8]:
        data = np.empty(n * stored.row_bytes, np.uint8)
        self._files[stored.shard].read_at(data.data, offset, stored.name)
        return data.reshape(n, -1)


def _join_runs(parts: list[NDArray[Number]]) -> NDArray[Number]:
    """The runs of rows as one array: a copy only where there are several."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
