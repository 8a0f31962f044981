"""A safetensors shard's header, checked whole before a value is read.

    file = header length u64, header JSON, data          entry = {"dtype", "shape", "data_offsets": [begin, end]}

safe_open would hide the offsets that reading by position needs, and does not say what is wrong with a damaged file.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from stepgguf.convert.sources.random_access import AGAIN, RandomAccessFile
from stepgguf.errors import CorruptShard, TruncatedShard
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value

_MAX_HEADER = 100_000_000  # safetensors' own limit
# Bytes of a number. Sub-byte dtypes of newer writers are left out: nothing reads them, and their sizes go unchecked.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# What has a shard's name and is something else, by its first bytes.
_FOREIGN = (
    (b"version https://git-lfs", "is a git-lfs pointer", "Fetch the real file with: git lfs pull"),
    (b"GGUF", "is a GGUF file", "Give it its right name, and to `stepgguf quantize`."),
    (b"PK\x03\x04", "is a PyTorch pickle", "Save the model with transformers' save_pretrained, as safetensors."),
    (b"<", "is a web page, which the download got in the shard's place", AGAIN),
    (b"\0" * 8, "begins with zeros: its download has not finished", "Finish the download."),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header has it; `offset` counts from the file's beginning."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the innermost dimension."""
        return self.n_bytes // math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's tensors, the format that its metadata names ("pt", "mlx"), and a digest of version and header."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    format: str | None
    digest: str


def read_shard(file: RandomAccessFile) -> Shard:
    """Read a shard's header. TruncatedShard or CorruptShard, each naming the file and what is wrong."""
    path = file.path
    start = bytearray(min(64, file.size))  # enough to tell what is no shard, before its "length" is believed
    file.read_at(start, 0, f"{path}, header")
    length = _header_length(path, start, file.size)
    text = bytearray(length)
    file.read_at(text, 8, f"{path}, header")
    header = jsonread.parse(bytes(text), f"{path}, header", CorruptShard, AGAIN)
    tensors = tuple(
        _stored_tensor(path, name, value, 8 + length) for name, value in header.members() if name != "__metadata__"
    )
    _check_offsets(path, tensors, 8 + length, file.size)
    metadata = header.get("__metadata__")
    format_name = metadata.object().get("format") if metadata is not None else None
    digest = hashlib.sha256(text + file.version.encode()).hexdigest()
    return Shard(path, tensors, format_name if isinstance(format_name, str) else None, digest)


def _header_length(path: Path, start: bytearray, size: int) -> int:
    """The header's bytes, which a file of this size can hold; what is no shard at all is named."""
    for magic, what, hint in _FOREIGN:
        if start.startswith(magic):
            raise CorruptShard(f"{path}: {what}", hint=hint)
    length = int(struct.unpack("<Q", start[:8])[0]) if len(start) >= 8 else 0
    if not 2 <= length <= _MAX_HEADER:
        raise CorruptShard(f"{path}: a header of {length} bytes, expected 2 to {_MAX_HEADER}", hint=AGAIN)
    if length > size - 8:
        raise TruncatedShard(f"{path}: {size} bytes, but its header alone has {length}", hint=AGAIN)
    return length


def _stored_tensor(path: Path, name: str, value: Value, data_start: int) -> StoredTensor:
    dtype, shape = value["dtype"].text(), tuple(extent.integer() for extent in value["shape"].array())
    offsets = [offset.integer() for offset in value["data_offsets"].array()]
    if len(offsets) != 2:
        raise value["data_offsets"].wrong("begin and end")
    begin, end = offsets
    size = DTYPE_BYTES.get(dtype)  # None: a dtype that is not known, and so not read
    if end < begin or (size is not None and end - begin != math.prod(shape) * size):
        raise CorruptShard(
            f"{path}: {name}, {dtype} {list(shape)}, lies at {begin} to {end}, which is not its size", hint=AGAIN
        )
    return StoredTensor(name, path, dtype, shape, data_start + begin, end - begin)


def _check_offsets(path: Path, tensors: tuple[StoredTensor, ...], data_start: int, size: int) -> None:
    """The tensors must fill the file without holes, as safetensors demands."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != end:
            raise CorruptShard(
                f"{path}: {tensor.name} lies at {tensor.offset - data_start}, expected {end - data_start}", hint=AGAIN
            )
        end += tensor.n_bytes
    if size < end:
        raise TruncatedShard(f"{path}: {size:,} bytes, but its header promises {end:,}", hint=AGAIN)
    if size > end:
        raise CorruptShard(f"{path}: {size:,} bytes, but its header accounts for {end:,}", hint=AGAIN)
