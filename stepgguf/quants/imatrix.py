"""Importance matrices: how strongly each input channel of each matrix is driven, measured on calibration text.

A weight's rounding error reaches the output times its input channel: encoders weigh the error of column j by E[x_j^2].
llama.cpp's imatrix tool sums x^2 per tensor, for routed experts per expert over the tokens routed to it. Two forms:

    GGUF    keys     general.type "imatrix"   imatrix.datasets [str]   imatrix.chunk_count u32   imatrix.chunk_size u32
                     imatrix.n_layer_nextn u32 (newer: MTP blocks that were run)
            tensors  NAME.in_sum2  F32 [n_matrix, columns]  sums of x^2
                     NAME.counts   F32 [n_matrix, 1]        tokens that the matrix saw
                     NAME.in_sum   F32 [n_matrix, columns]  sums of x (newer; written where known, and not read: nothing
                                                            here needs them). Other suffixes are passed over
    .dat    n_entries i32
            n_entries x  length i32  NAME  n_call i32  n_values i32  values f32 = sum / count * n_call
            chunk_count i32  length i32  dataset                   (early files end before this)

The .dat form has no count per expert and no shape. It is kept as it is, as one matrix of all values with n_call as its
count, and `Imatrix.entry_of` cuts it to the tensor's shape. It does mark experts that no token reached: all values 1.0.

Sources: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and load_imatrix in tools/quantize/quantize.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys
from numpy.typing import NDArray

from stepgguf.errors import GGUFError, ImatrixError, OutputError
from stepgguf.files import disk, gguf_header
from stepgguf.files.gguf_header import Key, TensorInfo
from stepgguf.files.jsonread import shown
from stepgguf.model.names import TensorName
from stepgguf.quants import ImatrixPrior

Floats = NDArray[np.float32]

# Tokens' worth of prior in an expert's importance, and the tokens below which an expert is called thin. Both by output
# error (Q4_K) on held-out dialogues, for experts of the embedded model that were shown 0 to 256 tokens: gate and up do
# best with 8 to 32, down with 2 to 8. With 8, down is 26 % above full calibration at 128 tokens, 17 % at 256.
PRIOR_TOKENS = 8.0
THIN_TOKENS = 256

# An expert's down projection reads its own hidden units: channel j of one expert has nothing to do with j of another.
_OWN_CHANNELS = frozenset({"ffn_down_exps"})

_SUMS, _COUNTS, _LINEAR = ".in_sum2", ".counts", ".in_sum"
_N_MTP = "imatrix.n_layer_nextn"
_F32, _V = GGMLQuantizationType.F32, GGUFValueType
_HINT = "An importance matrix is what `stepgguf imatrix` or llama-imatrix writes: a GGUF, or the older .dat."


@dataclass(frozen=True, eq=False, slots=True)
class ImatrixEntry:
    """One tensor's sums of x^2 [n_matrix, columns] over the counts [n_matrix] of tokens that each matrix saw.

    n_matrix is the number of experts, 1 for a dense tensor.
    counted: False where the tokens of each expert are unknown. counts then tell which experts were seen, and
        sums / counts is their mean all the same.
    shared: whether column j is the same channel for every expert. See `channel_importance`.
    linear: sums of x, of the shape of the sums; None where they are unknown.
    """

    sums: Floats
    counts: Floats
    counted: bool = True
    shared: bool = True
    linear: Floats | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Imatrix:
    """An importance matrix. entries: GGUF tensor name -> what was recorded of it.

    path: None for one that was just collected. chunk_size: 0 where the file does not say it (.dat). n_mtp: MTP blocks
    that were run; 0 where the file says nothing.
    """

    path: Path | None
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    entries: Mapping[str, ImatrixEntry]
    n_mtp: int = 0

    def entry_of(self, name: TensorName, shape: tuple[int, ...]) -> ImatrixEntry | None:
        """A tensor's entry, [n_matrix, columns]. None if there is none, or if it saw no token.

        Raises ImatrixError if what was recorded has another shape.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        n_matrix, columns = expected = shape[0] if len(shape) == 3 else 1, shape[-1]
        if len(found.counts) == 1 and found.sums.size == n_matrix * columns:
            found = _split_experts(found, n_matrix)
        elif found.sums.shape != expected:
            raise ImatrixError(
                f"{self.path}: {name} has {_shape_text(found.sums.shape)} values, expected {_shape_text(expected)}",
                hint="This importance matrix was made from another model.",
            )
        return replace(found, shared=name.role not in _OWN_CHANNELS) if found.counts.any() else None


