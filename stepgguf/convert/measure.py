"""What each tensor would lose as each type: measured on a sample of its rows, before anything is decided.

    energy[t]   = sum over experts of  share[expert] * sum over rows of  sum_j w_j x_j^2
    error[t, k] = the same sum of      w_j (x_j - q_j)^2  / energy[t]       q = decode(encode(x)) as type k

w_j is the importance of input channel j for the expert, E[input_j^2], and share the part of the tokens that it gets; so
energy predicts the tensor's squared output for a token that uses it (channels taken as independent), and error what
part of that is lost. Without an imatrix w and share are uniform, and energy has no unit to be compared by.

Rows are sampled in runs of 8, spread evenly: one run for each of 288 experts, at another place in each, and 32 runs of
a dense tensor. On the embedded model the error of one run (Q3_K, Q5_K) has a standard error of 2 to 8 %, and of
ffn_down, where few channels hold most of the energy, 9 to 74 %. So 32 runs are right within 2 %, of a dense ffn_down
within 7 %, and 288 runs of ffn_down_exps within 5 %. All types are measured on the same rows, so much of that cancels
between them. Of the real model that is 1.3 G values to encode as each type.

What is measured is kept in a file of JSON lines, so that another budget costs nothing and Ctrl+C loses one tensor:

    line 1      {"version", "source": identity of the source, "importance": of the imatrix or null}
    then        {"tensor": name, "energy": number, "errors": {type: number}}      the last line on a tensor counts
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from stepgguf.convert.importance import Importance
from stepgguf.convert.pipeline import Compiling, RowMaker
from stepgguf.convert.plan import PlannedTensor
from stepgguf.convert.sources.source import TensorSource, rows_per_expert
from stepgguf.errors import StepggufError
from stepgguf.files import folders
from stepgguf.files.disk import disk_errors
from stepgguf.files.json_lines import Line, LineWriter, read_lines
from stepgguf.files.jsonread import Value
from stepgguf.quants.kernels import Loss
from stepgguf.quants.types import TABLE, fitting_type, quant_type

T = GGMLQuantizationType

# Those that need an imatrix are left out where a tensor has none.
MEASURED_TYPES = tuple(row.ggml_type for row in TABLE if row.measured)
RUN_ROWS = 8
MIN_RUNS = 32  # of a tensor, and at least one of each expert
_VERSION = 1
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, less their whole parts, fill [0, 1) evenly however many there are


@dataclass(frozen=True, slots=True)
class TensorErrors:
    """One tensor: `energy` of its output per token, and the relative error of each type that it can have."""

    energy: float
    errors: Mapping[GGMLQuantizationType, float]


_UNMEASURED = TensorErrors(0.0, {})


@dataclass(frozen=True, slots=True)
class _SampledRows:
    """Rows [start, stop) inside one expert. `weight`: how many rows' worth of the expert's share a row stands for."""

    tensor: PlannedTensor
    start: int
    stop: int
    weight: float


Variants = Mapping[GGMLQuantizationType, PlannedTensor]  # one tensor, as each of its types
Losses = Mapping[GGMLQuantizationType, Loss | None]  # None: the source has this type, nothing is lost
Progress = Callable[[PlannedTensor, bool], None]  # a tensor is done; whether it was kept from an earlier time


def measure_errors(
    source: TensorSource,
    tensors: Sequence[PlannedTensor],
    cache: Path,
    *,
    importance: Importance | None = None,
    threads: int | None = None,
    progress: Progress = lambda tensor, kept: None,
    compiling: Compiling = lambda name: None,
) -> dict[str, TensorErrors]:
    """Name -> what was measured, for each tensor, with every type of `possible_types`.

    `progress` is called as each is done, at once where `cache` has it. CorruptTensor on values that are not finite.
    """
    types = {tensor.name: possible_types(tensor.name, tensor.shape, importance) for tensor in tensors}
    with _ErrorsFile(cache, _cache_key(source, importance)) as known:
        todo = [t for t in tensors if not types[t.name] <= known.measured.get(t.name, _UNMEASURED).errors.keys()]
        for tensor in tensors:
            if tensor not in todo:
                progress(tensor, True)
        variants = {t.name: {g: t.as_type(g, importance) for g in types[t.name]} for t in todo}
        maker = RowMaker(source, importance)
        maker.compile_kernels([tensor for each in variants.values() for tensor in each.values()], compiling)
        samples = [rows for tensor in todo for rows in _sample_rows(tensor, importance)]
        pool = ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="measure")
        try:
            losses = pool.map(lambda rows: _measure_rows(maker, rows, variants[rows.tensor.name]), samples)
            by_tensor = itertools.groupby(zip(samples, losses, strict=True), key=lambda pair: pair[0].tensor)
            for tensor, group in by_tensor:
                known.add(tensor.name, _weigh_losses(group))
                progress(tensor, False)
        except BaseException:
            source.stop_waiting()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return {tensor.name: known.measured[tensor.name] for tensor in tensors}


def possible_types(
    name: str, shape: tuple[int, ...], importance: Importance | None, *, has_imatrix: bool | None = None
) -> set[GGMLQuantizationType]:
    """The types that a tensor can have: MEASURED_TYPES, or what replaces them in its rows, if they have their imatrix.

    has_imatrix: whether there shall be one with this tensor; None: whether `importance` has it.
    """
    fitting = {fitting_type(ggml_type, shape[-1]) for ggml_type in MEASURED_TYPES}
    if has_imatrix is None:
        has_imatrix = importance is not None and importance.has(name, shape)
    if has_imatrix:
        return fitting
    return {ggml_type for ggml_type in fitting if not quant_type(ggml_type).imatrix}


def _sample_rows(tensor: PlannedTensor, importance: Importance | None) -> list[_SampledRows]:
    """The sample: `count` runs in each expert, evenly spaced, shifted from expert to expert."""
    shares, result = _token_shares(tensor, importance), []
    for expert in range(tensor.n_experts):
        runs = sample_runs(tensor.shape, expert)
        weight = shares[expert] * tensor.rows_per_expert / sum(stop - start for start, stop in runs)
        result += [_SampledRows(tensor, start, stop, weight) for start, stop in runs]
    return result


def sample_runs(shape: tuple[int, ...], expert: int) -> list[tuple[int, int]]:
    """The [start, stop) of the runs that are sampled of an expert's rows; of a dense tensor's with expert 0."""
    rows = rows_per_expert(shape)
    length, count = _sample_size(rows, math.prod(shape[:-2]))
    spacing = rows / count
    # At other rows in each expert, or all 288 would be judged by a matrix's first rows.
    first = expert * rows + expert * _GOLDEN % 1 * (spacing - length)
    return [(start, start + length) for start in (int(first + i * spacing) for i in range(count))]


def count_sampled_values(shape: tuple[int, ...]) -> int:
    """Values of a tensor that `measure` reads."""
    rows = rows_per_expert(shape)
    length, count = _sample_size(rows, math.prod(shape[:-2]))
    return math.prod(shape[:-2]) * count * length * shape[-1]


def _sample_size(rows: int, n: int) -> tuple[int, int]:
    """Rows of a run, and runs of each of n experts with so many rows."""
    length = min(RUN_ROWS, rows)
    return length, min(-(-MIN_RUNS // n), rows // length)


def _token_shares(tensor: PlannedTensor, importance: Importance | None) -> list[float]:
    """The part of the tokens that each expert gets."""
    counts = importance.counts(tensor.name, tensor.shape) if importance is not None else None
    tokens = np.ones(tensor.n_experts) if counts is None else counts.astype(np.float64)
    return [float(share) for share in tokens / tokens.sum()]


def _measure_rows(maker: RowMaker, rows: _SampledRows, variants: Variants) -> Losses:
    """What is lost by encoding these rows as each type, just as the pipeline does."""
    return {ggml_type: maker.make_rows(tensor, rows.start, rows.stop)[1] for ggml_type, tensor in variants.items()}


def _weigh_losses(group: Iterable[tuple[_SampledRows, Losses]]) -> TensorErrors:
    """One tensor's runs, weighted by the rows that they stand for."""
    energy, lost = 0.0, dict[GGMLQuantizationType, float]()
    for rows, losses in group:
        energy += rows.weight * max(loss.energy for loss in losses.values() if loss is not None)
        for ggml_type, loss in losses.items():
            lost[ggml_type] = lost.get(ggml_type, 0.0) + (rows.weight * loss.weighted if loss is not None else 0.0)
    # A tensor of zeros loses nothing.
    return TensorErrors(energy, {ggml_type: lost[ggml_type] / energy if energy else 0.0 for ggml_type in sorted(lost)})


