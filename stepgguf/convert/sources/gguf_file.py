"""A GGUF file, whole or split, as a TensorSource. Whatever program made it: what is asked of its keys, is read then."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.convert.sources.gguf_files import GGUFFiles, open_local_gguf
from stepgguf.convert.sources.random_access import RandomAccessFile
from stepgguf.convert.sources.source import Shape, SourceTensor
from stepgguf.convert.sources.splits import model_stem
from stepgguf.errors import UnsupportedModel
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Header, Key, TensorInfo
from stepgguf.files.jsonread import shown
from stepgguf.model.hparams import ARCHITECTURE, HParams
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.kernels import decoder_for
from stepgguf.quants.types import BF16, F32, row_size
from stepgguf.quants.values import Values


@dataclass(frozen=True, slots=True)
class GGUFMetadata:
    """The keys of the source, which are those of every file made of it."""

    keys: tuple[Key, ...]
    warnings: tuple[str, ...] = ()

    def file_keys(self, shapes: Sequence[tuple[TensorName, Shape]], *, with_mtp: bool) -> list[Key]:
        """The same keys whatever the tensors: quantizing leaves none out."""
        return list(self.keys)


class GGUFSource:
    """An opened GGUF. `keys` are those of the first file, less split.*.

    `where` has its files, or is the path of one of them. Raises GGUFError for files that are damaged or no parts of one
    model, and UnsupportedModel for a model of another architecture.
    """

    def __init__(self, where: Path | GGUFFiles) -> None:
        with ExitStack() as opened:
            files = opened.enter_context(closing(open_local_gguf(where) if isinstance(where, Path) else where))
            self._read(files)
            self._opened = opened.pop_all()

    def _read(self, files: GGUFFiles) -> None:
        self.headers, self._place = files.headers, files.place
        self.path = self.headers[0].path  # whichever part was given, the output is the same
        self.keys: dict[str, Key] = {
            name: key for name, key in self.headers[0].keys.items() if not name.startswith("split.")
        }
        architecture = self.headers[0].get("general.architecture")
        if architecture != ARCHITECTURE:
            raise UnsupportedModel(
                f"{self.path}: general.architecture is {shown(architecture)}, expected {ARCHITECTURE!r}",
                hint="stepgguf quantizes and runs Step-3.5 and Step-3.7 only; llama.cpp's own tools run others.",
            )
        self.hparams = HParams.from_gguf(self.headers[0])
        self._where: dict[str, tuple[Header, TensorInfo]] = {t.name: (h, t) for h in self.headers for t in h.tensors}
        self._files = {file.path: file for file in files.files}
        self.tensors = {name: _source_tensor(info) for name, (_, info) in self._where.items()}
        self.constants: dict[TensorName, bytes] = {}  # a GGUF has all its tensors
        self.warnings: list[str] = []
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        """The file's name without its ending and the number of its part, for files that are made of it."""
        return model_stem(self.path)

    @property
    def title(self) -> str:
        """The file's name as it is."""
        return self.path.name

    @property
    def files(self) -> list[Path]:
        return [header.path for header in self.headers]

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Its tensors. Not made on opening: to look into a file, its keys need not say how many layers it has."""
        n_layer = self.hparams.n_layer
        names = sorted(map(TensorName, self.tensors), key=lambda name: name.file_order)
        return [TensorSpec(name, name, self.tensors[name].shape, name.is_mtp(n_layer)) for name in names]

    @property
    def own_types(self) -> dict[str, GGMLQuantizationType]:
        return {name: info.ggml_type for name, (_, info) in self._where.items()}

    def require_mtp(self) -> None:
        """Nothing: a GGUF's MTP blocks are as good as its other layers."""

    def metadata(self, name: str | None, chat_template: Path | None) -> GGUFMetadata:
        """Its keys as they are. A GGUF that is quantized keeps its name and its template."""
        assert name is None
        assert chat_template is None
        return GGUFMetadata(tuple(self.keys.values()))

    def stop_waiting(self) -> None:
        self._place.stop_waiting()

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> GGUFSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def identity(self) -> dict[str, str]:
        result = dict(self._place.identity)
        for header in self.headers:
            text = gguf_header.encode(header.keys.values(), header.tensors)
            mark = self._files[header.path].version.encode()
            result[header.path.name] = hashlib.sha256(text + mark).hexdigest()
        return result

    def prefetch(self, name: str, start: int, stop: int) -> None:
        file, offset, size = self._place_of(name, start, stop)
        file.prefetch_at(size, offset)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        file, offset, size = self._place_of(name, start, stop)
        data = np.empty(size, np.uint8)
        file.read_at(data.data, offset, name)
        return data.reshape(stop - start, -1)

    def values(self, name: str, start: int, stop: int) -> Values:
        info, data = self._where[name][1], self.raw(name, start, stop)
        if info.ggml_type in (F32, BF16):  # as kernels take them
            return data.view(np.float32) if info.ggml_type == F32 else data.view(np.uint16)
        values = np.empty((stop - start, info.shape[-1]), np.float32)
        decoder_for(info.ggml_type).decode(data, values)
        return values

    def _place_of(self, name: str, start: int, stop: int) -> tuple[RandomAccessFile, int, int]:
        """Where rows [start, stop) lie: the open file, the offset in it, their bytes."""
        (header, info), row_bytes = self._where[name], self.tensors[name].row_bytes
        offset = header.data_start + info.offset + start * row_bytes
        return self._files[header.path], offset, (stop - start) * row_bytes


def _source_tensor(info: TensorInfo) -> SourceTensor:
    return SourceTensor(
        name=info.name,
        shape=info.shape,
        dtype=info.ggml_type.name,
        ggml_type=info.ggml_type,
        row_bytes=row_size(info.ggml_type, info.shape[-1]),
        is_view=info.ggml_type in (F32, BF16),
    )
