"""The loop: read -> quantize -> measure -> write, unit by unit on a thread pool.

    main thread     submits units in file order, a few ahead, and has the system read their bytes in the background
    workers         pread, check and copy or encode, compare with what was read (the GIL released), pwrite
    journal thread  every few seconds: fdatasync, then the journal

A worker holds one unit: its bytes as stored, and its blocks if it is encoded. The number of workers is cut so that all
of them together stay below the memory limit. Nothing else grows with the model, but an importance matrix's mapped file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.convert.importance import Importance
from stepgguf.convert.journal import FinishedUnit
from stepgguf.convert.plan import PlannedTensor, Unit
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.errors import CorruptTensor, QuantError
from stepgguf.files.disk import disk_errors
from stepgguf.quants.kernels import KernelName, Loss, choose_kernel, decoder_for, scratch_bytes
from stepgguf.quants.types import row_size
from stepgguf.quants.values import Values, widen, widened_runs

DEFAULT_MEMORY = 2 * 2**30
COMMIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Done:
    """One finished unit, for progress: the tensor and how many output bytes it was. `resumed`: by an earlier run."""

    tensor: PlannedTensor
    n_bytes: int
    resumed: bool


Progress = Callable[[Done], None]
Compiling = Callable[[str], None]  # called with a type's name before its kernel is compiled


def run(
    source: TensorSource,
    writer: Writer,
    *,
    progress: Progress = lambda done: None,
    compiling: Compiling = lambda name: None,
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Make every unit that the writer does not have yet, then finish the files.

    On any error or Ctrl+C what is done is committed first; the same call on a new Writer goes on from there.
    """
    workers = n_workers(source, writer.plan.tensors, threads, memory)
    for number in sorted(writer.finished):
        progress(_done(writer, number, resumed=True))
    todo = iter([number for number in range(len(writer.units)) if number not in writer.finished])
    maker = UnitMaker(source, writer.plan.importance, writer.plan.kernel)
    maker.prepare(writer.plan.tensors, compiling)
    running: dict[Future[FinishedUnit], int] = {}
    journal = _Journal(writer)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unit")

    def submit() -> None:
        """Keep the workers busy: one unit each, and as many waiting whose bytes are on their way from the disk."""
        while len(running) < 2 * workers and (number := next(todo, None)) is not None:
            tensor, unit = _unit(writer, number)
            if tensor.source is not None:
                source.prefetch(tensor.source, unit.start, unit.stop)
            running[pool.submit(lambda n: writer.write_unit(n, *maker.make(*_unit(writer, n))), number)] = number

    try:
        with disk_errors(writer.plan.files[0].path):
            submit()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    journal.add(number, future.result())
                    progress(_done(writer, number, resumed=False))
                submit()
                journal.check()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future, number in running.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                journal.add(number, future.result())
        with disk_errors(writer.plan.files[0].path):
            journal.close()
    writer.finish()


