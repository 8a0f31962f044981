"""The GGUF header, read and written.

    magic "GGUF"  version u32 = 3  n_tensors u64  n_keys u64
    n_keys    x  name  type u32  value               string = length u64 + UTF-8; array = type u32, n u64, items
    n_tensors x  name  n_dims u32  dims u64 (innermost first)  ggml_type u32  offset u64
    zeros up to the next multiple of general.alignment (32)
    tensor data, each tensor at data_start + offset, padded to the alignment

Keys are kept as the bytes they are in the file, so a header can be rewritten without touching what it does not know,
and a vocabulary of 128,896 tokens is skipped in milliseconds (gguf-py's reader makes several objects per item and
takes seconds). Tests hold both directions against gguf-py.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from stepgguf.errors import BadMagic, BadMetadata, GGUFError, TruncatedFile
from stepgguf.files import disk
from stepgguf.files.jsonread import shown

V = GGUFValueType
E = TypeVar("E", bound=IntEnum)
_SCALARS = {
    V.UINT8: "B", V.INT8: "b", V.UINT16: "H", V.INT16: "h", V.UINT32: "I", V.INT32: "i", V.FLOAT32: "f",
    V.BOOL: "?", V.UINT64: "Q", V.INT64: "q", V.FLOAT64: "d",
}  # fmt: skip
_AGAIN = "Make or download the file again."
_MAX_DIMS = 4  # GGML_MAX_DIMS of ggml.h
_MAX_NESTING = 4  # arrays inside arrays; llama.cpp reads none at all
_MAX_HEADER = 256 * 2**20  # the published ones have 10 MB


@dataclass(frozen=True, slots=True)
class Key:
    """One metadata entry. `raw` has the value's bytes as they are in the file, after its type tag."""

    name: str
    type: GGUFValueType
    raw: bytes

    @classmethod
    def of(cls, name: str, value: Any, type: GGUFValueType, items: GGUFValueType | None = None) -> Key:
        """The entry with a value, encoded. Of an array `type` is ARRAY and `items` the type of its elements."""
        if items is None:
            return cls(name, type, _encode_scalar(type, value))
        body = b"".join(_encode_scalar(items, item) for item in value)
        return cls(name, V.ARRAY, struct.pack("<IQ", items, len(value)) + body)

    @property
    def value(self) -> Any:
        """The decoded value: a str, int, float, bool, or a list of these. Decoded anew each time it is asked for."""
        return _HeaderCursor(self.raw, self.name).read_value(self.type)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file; its shape in numpy order, its offset relative to data_start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.ggml_type]
        return self.n_values // block * size


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header. data_start: where tensor data begins, a multiple of `alignment`."""

    path: Path
    keys: dict[str, Key]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    alignment: int

    def get(self, name: str, default: Any = None) -> Any:
        """The decoded value of a key, `default` without the key."""
        return self.keys[name].value if name in self.keys else default


def encode(keys: Iterable[Key], tensors: Sequence[TensorInfo], alignment: int = GGUF_DEFAULT_ALIGNMENT) -> bytes:
    """The bytes of a header, with the padding behind it: their length is data_start."""
    keys = list(keys)
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))]
    for key in keys:
        parts += [_encode_scalar(V.STRING, key.name), struct.pack("<I", key.type), key.raw]
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [
            _encode_scalar(V.STRING, tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.ggml_type, tensor.offset),
        ]
    body = b"".join(parts)
    return body + bytes(-len(body) % alignment)


def read(path: Path, *, check_size: bool = True) -> Header:
    """Parse and check the header of a GGUF file. check_size: the file must hold all data that the header promises.

    Raises BadMagic, TruncatedFile, BadMetadata, and GGUFError if the file cannot be read.
    """
    try:
        with disk.open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            if size < 24:
                raise BadMagic(f"{path}: {size} bytes is too short for a GGUF header", hint=_hint_for(b""))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse_header(path, data)
    except disk.NotAFile as error:
        raise GGUFError(f"{path}: not a file", hint=_hint_for(b"")) from error
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror or error}", hint="Check the path.") from error
    if check_size:
        _check_size(header, size)
    return header


def read_by_parts(path: Path, size: int, read_at: Callable[[bytearray, int], None]) -> Header:
    """As `read`, of a file that is not on this disk: its first MiB, and more of it only where its header is longer.

    read_at: fills a buffer with the bytes at an offset.
    """
    data, header = bytearray(), None
    while header is None:
        more = bytearray(min(size, _MAX_HEADER, max(2**20, 4 * len(data))) - len(data))
        read_at(more, len(data))
        data += more
        if size < 24:
            raise BadMagic(f"{path}: {size} bytes is too short for a GGUF header", hint=_hint_for(b""))
        try:
            header = _parse_header(path, bytes(data))
        except TruncatedFile:
            if len(data) >= min(size, _MAX_HEADER):
                raise
    _check_size(header, size)
    return header


def _check_size(header: Header, size: int) -> None:
    # Without tensors the header need not be padded, and gguf-py's are not.
    end = max((header.data_start + t.offset + t.n_bytes for t in header.tensors), default=0)
    if size < end:
        raise TruncatedFile(
            f"{header.path}: {size:,} bytes, but its header promises {end:,}",
            hint="The download or the conversion was cut off; make the file again.",
        )


def _parse_header(path: Path, data: mmap.mmap | bytes) -> Header:
    if data[:4] != b"GGUF":
        raise BadMagic(f"{path}: starts with {bytes(data[:4])!r}, not b'GGUF'", hint=_hint_for(data[:64]))
    cursor = _HeaderCursor(data, str(path), 4)
    version, n_tensors, n_keys = cursor.unpack("<IQQ")
    if version not in (2, 3):
        raise BadMagic(
            f"{path}: GGUF version {version}, expected 3", hint="Big-endian and version 1 files are not read."
        )
    keys: dict[str, Key] = {}
    for _ in range(n_keys):
        name = cursor.read_string()
        if name in keys:
            raise BadMetadata(f"{path}: key {shown(name)} is there twice", hint=_AGAIN)
        type = cursor.read_enum(V)
        start = cursor.at
        cursor.skip_value(type)  # checked, but decoded only if it is asked for
        keys[name] = Key(name, type, bytes(data[start : cursor.at]))
    tensors = tuple(_read_tensor(path, cursor) for _ in range(n_tensors))
    alignment = keys["general.alignment"].value if "general.alignment" in keys else GGUF_DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise BadMetadata(f"{path}: general.alignment is {shown(alignment)}, expected a power of two", hint=_AGAIN)
    _check_places(path, tensors, alignment)
    return Header(path, keys, tensors, cursor.at + -cursor.at % alignment, alignment)


def _read_tensor(path: Path, cursor: _HeaderCursor) -> TensorInfo:
    name = cursor.read_string()
    (n_dims,) = cursor.unpack("<I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise BadMetadata(
            f"{path}: tensor {shown(name)} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}", hint=_AGAIN
        )
    dims = cursor.unpack(f"<{n_dims}Q")
    ggml_type = cursor.read_enum(GGMLQuantizationType)
    (offset,) = cursor.unpack("<Q")
    block = GGML_QUANT_SIZES[ggml_type][0]
    if 0 in dims or dims[0] % block:
        raise BadMetadata(
            f"{path}: tensor {shown(name)} is {list(dims[::-1])}, {ggml_type.name} needs rows of a multiple of {block}",
            hint=_AGAIN,
        )
    return TensorInfo(name, dims[::-1], ggml_type, offset)


def _check_places(path: Path, tensors: Sequence[TensorInfo], alignment: int) -> None:
    """Raise BadMetadata if tensors share a name or a byte, or one begins at no multiple of the alignment."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise BadMetadata(f"{path}: tensor {shown(tensor.name)} is there twice", hint=_AGAIN)
        if tensor.offset % alignment:
            raise BadMetadata(
                f"{path}: tensor {shown(tensor.name)} lies at {tensor.offset}, expected a multiple of {alignment}",
                hint=_AGAIN,
            )
        names.add(tensor.name)
    in_order = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, tensor in pairwise(in_order):
        if before.offset + before.n_bytes > tensor.offset:
            raise BadMetadata(
                f"{path}: tensors {shown(before.name)} and {shown(tensor.name)} overlap at {tensor.offset}", hint=_AGAIN
            )