def _split_experts(entry: ImatrixEntry, n: int) -> ImatrixEntry:
    """One matrix of all experts' values, split into n. Experts whose means are all exactly 1.0 were not seen."""
    if n == 1:
        return entry
    sums = entry.sums.reshape(n, -1)
    # A mean of 1.0 is stored as n_call, which is the count here.
    seen = (sums != entry.counts).any(axis=1)
    return ImatrixEntry(np.where(seen[:, None], sums, np.float32(0)), np.where(seen, entry.counts, 0), counted=False)


def _shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def read_imatrix(path: Path) -> Imatrix:
    """Map an importance matrix of either form into memory, and check every value. Raises ImatrixError."""
    try:
        with disk.open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise ImatrixError(f"{path}: {error.strerror or error}", hint="Check the path.") from error
    if not magic:
        raise ImatrixError(f"{path}: the file is empty", hint=_HINT)
    imatrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    for name, entry in imatrix.entries.items():
        _check_values(f"{path}: {name}", entry)
    return imatrix


def _check_values(what: str, entry: ImatrixEntry) -> None:
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


def _read_gguf(path: Path) -> Imatrix:
    try:
        header = gguf_header.read(path)
    except GGUFError as error:
        raise ImatrixError(error.message, hint=_HINT) from error

    def value_of(key: str, expected: type) -> Any:
        value = header.get(key)
        if not isinstance(value, expected):
            raise ImatrixError(f"{path}: {key} is {shown(value)}, expected {expected.__name__}", hint=_HINT)
        return value

    datasets = value_of(Keys.IMatrix.DATASETS, list)
    chunk_count, chunk_size = value_of(Keys.IMatrix.CHUNK_COUNT, int), value_of(Keys.IMatrix.CHUNK_SIZE, int)
    infos = {info.name: info for info in header.tensors if info.name.endswith((_SUMS, _COUNTS))}
    names = sorted({name.rpartition(".")[0] for name in infos})
    if not names:
        raise ImatrixError(f"{path}: no tensor has data", hint=_HINT)
    data = np.asarray(np.memmap(path, np.uint8, "r"))[header.data_start :]
    entries = {
        name: _read_entry(f"{path}: {name}", infos.get(name + _SUMS), infos.get(name + _COUNTS), data) for name in names
    }
    n_mtp = value_of(_N_MTP, int) if _N_MTP in header.keys else 0
    return Imatrix(path, tuple(str(name) for name in datasets if name), chunk_count, chunk_size, entries, n_mtp)


def _read_entry(what: str, sums: TensorInfo | None, counts: TensorInfo | None, data: NDArray[np.uint8]) -> ImatrixEntry:
    if sums is None or counts is None:
        raise ImatrixError(f"{what}: no {_SUMS if sums is None else _COUNTS} tensor", hint=_HINT)
    if (sums.ggml_type, counts.ggml_type) != (_F32, _F32):
        found = f"sums are {sums.ggml_type.name} and counts {counts.ggml_type.name}"
        raise ImatrixError(f"{what}: {found}, expected {_F32.name}", hint=_HINT)
    if sums.n_values % counts.n_values:
        raise ImatrixError(f"{what}: {sums.n_values} sums do not divide into {counts.n_values} matrices", hint=_HINT)
    values, n_tokens = (data[t.offset : t.offset + t.n_bytes].view(np.float32) for t in (sums, counts))
    return ImatrixEntry(values.reshape(len(n_tokens), -1), n_tokens)


