"""A GGUF file, whole or split, as a TensorSource."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.sources.source import SourceTensor
from stepgguf.convert.sources.splits import model_stem, read_headers
from stepgguf.errors import TruncatedFile, UnsupportedModel
from stepgguf.files import disk, gguf_header
from stepgguf.files.gguf_header import Header, Key, TensorInfo
from stepgguf.files.jsonread import shown
from stepgguf.quants import codec
from stepgguf.quants.codec import Values
from stepgguf.quants.ggml import BF16, F32, row_size

ARCHITECTURE = "step35"


class GGUFSource:
    """An opened GGUF. For a split one, give any of its files. `keys` are those of the first file, less split.*."""

    def __init__(self, path: Path) -> None:
        self.headers = read_headers(path)
        self.path = self.headers[0].path  # whichever part was given, the output is the same
        self.keys: dict[str, Key] = {
            name: key for name, key in self.headers[0].keys.items() if not name.startswith("split.")
        }
        architecture = self.headers[0].get("general.architecture")
        if architecture != ARCHITECTURE:
            raise UnsupportedModel(
                f"{path}: general.architecture is {shown(architecture)}, expected {ARCHITECTURE!r}",
                hint="stepgguf quantizes and runs Step-3.5 and Step-3.7 only; llama.cpp's own tools run others.",
            )
        self._where: dict[str, tuple[Header, TensorInfo]] = {t.name: (h, t) for h in self.headers for t in h.tensors}
        self._files = {h.path: os.open(h.path, os.O_RDONLY) for h in self.headers}
        self.tensors = {
            name: SourceTensor(name, t.shape, t.ggml_type.name, t.ggml_type) for name, (_, t) in self._where.items()
        }

    @property
    def name(self) -> str:
        """The file's name without its ending and the number of its part, for files that are made of it."""
        return model_stem(self.path)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> GGUFSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def identity(self) -> dict[str, str]:
        result = {}
        for header in self.headers:
            status = header.path.stat()
            text = gguf_header.encode(header.keys.values(), header.tensors)
            mark = f"{status.st_size} {status.st_mtime_ns}".encode()
            result[header.path.name] = hashlib.sha256(text + mark).hexdigest()
        return result

    def prefetch(self, name: str, start: int, stop: int) -> None:
        fd, offset, size = self._locate(name, start, stop)
        disk.prefetch_at(fd, size, offset)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        fd, offset, size = self._locate(name, start, stop)
        data = np.empty(size, np.uint8)
        disk.read_at(fd, data.data, offset, name, TruncatedFile)
        return data.reshape(stop - start, -1)

    def values(self, name: str, start: int, stop: int) -> Values:
        tensor, data = self._where[name][1], self.raw(name, start, stop)
        if tensor.ggml_type in (F32, BF16):
            return data.view(np.float32) if tensor.ggml_type == F32 else data.view(np.uint16)
        values = np.empty((stop - start, tensor.shape[-1]), np.float32)
        codec.dequantize(tensor.ggml_type, data, values)
        return values

    def _locate(self, name: str, start: int, stop: int) -> tuple[int, int, int]:
        header, tensor = self._where[name]
        size = row_size(tensor.ggml_type, tensor.shape[-1])
        return self._files[header.path], header.data_start + tensor.offset + start * size, (stop - start) * size