def cache_path(source: TensorSource, importance: Importance | None) -> Path:
    """Where errors of this source with this importance are kept."""
    digest = hashlib.sha256(json.dumps(_cache_key(source, importance), sort_keys=True).encode()).hexdigest()
    return folders.measurements() / f"{digest[:16]}.jsonl"


def _cache_key(source: TensorSource, importance: Importance | None) -> dict[str, Any]:
    """What the errors belong to."""
    identity = importance.identity() if importance is not None else None
    return {"version": _VERSION, "source": source.identity(), "importance": identity}


class _ErrorsFile:
    """The file of what was measured, appended to as it comes in. One that belongs to something else is begun anew."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, key
        self.measured: dict[str, TensorErrors] = {}
        self._lines: LineWriter | None = None

    def __enter__(self) -> _ErrorsFile:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            first, *others = map(_parse_line, read_lines(self._path)) if self._path.exists() else [None]
            if first is not None and first.raw == self._key:
                self.measured = dict(read for record in others if record and (read := _read_record(record)))
                self._lines = LineWriter(self._path.open("ab"))
            else:
                self._lines = LineWriter(self._path.open("wb"))
                self._lines.append(self._key)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._lines is not None
        self._lines.close()

    def add(self, name: str, measured: TensorErrors) -> None:
        """Keep what was measured of a tensor, here and in the file."""
        self.measured[name] = measured
        errors = {ggml_type.name: error for ggml_type, error in measured.errors.items()}
        assert self._lines is not None
        with disk_errors(self._path):
            self._lines.append({"tensor": name, "energy": measured.energy, "errors": errors})


def _parse_line(line: Line) -> Value | None:
    """A line's document; None for one that was cut off."""
    try:
        return line.parse(StepggufError)
    except StepggufError:
        return None


def _read_record(record: Value) -> tuple[str, TensorErrors] | None:
    """A tensor's name and its errors; None for a line of another shape, whose tensor is measured again."""
    try:
        errors = {GGMLQuantizationType[name]: error.number(0.0) for name, error in record["errors"].members()}
        return record["tensor"].text(), TensorErrors(record["energy"].number(0.0), errors)
    except (StepggufError, KeyError):
        return None