class _DatReader:
    """Takes little-endian values off a mapped .dat file, from its start to its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._data = np.asarray(np.memmap(path, np.uint8, "r"))

    @property
    def n_left(self) -> int:
        """Bytes that were not taken yet."""
        return len(self._data) - self._at

    def take_bytes(self, what: str, n: int) -> NDArray[np.uint8]:
        """The next n bytes. ImatrixError, which says `what` they should have been, if there are fewer."""
        if not 0 <= n <= self.n_left:
            raise ImatrixError(f"{self._path}: {what} should take {n} bytes, {self.n_left} are left", hint=_HINT)
        self._at += n
        return self._data[self._at - n : self._at]

    def take_int32(self, what: str) -> int:
        return int(self.take_bytes(what, 4).view("<i4")[0])

    def take_text(self, what: str) -> str:
        return self.take_bytes(what, self.take_int32(what)).tobytes().decode(errors="replace")


def _read_dat(path: Path) -> Imatrix:
    dat = _DatReader(path)
    entries: dict[str, ImatrixEntry] = {}
    n = dat.take_int32("the number of entries")
    for i in range(n):
        name = dat.take_text(f"the name of entry {i + 1} of {n}")
        n_call, n_values = (dat.take_int32(name) for _ in range(2))
        if name in entries or n_call < 0 or n_values < 1:
            fault = "is there twice" if name in entries else f"has {n_values} values from {n_call} calls"
            raise ImatrixError(f"{path}: {name} {fault}", hint=_HINT)
        values = dat.take_bytes(name, 4 * n_values).view("<f4")
        # llama-quantize divides by n_call only if there is one.
        entries[name] = ImatrixEntry(values[None], np.array([max(n_call, 1)], np.float32))
    if not entries:
        raise ImatrixError(f"{path}: {n} entries", hint=_HINT)
    chunk_count, dataset = 0, ""
    if dat.n_left:  # an early file ends before this
        chunk_count, dataset = dat.take_int32("the number of chunks"), dat.take_text("the dataset's name")
    if dat.n_left or chunk_count < 0:
        raise ImatrixError(f"{path}: {dat.n_left} bytes after the end, {chunk_count} chunks", hint=_HINT)
    return Imatrix(path, (dataset,) if dataset else (), chunk_count, 0, entries)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write the GGUF form, tensors in imatrix.cpp's order; whole or not at all. Raises OutputError."""
    keys = [
        Key.of("general.type", "imatrix", _V.STRING),
        # llama-quantize wants this key to be there.
        Key.of(Keys.IMatrix.DATASETS, imatrix.datasets or ("",), _V.ARRAY, _V.STRING),
        Key.of(Keys.IMatrix.CHUNK_COUNT, imatrix.chunk_count, _V.UINT32),
        Key.of(Keys.IMatrix.CHUNK_SIZE, imatrix.chunk_size, _V.UINT32),
    ]
    if imatrix.n_mtp:
        keys.append(Key.of(_N_MTP, imatrix.n_mtp, _V.UINT32))
    arrays: dict[str, Floats] = {}
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None]), (_LINEAR, entry.linear)):
            if values is not None:  # ggml drops outer dimensions of 1
                arrays[name + suffix] = np.asarray(values if len(values) > 1 else values[0], np.float32)
    infos, end = [], 0
    for name, array in arrays.items():
        infos.append(TensorInfo(name, array.shape, _F32, end))
        end += array.nbytes + -array.nbytes % GGUF_DEFAULT_ALIGNMENT
    try:
        with disk.replacing(path) as file:
            file.write(gguf_header.encode(keys, infos))
            for array in arrays.values():
                file.write(array.tobytes() + bytes(-array.nbytes % GGUF_DEFAULT_ALIGNMENT))
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}", hint="Check the folder and its free space.") from error


def channel_importance(entry: ImatrixEntry, prior: ImatrixPrior, n0: float = PRIOR_TOKENS) -> Floats:
    """E[x^2] of each input channel, [n_matrix, columns] float32, from an entry that saw a token.

    "flat" is llama-quantize's, bit for bit: sums / counts, and 1.0 throughout for an expert that saw no token. One that
    saw few is trusted as much as one that saw all.

    "pooled" gives every expert n0 tokens more of what the tensor's experts saw together,

        (sums + n0 * pooled) / (counts + n0)        pooled = sums of all experts / counts of all experts

    Experts read the same residual stream: its strong channels are strong for all of them. Where channels are each
    expert's own, only the level carries over, and pooled is averaged over channels. A dense tensor has nothing to
    borrow: sums / counts.
    """
    counts = entry.counts[:, None]
    if prior == "flat" or len(entry.counts) == 1:
        return np.divide(entry.sums, counts, out=np.ones(entry.sums.shape, np.float32), where=counts > 0)
    pooled = entry.sums.sum(axis=0, dtype=np.float64) / entry.counts.sum(dtype=np.float64)
    if not entry.shared:
        pooled = pooled.mean()
    weight = np.float64(n0) if entry.counted else np.where(counts > 0, 0.0, 1.0)
    return np.asarray((entry.sums + weight * pooled) / (counts + weight), np.float32)
