"""Importance matrices: how strongly each input channel of each matrix is driven, measured on calibration text.

A weight's rounding error reaches the output times its input channel: encoders weigh the error of column j by E[x_j^2].
llama.cpp's imatrix tool sums x^2 per tensor, for routed experts per expert over the tokens routed to it. Two forms:

    GGUF    keys     general.type "imatrix"   imatrix.datasets [str]   imatrix.chunk_count u32   imatrix.chunk_size u32
            tensors  NAME.in_sum2  F32 [n_matrix, columns]  sums of x^2
                     NAME.counts   F32 [n_matrix, 1]        tokens that the matrix saw
    .dat    n_entries i32
            n_entries x  length i32  NAME  n_call i32  n_values i32  values f32 = sum / count * n_call
            chunk_count i32  length i32  dataset                   (early files end before this)

The .dat form has no count per expert and no shape. It is kept as it is, as one matrix of all values with n_call as its
count, and `Imatrix.entry` cuts it to the tensor's shape. It does mark experts that no token reached: all values 1.0.

Sources: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and load_imatrix in tools/quantize/quantize.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
from numpy.typing import NDArray

from stepgguf.errors import ImatrixError, OutputError
from stepgguf.files import disk

Floats = NDArray[np.float32]

PRIORS = ("pooled", "flat")

# Tokens' worth of prior in an expert's importance, and the tokens below which an expert is called thin. Both by output
# error (Q4_K) on held-out dialogues, for experts of the embedded model that were shown 0 to 256 tokens: gate and up do
# best with 8 to 32, down with 2 to 8. With n0 = 8, down is 26 % above full calibration at 128 tokens, 17 % at 256.
N0 = 8.0
THIN = 256

# An expert's down projection reads its own hidden units: channel j of one expert has nothing to do with j of another.
_OWN_CHANNELS = frozenset({"ffn_down_exps"})

_SUMS, _COUNTS = ".in_sum2", ".counts"
_HINT = "An importance matrix is what llama-imatrix writes: a GGUF, or the older .dat."
# Vocabularies are the longest arrays that GGUFs hold, and the longest of those have this many tokens (Gemma's).
_MAX_ITEMS = 262_144


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """One tensor's sums of x^2 [n_matrix, columns] over the counts [n_matrix] of tokens that each matrix saw.

    n_matrix is the number of experts, 1 for a dense tensor.
    counted: False where the tokens of each expert are unknown. counts then tell which experts were seen, and
        sums / counts is their mean all the same.
    shared: whether column j is the same channel for every expert. See `importance`.
    """

    sums: Floats
    counts: Floats
    counted: bool = True
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model that wants importance. `columns` is the length of its rows."""

    name: str
    role: str
    layer: int | None
    n_matrix: int
    columns: int
    is_mtp: bool


@dataclass(frozen=True, eq=False, slots=True)
class Imatrix:
    """entries: GGUF tensor name -> what the file has of it. `path` is None for one that was just collected."""

    path: Path | None
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    entries: Mapping[str, Entry]

    def entry(self, tensor: Tensor) -> Entry | None:
        """The tensor's entry, [n_matrix, columns]; None if it has none or saw no token. Another shape: ImatrixError."""
        found = self.entries.get(tensor.name)
        if found is None:
            return None
        expected = (tensor.n_matrix, tensor.columns)
        if len(found.counts) == 1 and found.sums.size == tensor.n_matrix * tensor.columns:
            found = _cut(found, tensor.n_matrix)
        elif found.sums.shape != expected:
            raise ImatrixError(
                f"{self.path}: {tensor.name} has {_times(found.sums.shape)} values, expected {_times(expected)}",
                hint="This importance matrix was made from another model.",
            )
        return replace(found, shared=tensor.role not in _OWN_CHANNELS) if found.counts.any() else None


