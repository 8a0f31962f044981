"""A published safetensors checkpoint as a TensorSource.

    file = header length u64, header JSON, data          entry = {"dtype", "shape", "data_offsets": [begin, end]}

Shards are found by their headers and never by model.safetensors.index.json: the index of the official FP8 repository
is stale (it is that of the BF16 one and lists none of the 126 scale tensors). Where both exist and disagree, a
warning names both. Everything that can be wrong with names, shapes, dtypes and sizes is found before a value is read.

Data is read with pread into buffers of our own and not through a mapping: memory stays bounded by what is in flight,
and a disk error is an OSError with a name instead of a SIGBUS. safe_open would hide the offsets that this needs.

Block-FP8: value = fp8 * scale, one float32 scale for each 128 x 128 tile of each expert. A tensor is scaled if and
only if a `<name>_scale_inv` exists; quantization_config's module list uses runtime names and matches nothing on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.convert.source import SourceTensor
from stepgguf.errors import (
    BadConfig,
    CheckpointError,
    CorruptShard,
    MissingShard,
    ShapeMismatch,
    TensorNotFound,
    TruncatedShard,
    UnexpectedTensor,
)
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import VISION_PREFIXES, TensorSpec, tensor_specs
from stepgguf.quants.codec import FP8_TILE, Scaled, Values

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # safetensors' own limit
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
_GGML = {"BF16": GGMLQuantizationType.BF16, "F16": GGMLQuantizationType.F16, "F32": GGMLQuantizationType.F32}
_SCALE = "_scale_inv"


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def row_bytes(self) -> int:
        return (self.shape[-1] if self.shape else 1) * DTYPE_BYTES[self.dtype]


class Checkpoint:
    """An opened and checked checkpoint directory. `warnings` are for the user; `specs` is the table, applied."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: not a directory", hint="Give the directory that holds config.json and the *.safetensors."
            )
        self.path = path
        self.config = read_json(path / "config.json")
        self.hparams = HParams.from_config(self.config)
        self.specs = tensor_specs(self.hparams)
        self.warnings: list[str] = []
        self._entries: dict[str, _Entry] = {}
        self._digests: dict[str, str] = {}
        shards = sorted(path.glob("*.safetensors"))
        for shard in shards:
            self._read_shard(shard)
        index = _read_index(path / INDEX)
        self._compare_with_index(index)
        self._check(index, n_shards=len(shards))
        self._scales = {s.source: scale for s in self.specs if (scale := self._entries.get(s.source + _SCALE))}
        self.tensors = {spec.source: self._source_tensor(spec) for spec in self.specs}
        self._files = {shard: os.open(shard, os.O_RDONLY) for shard in shards}

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # opening ----------------------------------------------------------------------------------------------------

    def _read_shard(self, shard: Path) -> None:
        header, data_start, digest = read_shard_header(shard)
        self._digests[shard.name] = digest
        for name, entry in header.items():
            if name in self._entries:
                raise UnexpectedTensor(
                    f"{name} is in {self._entries[name].shard.name} and again in {shard.name}",
                    hint="Remove the shard that does not belong to this checkpoint.",
                )
            begin = entry["data_offsets"][0]
            self._entries[name] = _Entry(shard, entry["dtype"], tuple(entry["shape"]), data_start + begin)

    def _compare_with_index(self, index: dict[str, str]) -> None:
        if not index:
            return
        found = {name: entry.shard.name for name, entry in self._entries.items()}
        wrong = sorted(name for name in found.keys() | index.keys() if found.get(name) != index.get(name))
        if wrong:
            name = wrong[0]
            self.warnings.append(
                f"{INDEX} and the shard headers disagree on {len(wrong)} tensors (first: {name}, index: "
                f"{index.get(name, 'not listed')}, headers: {found.get(name, 'not found')}); the headers are used"
            )

    def _check(self, index: dict[str, str], n_shards: int) -> None:
        wanted = {spec.source: spec for spec in self.specs}
        missing = [name for name in wanted if name not in self._entries]
        absent = sorted({shard for shard in index.values() if not (self.path / shard).exists()})
        if missing and absent:
            raise MissingShard(
                f"{self.path / absent[0]} is missing ({len(absent)} of the shards that {INDEX} names); "
                f"{len(missing)} tensors are not there, the first is {missing[0]}",
                hint="Download the missing shards into the same directory.",
            )
        if missing:
            raise TensorNotFound(
                f"{self.path}: {missing[0]} is in none of the {n_shards} *.safetensors files "
                f"({len(missing)} of {len(wanted)} tensors are missing)",
                hint="Download the complete checkpoint; config.json and shards must belong together.",
            )
        for name, spec in wanted.items():
            self._check_entry(name, spec.shape, self._entries[name])
        vision = 0
        for name, entry in self._entries.items():
            if name in wanted or self._is_scale(name, entry, wanted):
                continue
            if name.startswith(VISION_PREFIXES) and "text_config" in self.config:
                vision += 1
                continue
            raise UnexpectedTensor(
                f"{entry.shard.name}: {name} {list(entry.shape)} is not a tensor of {self.hparams.architecture}",
                hint="The checkpoint is of another variant, or config.json does not belong to it.",
            )
        if vision:
            self.warnings.append(f"{vision} tensors of the vision tower are left out; the text model is converted")

    def _check_entry(self, name: str, shape: tuple[int, ...], entry: _Entry) -> None:
        if entry.shape != shape:
            raise ShapeMismatch(
                f"{entry.shard.name}: {name} has shape {list(entry.shape)}, config.json implies {list(shape)}"
            )
        if entry.dtype not in DTYPE_BYTES:
            raise ShapeMismatch(
                f"{entry.shard.name}: {name} has dtype {entry.dtype}, expected one of {', '.join(DTYPE_BYTES)}",
                hint="Convert from the BF16 or the FP8 checkpoint.",
            )
        if entry.dtype == "F8_E4M3" and name + _SCALE not in self._entries:
            raise TensorNotFound(f"{entry.shard.name}: {name} is F8_E4M3, but {name + _SCALE} is in no shard")

    def _is_scale(self, name: str, entry: _Entry, wanted: Mapping[str, TensorSpec]) -> bool:
        spec = wanted.get(name.removesuffix(_SCALE))
        if spec is None or not name.endswith(_SCALE) or self._entries[spec.source].dtype != "F8_E4M3":
            return False
        *lead, rows, columns = spec.shape
        expected = (*lead, -(-rows // FP8_TILE), -(-columns // FP8_TILE))
        if entry.shape != expected or entry.dtype != "F32":
            raise ShapeMismatch(
                f"{entry.shard.name}: {name} is {entry.dtype} {list(entry.shape)}, expected F32 {list(expected)} "
                f"({FP8_TILE} x {FP8_TILE} blocks)"
            )
        return True

    def _source_tensor(self, spec: TensorSpec) -> SourceTensor:
        entry = self._entries[spec.source]
        scaled = spec.source in self._scales
        return SourceTensor(spec.source, entry.shape, entry.dtype, None if scaled else _GGML.get(entry.dtype))

    # TensorSource -----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, str]:
        return dict(self._digests)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        entry = self._entries[name]
        advise(self._files[entry.shard], entry.offset + start * entry.row_bytes, (stop - start) * entry.row_bytes)

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        entry = self._entries[name]
        data = read_exactly(
            self._files[entry.shard], (stop - start) * entry.row_bytes, entry.offset + start * entry.row_bytes, name
        )
        return data.reshape(stop - start, entry.row_bytes)

    def values(self, name: str, start: int, stop: int) -> Values:
        entry = self._entries[name]
        data = self.raw(name, start, stop)
        if entry.dtype == "F8_E4M3":
            return Scaled(data, self._scale_rows(name, start, stop))
        if entry.dtype == "F16":
            return data.view(np.float16).astype(np.float32)
        return data.view(np.uint16) if entry.dtype == "BF16" else data.view(np.float32)

    def _scale_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """The scales of rows [start, stop), which lie inside one expert: [n, column tiles]."""
        rows = self._entries[name].shape[-2]
        first = start % rows
        scales: NDArray[np.float32] = self._scale_tables[name][start // rows]
        return scales[np.arange(first, first + stop - start) // FP8_TILE]

    @cached_property
    def _scale_tables(self) -> dict[str, NDArray[np.float32]]:
        """All scales, each [n, row tiles, column tiles]: 46 MB in the published FP8 checkpoint."""
        tables = {}
        for name, entry in self._scales.items():
            size = entry.row_bytes * int(np.prod(entry.shape[:-1]))
            data = read_exactly(self._files[entry.shard], size, entry.offset, name + _SCALE)
            tables[name] = data.view(np.float32).reshape(-1, *entry.shape[-2:])
        return tables


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with errors that name it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path}: {error.strerror}", hint="The checkpoint directory must hold this file.") from error
    except ValueError as error:
        raise BadConfig(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadConfig(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_shard_header(shard: Path) -> tuple[dict[str, Any], int, str]:
    """A shard's entries, the file offset of its data, and a digest of size, time and header."""
    with shard.open("rb") as file:
        status = os.fstat(file.fileno())
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise CorruptShard(f"{shard}: is a git-lfs pointer", hint="Fetch the real file with: git lfs pull")
        if not 2 <= length <= _MAX_HEADER:
            raise CorruptShard(f"{shard}: a header of {length} bytes, expected 2 to {_MAX_HEADER}", hint=_AGAIN)
        if length > status.st_size - 8:
            raise TruncatedShard(f"{shard}: {status.st_size} bytes, but its header alone has {length}", hint=_AGAIN)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
        end = _check_offsets(header)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptShard(f"{shard}: the header is not a safetensors header ({error})", hint=_AGAIN) from error
    size = 8 + length + end
    if status.st_size < size:
        raise TruncatedShard(f"{shard}: {status.st_size:,} bytes, but its header promises {size:,}", hint=_AGAIN)
    if status.st_size > size:
        raise CorruptShard(f"{shard}: {status.st_size:,} bytes, but its header accounts for {size:,}", hint=_AGAIN)
    digest = hashlib.sha256(text + f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return header, 8 + length, digest


_AGAIN = "Download the shard again."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return result


def _check_offsets(header: dict[str, Any]) -> int:
    """The data's length, if the entries fill it without holes and with the sizes that their shapes imply."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = entry["data_offsets"]
        size = DTYPE_BYTES.get(entry["dtype"])
        for extent in entry["shape"]:
            if not isinstance(extent, int) or extent < 0:
                raise ValueError(f"{name} has shape {entry['shape']}")
            size = None if size is None else size * extent
        if begin != end or stop < begin or (size is not None and stop - begin != size):
            raise ValueError(f"{name} lies at {begin} to {stop}, expected {end} to {end + (size or 0)}")
        end = stop
    return int(end)


def _read_index(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise BadConfig(f"{path}: weight_map is not an object")
    return weight_map


def read_exactly(fd: int, size: int, offset: int, name: str) -> NDArray[np.uint8]:
    """size bytes at offset, however many preads it takes."""
    data = np.empty(size, np.uint8)
    view, done = data.data, 0
    while done < size:
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise TruncatedShard(
                f"{name}: the file ended {size - done} bytes early", hint="It changed while being read."
            )
        done += n
    return data


def advise(fd: int, offset: int, size: int) -> None:
    """Start reading in the background, where the system can (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