def _hint_for(start: bytes) -> str:
    """What to do about a file that begins like this and is no GGUF."""
    if start.startswith(b"version https://git-lfs"):
        return "This is a git-lfs pointer; fetch the real file with: git lfs pull"
    return "Give a file that `stepgguf convert` wrote, or another GGUF file."


def _encode_scalar(type: GGUFValueType, value: Any) -> bytes:
    if type == V.STRING:
        text = value if isinstance(value, bytes) else str(value).encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack("<" + _SCALARS[type], value)


class _HeaderCursor:
    """A position in a header's bytes, which reading moves on.

    Running off their end, or beyond what a header may have, raises TruncatedFile. `owner` is named in errors.
    """

    def __init__(self, data: mmap.mmap | bytes, owner: str, at: int = 0) -> None:
        self.data, self.owner, self.at, self.end = data, owner, at, min(len(data), _MAX_HEADER)

    def advance(self, n: int) -> int:
        """Move n bytes on; gives the position before."""
        start = self.at
        if n > self.end - start:
            raise TruncatedFile(
                f"{self.owner}: the GGUF header does not end in its first {self.end} bytes", hint=_AGAIN
            )
        self.at += n
        return start

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Read values by a layout of the struct module."""
        return struct.unpack_from(layout, self.data, self.advance(struct.calcsize(layout)))

    def read_enum(self, enum: type[E]) -> E:
        (number,) = self.unpack("<I")
        try:
            return enum(number)
        except ValueError:
            raise BadMetadata(f"{self.owner}: {number} is not a {enum.__name__}", hint=_AGAIN) from None

    def read_string(self) -> str:
        (length,) = self.unpack("<Q")
        start = self.advance(length)
        return bytes(self.data[start : self.at]).decode("utf-8", errors="replace")

    def skip_value(self, type: GGUFValueType, depth: int = 0) -> None:
        """Move to the end of a value, and check what it consists of."""
        if depth > _MAX_NESTING:
            raise BadMetadata(f"{self.owner}: arrays lie more than {_MAX_NESTING} deep in each other", hint=_AGAIN)
        if type == V.STRING:
            (length,) = self.unpack("<Q")
            self.advance(length)
        elif type != V.ARRAY:
            self.advance(struct.calcsize(_SCALARS[type]))
        else:
            items = self.read_enum(V)
            (n,) = self.unpack("<Q")
            if items in _SCALARS:  # at once: a vocabulary has 128,896 scores
                self.advance(n * struct.calcsize(_SCALARS[items]))
            else:
                for _ in range(n):
                    self.skip_value(items, depth + 1)

    def read_value(self, type: GGUFValueType) -> Any:
        if type == V.STRING:
            return self.read_string()
        if type != V.ARRAY:
            return self.unpack("<" + _SCALARS[type])[0]
        items = self.read_enum(V)
        (n,) = self.unpack("<Q")
        if items in _SCALARS:
            return list(self.unpack(f"<{n}{_SCALARS[items]}"))
        return [self.read_value(items) for _ in range(n)]