def _cut(entry: Entry, n: int) -> Entry:
    """One matrix of all experts' values, cut into n. Experts whose means are all exactly 1.0 were not seen."""
    if n == 1:
        return entry
    sums = entry.sums.reshape(n, -1)
    seen = (sums != entry.counts).any(axis=1)
    return Entry(np.where(seen[:, None], sums, np.float32(0)), np.where(seen, entry.counts, 0), counted=False)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def read(path: Path) -> Imatrix:
    """Map an importance matrix of either form, and check every value. Raises ImatrixError."""
    try:
        with disk.open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise ImatrixError(f"{path}: {error.strerror or error}", hint="Check the path.") from error
    if not magic:
        raise ImatrixError(f"{path}: the file is empty", hint=_HINT)
    imatrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    for name, entry in imatrix.entries.items():
        _check(f"{path}: {name}", entry)
    return imatrix


def _check(what: str, entry: Entry) -> None:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        for part, values in (("sums", entry.sums), ("counts", entry.counts)):
            low, high = values.min(), values.max()
            if not (low >= 0 and high < np.inf):
                raise ImatrixError(f"{what}: {part} from {low} to {high}, expected finite and not negative", hint=_HINT)
    if (entry.counts != np.rint(entry.counts)).any():
        raise ImatrixError(f"{what}: counts must be whole numbers of tokens", hint=_HINT)
    for i in np.flatnonzero(entry.counts == 0):
        if entry.sums[i].any():
            raise ImatrixError(f"{what}: matrix {i} of {len(entry.counts)} has sums, but saw no token", hint=_HINT)


class _Reader(GGUFReader):
    """gguf-py's reader makes objects for as many items as an array claims to have, be they in the file or not."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY and (count := self._get(orig_offs + 4, np.uint64)[0]) > _MAX_ITEMS:
            raise ValueError(f"an array of {count} items at byte {orig_offs}")
        return super()._get_field_parts(orig_offs, raw_type)


def _read_gguf(path: Path) -> Imatrix:
    try:
        with np.errstate(over="raise"):
            reader = _Reader(path)
            keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith("imatrix.")}
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ImatrixError(f"{path}: damaged GGUF: {error}", hint=_HINT) from error

    def key(name: str, expected: type) -> Any:
        if not isinstance(keys.get(name), expected):
            raise ImatrixError(f"{path}: {name} is {keys.get(name)!r}, expected {expected.__name__}", hint=_HINT)
        return keys[name]

    datasets = key(Keys.IMatrix.DATASETS, list)
    chunk_count, chunk_size = key(Keys.IMatrix.CHUNK_COUNT, int), key(Keys.IMatrix.CHUNK_SIZE, int)
    parts = {t.name: np.asarray(t.data) for t in reader.tensors if t.name.endswith((_SUMS, _COUNTS))}
    names = sorted({name.rpartition(".")[0] for name in parts})
    if not names:
        raise ImatrixError(f"{path}: no tensor has data", hint=_HINT)
    entries = {name: _entry(f"{path}: {name}", parts.get(name + _SUMS), parts.get(name + _COUNTS)) for name in names}
    return Imatrix(path, tuple(str(name) for name in datasets if name), chunk_count, chunk_size, entries)


def _entry(what: str, sums: NDArray[Any] | None, counts: NDArray[Any] | None) -> Entry:
    if sums is None or counts is None:
        raise ImatrixError(f"{what}: no {_SUMS if sums is None else _COUNTS} tensor", hint=_HINT)
    if sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ImatrixError(f"{what}: sums are {sums.dtype} and counts {counts.dtype}, expected float32", hint=_HINT)
    if not sums.size or not counts.size or sums.size % counts.size:
        raise ImatrixError(f"{what}: {sums.size} sums do not divide into {counts.size} matrices", hint=_HINT)
    return Entry(sums.reshape(counts.size, -1), counts.reshape(-1))


class _Cursor:
    """Takes little-endian values off mapped bytes, from the start to the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._data = np.asarray(np.memmap(path, np.uint8, "r"))

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, what: str, n: int) -> NDArray[np.uint8]:
        if not 0 <= n <= self.left:
            raise ImatrixError(f"{self._path}: {what} should take {n} bytes, {self.left} are left", hint=_HINT)
        self._at += n
        return self._data[self._at - n : self._at]

    def int32(self, what: str) -> int:
        return int(self.take(what, 4).view("<i4")[0])

    def text(self, what: str) -> str:
        return self.take(what, self.int32(what)).tobytes().decode(errors="replace")