def n_workers(source: TensorSource, tensors: Sequence[PlannedTensor], threads: int | None, memory: int) -> int:
    """Threads to use: all cores or `threads`, fewer where `memory` bytes would not hold a unit for each."""
    wanted = threads or os.cpu_count() or 1
    largest = max((unit_memory(source, tensor) for tensor in tensors), default=1)
    return max(1, min(wanted, memory // largest))


def unit_memory(source: TensorSource, tensor: PlannedTensor) -> int:
    """The most bytes that making a unit of it holds.

    A copy holds the unit as it is stored. What is encoded is held as numbers of at most 4 bytes and as blocks; and if
    it is stored as neither F32 nor BF16, as stored too while numbers are made of it. Besides, values.CHUNK values at a
    time are widened, in up to four arrays of float32.
    """
    widened = scratch_bytes(tensor.rows_per_unit * tensor.shape[-1])
    if tensor.source is None or is_copied(source, tensor):
        return tensor.rows_per_unit * tensor.row_bytes + widened
    columns, stored = tensor.shape[-1], source.tensors[tensor.source].ggml_type
    is_view = stored is None or stored in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
    as_stored = 0 if stored is None or is_view else row_size(stored, columns)
    return tensor.rows_per_unit * (as_stored + columns * 4 + tensor.row_bytes) + widened


def is_copied(source: TensorSource, tensor: PlannedTensor) -> bool:
    """Whether the output has the bytes of the source."""
    return tensor.source is not None and (
        source.tensors[tensor.source].ggml_type == tensor.ggml_type and not tensor.plus_one
    )


class UnitMaker:
    """Makes the bytes of a unit. One per run, shared by its threads."""

    def __init__(
        self, source: TensorSource, importance: Importance | None = None, kernel: KernelName = "lanes"
    ) -> None:
        self._source, self._importance, self._kernel = source, importance, kernel

    def prepare(self, tensors: Iterable[PlannedTensor], compiling: Compiling) -> None:
        """Have every kernel that these tensors need, compiled now if this machine never did."""
        wanted: dict[tuple[Any, ...], Values] = {}
        for tensor in tensors:
            if tensor.source is not None and not is_copied(self._source, tensor):
                values = self._source.values(tensor.source, 0, 1)
                key = tensor.ggml_type, type(values), getattr(values, "dtype", None), self._has_importance(tensor)
                wanted.setdefault(key, values)
        for (kind, _, _, weighted), values in wanted.items():
            choose_kernel(kind, self._kernel, weighted=weighted).compile(values, weighted=weighted, compiling=compiling)

    def make(self, tensor: PlannedTensor, unit: Unit) -> tuple[NDArray[np.uint8], Loss | None]:
        """The encoded rows [start, stop), [n, row bytes], and what they lost; of copied ones nothing.

        CorruptTensor on a value that is not finite, QuantError on values that the type cannot hold.
        """
        if tensor.constant is not None:
            return np.frombuffer(tensor.constant, np.uint8).reshape(1, -1), None
        assert tensor.source is not None
        if is_copied(self._source, tensor):
            rows = self._source.raw(tensor.source, unit.start, unit.stop)
            self._check_finite(tensor, unit, decoder_for(tensor.ggml_type).decoded_runs(rows))
            return rows, None
        values = self._source.values(tensor.source, unit.start, unit.stop)
        if tensor.plus_one:
            values = _plus_one(values)
        importance = self._row(tensor, unit)
        kernel = choose_kernel(tensor.ggml_type, self._kernel, weighted=importance is not None)
        out = np.empty((unit.stop - unit.start, tensor.row_bytes), np.uint8)
        try:
            if not kernel.encode(values, out, importance):
                self._check_finite(tensor, unit, widened_runs(values))
        except QuantError as error:
            expert = f", expert {unit.start // tensor.rows_per_expert}" if tensor.n_experts > 1 else ""
            raise QuantError(
                f"{tensor.name}{expert}: {error}", hint="Give this tensor another type in a recipe, such as BF16."
            ) from None
        return out, kernel.measure(values, out, importance) if tensor.is_quantized else None

    def _has_importance(self, tensor: PlannedTensor) -> bool:
        return self._importance is not None and self._importance.has(tensor.name, tensor.shape)

    def _row(self, tensor: PlannedTensor, unit: Unit) -> NDArray[np.float32] | None:
        """The importance of a unit's columns: its expert's."""
        rows = None if self._importance is None else self._importance.rows(tensor.name, tensor.shape)
        return None if rows is None else rows[unit.start // tensor.rows_per_expert if len(rows) > 1 else 0]

    def _check_finite(
        self, tensor: PlannedTensor, unit: Unit, parts: Iterable[tuple[int, NDArray[np.float32]]]
    ) -> None:
        """parts: the unit's values, a run of rows at a time, each with the number of its first row."""
        for first, values in parts:
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                row, column = divmod(int(bad[0]), tensor.shape[-1])
                raise self._corrupt(tensor, unit.start + first + row, column, float(values.flat[bad[0]]), bad.size)

    def _corrupt(self, tensor: PlannedTensor, row: int, column: int, value: float, count: int) -> CorruptTensor:
        expert, row = divmod(row, tensor.rows_per_expert)
        where = (
            f"expert {expert}, row {row}, column {column}" if len(tensor.shape) == 3 else f"row {row}, column {column}"
        )
        if len(tensor.shape) == 1:
            where = f"index {column}"
        return CorruptTensor(
            f"{tensor.source}: {where} is {value} ({count} such values nearby)",
            hint="The source is damaged; download it again.",
        )


def _plus_one(stored: Values) -> NDArray[np.float32]:
    """Norms, which checkpoints store less one."""
    values = np.empty(stored.shape, np.float32)
    widen(stored, values)
    values += 1.0
    return values


class _Journal:
    """Collects finished units and commits them on its own thread, so that a slow disk does not stop the workers."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: dict[int, FinishedUnit] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._commit: Future[None] | None = None
        self._last = time.monotonic()

    def add(self, number: int, unit: FinishedUnit) -> None:
        self._waiting[number] = unit

    def check(self) -> None:
        """Start a commit if one is due; raise what the last one raised."""
        if self._commit is not None and self._commit.done():
            self._commit.result()
            self._commit = None
        if self._commit is None and self._waiting and time.monotonic() - self._last > COMMIT_SECONDS:
            waiting, self._waiting = self._waiting, {}
            self._commit = self._pool.submit(self._writer.commit, waiting)
            self._last = time.monotonic()

    def close(self) -> None:
        try:
            if self._commit is not None:
                self._commit.result()
            if self._waiting:
                self._writer.commit(self._waiting)
        finally:
            self._pool.shutdown()


def _unit(writer: Writer, number: int) -> tuple[PlannedTensor, Unit]:
    unit = writer.units[number]
    return writer.plan.files[unit.file].tensors[unit.tensor], unit


def _done(writer: Writer, number: int, *, resumed: bool) -> Done:
    tensor, unit = _unit(writer, number)
    return Done(tensor, (unit.stop - unit.start) * tensor.row_bytes, resumed)