def _read_dat(path: Path) -> Imatrix:
    cursor = _Cursor(path)
    entries: dict[str, Entry] = {}
    n = cursor.int32("the number of entries")
    for i in range(n):
        name = cursor.text(f"the name of entry {i + 1} of {n}")
        n_call, n_values = (cursor.int32(name) for _ in range(2))
        if name in entries or n_call < 0 or n_values < 1:
            fault = "is there twice" if name in entries else f"has {n_values} values from {n_call} calls"
            raise ImatrixError(f"{path}: {name} {fault}", hint=_HINT)
        values = cursor.take(name, 4 * n_values).view("<f4")
        # llama-quantize divides by n_call only if there is one.
        entries[name] = Entry(values[None], np.array([max(n_call, 1)], np.float32))
    if not entries:
        raise ImatrixError(f"{path}: {n} entries", hint=_HINT)
    chunk_count, dataset = 0, ""
    if cursor.left:
        chunk_count, dataset = cursor.int32("the number of chunks"), cursor.text("the dataset's name")
    if cursor.left or chunk_count < 0:
        raise ImatrixError(f"{path}: {cursor.left} bytes after the end, {chunk_count} chunks", hint=_HINT)
    return Imatrix(path, (dataset,) if dataset else (), chunk_count, 0, entries)


def write(imatrix: Imatrix, path: Path) -> None:
    """Write the GGUF form, tensors in imatrix.cpp's order; whole or not at all. Raises OutputError."""
    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(part, arch="")  # no general.architecture
    writer.add_type("imatrix")
    # llama-quantize wants the key to be there, and gguf-py does not write an empty array.
    writer.add_array(Keys.IMatrix.DATASETS, list(imatrix.datasets) or [""])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, imatrix.chunk_count)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
            # ggml drops outer dimensions of 1.
            writer.add_tensor(name + suffix, np.asarray(values if len(values) > 1 else values[0], np.float32))
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"{path}: {error.strerror or error}", hint="Check the folder and its free space.") from error


def importance(entry: Entry, prior: str, n0: float = N0) -> Floats:
    """E[x^2] of each input channel, [n_matrix, columns] float32, from an entry that saw a token.

    "flat" is llama-quantize's, bit for bit: sums / counts, and 1.0 throughout for an expert that saw no token. One that
    saw few is trusted as much as one that saw all.

    "pooled" gives every expert n0 tokens more of what the tensor's experts saw together,

        (sums + n0 * pooled) / (counts + n0)        pooled = sums of all experts / counts of all experts

    Experts read the same residual stream: its strong channels are strong for all of them. Where channels are each
    expert's own, only the level carries over, and pooled is averaged over channels. A dense tensor has nothing to
    borrow: sums / counts.
    """
    assert prior in PRIORS
    counts = entry.counts[:, None]
    if prior == "flat" or len(entry.counts) == 1:
        return np.divide(entry.sums, counts, out=np.ones(entry.sums.shape, np.float32), where=counts > 0)
    pooled = entry.sums.sum(axis=0, dtype=np.float64) / entry.counts.sum(dtype=np.float64)
    if not entry.shared:
        pooled = pooled.mean()
    weight = np.float64(n0) if entry.counted else np.where(counts > 0, 0.0, 1.0)
    return np.asarray((entry.sums + weight * pooled) / (counts + weight), np.float32)
