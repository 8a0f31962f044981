"""The loop: read -> quantize -> measure -> write, unit by unit on a thread pool.

    main thread     submits units in file order, a few ahead, and has the system read their bytes in the background
    workers         what the tensor's action says: pread, check or encode and measure (the GIL released), pwrite
    journal thread  every few seconds: fdatasync, then the journal

A worker holds one unit: its bytes as stored, and its blocks if it is encoded. The number of workers is cut so that all
of them together stay below the memory limit. Nothing else grows with the model, but an importance matrix's mapped file;
what is read ahead of a network stays below 256 MiB (sources/read_ahead.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.importance import Importance
from stepgguf.convert.journal import FinishedUnit
from stepgguf.convert.plan import Constant, Copy, Encode, PlannedTensor, Unit
from stepgguf.convert.sources.source import TensorSource
from stepgguf.convert.writer import Writer
from stepgguf.errors import CorruptTensor, QuantError
from stepgguf.files.byte_sizes import GIB
from stepgguf.files.disk import disk_errors
from stepgguf.quants.kernels import Kernel, Loss
from stepgguf.quants.values import Values, widen, widened_runs

DEFAULT_MEMORY = 2 * GIB
COMMIT_SECONDS = 2.0
UNITS_AHEAD = 16  # at least: a network answers late, on as many connections as there are units


@dataclass(frozen=True, slots=True)
class UnitProgress:
    """A unit that is made, for progress: its tensor, how many output bytes it has. `resumed`: by an earlier run."""

    tensor: PlannedTensor
    n_bytes: int
    resumed: bool


Progress = Callable[[UnitProgress], None]
Compiling = Callable[[str], None]  # called with a type's name before its kernel is compiled


def make_files(
    source: TensorSource,
    writer: Writer,
    *,
    progress: Progress = lambda unit: None,
    compiling: Compiling = lambda name: None,
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Make every unit that the writer does not have yet, then finish the files, as make_units and Writer.finish do."""
    make_units(source, writer, progress=progress, compiling=compiling, threads=threads, memory=memory)
    writer.finish()


def make_units(
    source: TensorSource,
    writer: Writer,
    *,
    progress: Progress = lambda unit: None,
    compiling: Compiling = lambda name: None,
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Make every unit that the writer does not have yet.

    On any error or Ctrl+C what is done is committed first; the same call on a new Writer goes on from there.
    """
    workers = count_workers(writer.plan.tensors, threads, memory)
    for number in sorted(writer.finished):
        progress(_unit_progress(writer, number, resumed=True))
    todo = [number for number in range(len(writer.units)) if number not in writer.finished]
    maker = RowMaker(source, writer.plan.importance)
    maker.compile_kernels(writer.plan.tensors, compiling)
    with disk_errors(writer.plan.files[0].path), _UnitPool(source, writer, maker, workers) as pool:
        for number in pool.make_units(todo):
            progress(_unit_progress(writer, number, resumed=False))


def count_workers(tensors: Sequence[PlannedTensor], threads: int | None, memory: int) -> int:
    """Threads to use: all cores or `threads`, fewer where `memory` bytes would not hold a unit for each."""
    wanted = threads or os.cpu_count() or 1
    largest = max((tensor.unit_memory for tensor in tensors), default=1)
    return max(1, min(wanted, memory // largest))


class RowMaker:
    """Makes rows of an output tensor, as the tensor's action says. One per run, shared by its threads."""

    def __init__(self, source: TensorSource, importance: Importance | None = None) -> None:
        self._source, self._importance = source, importance

    def compile_kernels(self, tensors: Iterable[PlannedTensor], compiling: Compiling) -> None:
        """Have every kernel that these tensors need, compiled now if this machine never did."""
        needed: dict[tuple[Kernel, str, bool], Encode] = {}
        for tensor in tensors:
            if isinstance(action := tensor.action, Encode):
                needed.setdefault((action.kernel, action.stored.dtype, action.weighted), action)
        for action in needed.values():
            row = self._source.values(action.stored.name, 0, 1)  # numba compiles for what it is given
            action.kernel.compile(row, weighted=action.weighted, compiling=compiling)

    def make_rows(self, tensor: PlannedTensor, start: int, stop: int) -> tuple[NDArray[np.uint8], Loss | None]:
        """Rows [start, stop) of one expert, [n, row bytes], and what encoding them lost; None if they are copied.

        Raises CorruptTensor on a value that is not finite, QuantError on values that the type cannot hold.
        """
        match tensor.action:
            case Constant(data):
                return np.frombuffer(data, np.uint8).reshape(1, -1), None
            case Copy(stored, decoder):
                rows = self._source.raw(stored.name, start, stop)
                _check_finite(tensor, start, decoder.decoded_runs(rows))
                return rows, None
            case Encode() as action:
                return self._encode(tensor, action, start, stop)

    def _encode(
        self, tensor: PlannedTensor, action: Encode, start: int, stop: int
    ) -> tuple[NDArray[np.uint8], Loss | None]:
        values = self._source.values(action.stored.name, start, stop)
        if action.plus_one:
            values = _add_one(values)
        importance = None
        if action.weighted and self._importance is not None:  # an expert's rows share it
            importance = self._importance.expert_row(tensor.name, tensor.shape, start // tensor.rows_per_expert)
        out = encode_values(tensor, action.kernel, values, start, importance)
        return out, action.kernel.measure(values, out, importance) if tensor.is_quantized else None


def encode_values(
    tensor: PlannedTensor, kernel: Kernel, values: Values, start: int, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """The blocks [n, row bytes] of rows [start, start + n) of a tensor. Raises as RowMaker.make_rows does."""
    out = np.empty((values.shape[0], tensor.row_bytes), np.uint8)
    try:
        # Kernels only say that some value is not finite, which costs them nothing; which one it is, is looked for.
        if not kernel.encode(values, out, importance):
            _check_finite(tensor, start, widened_runs(values))
    except QuantError as error:
        expert = f", expert {start // tensor.rows_per_expert}" if tensor.n_experts > 1 else ""
        raise QuantError(
            f"{tensor.name}{expert}: {error}", hint="Give this tensor another type in a recipe, such as BF16."
        ) from None
    return out


def _check_finite(tensor: PlannedTensor, start: int, runs: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
    """Raise CorruptTensor for the first value that is not finite.

    runs: rows of the tensor's values from row `start` on, each run with its first row's number, counted from there.
    """
    for first, values in runs:
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            row, column = divmod(int(bad[0]), tensor.shape[-1])
            raise _corrupt_tensor_error(tensor, start + first + row, column, float(values.flat[bad[0]]), bad.size)


def _corrupt_tensor_error(tensor: PlannedTensor, row: int, column: int, value: float, count: int) -> CorruptTensor:
    expert, row = divmod(row, tensor.rows_per_expert)
    where = f"expert {expert}, row {row}, column {column}" if len(tensor.shape) == 3 else f"row {row}, column {column}"
    if len(tensor.shape) == 1:
        where = f"index {column}"
    return CorruptTensor(
        f"{tensor.source}: {where} is {value} ({count} such values nearby)",
        hint="The source is damaged; download it again.",
    )


def _add_one(stored: Values) -> NDArray[np.float32]:
    """Norms as GGUF has them, of what checkpoints store less one."""
    values = np.empty(stored.shape, np.float32)
    widen(stored, values)
    values += 1.0
    return values


class _UnitPool:
    """Makes units on threads and commits them. However it is left, what is made by then is committed."""

    def __init__(self, source: TensorSource, writer: Writer, maker: RowMaker, workers: int) -> None:
        self._source, self._writer, self._maker, self._workers = source, writer, maker, workers
        self._running: dict[Future[FinishedUnit], int] = {}
        self._committer = _Committer(writer)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="unit")

    def make_units(self, numbers: Iterable[int]) -> Iterator[int]:
        """Make these units in about this order; yield the number of each when it is written."""
        todo = iter(numbers)
        self._submit(todo)
        while self._running:
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                number = self._running.pop(future)  # before it may raise: close looks at what is left here
                self._committer.add(number, future.result())
                yield number
            self._submit(todo)
            self._committer.commit_if_due()

    def _submit(self, todo: Iterator[int]) -> None:
        """Keep the workers busy: one unit each, and others waiting whose bytes are on their way."""
        most = self._workers + max(self._workers, UNITS_AHEAD)
        while len(self._running) < most and (number := next(todo, None)) is not None:
            tensor, unit = _tensor_and_unit(self._writer, number)
            if tensor.source is not None:
                self._source.prefetch(tensor.source, unit.start, unit.stop)
            self._running[self._pool.submit(self._make_unit, number)] = number

    def _make_unit(self, number: int) -> FinishedUnit:
        tensor, unit = _tensor_and_unit(self._writer, number)
        data, loss = self._maker.make_rows(tensor, unit.start, unit.stop)
        return self._writer.write_unit(number, data, loss)

    def __enter__(self) -> _UnitPool:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            self._source.stop_waiting()
        self._pool.shutdown(wait=True, cancel_futures=True)
        # What was written while the error came is as good as the rest.
        for future, number in self._running.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self._committer.add(number, future.result())
        self._committer.close()


class _Committer:
    """Collects finished units and commits them on its own thread, so that a slow disk does not stop the workers."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: dict[int, FinishedUnit] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._commit: Future[None] | None = None
        self._last = time.monotonic()

    def add(self, number: int, unit: FinishedUnit) -> None:
        """Take a unit that is written, to be committed with the next."""
        self._waiting[number] = unit

    def commit_if_due(self) -> None:
        """Start a commit every COMMIT_SECONDS, never two at once; raise what the last one raised."""
        if self._commit is not None and self._commit.done():
            self._commit.result()
            self._commit = None
        if self._commit is None and self._waiting and time.monotonic() - self._last > COMMIT_SECONDS:
            waiting, self._waiting = self._waiting, {}
            self._commit = self._pool.submit(self._writer.commit, waiting)
            self._last = time.monotonic()

    def close(self) -> None:
        """Wait for the commit that is running, then commit the rest."""
        try:
            if self._commit is not None:
                self._commit.result()
            if self._waiting:
                self._writer.commit(self._waiting)
        finally:
            self._pool.shutdown()


def _tensor_and_unit(writer: Writer, number: int) -> tuple[PlannedTensor, Unit]:
    unit = writer.units[number]
    return writer.plan.files[unit.file].tensors[unit.tensor], unit


def _unit_progress(writer: Writer, number: int, *, resumed: bool) -> UnitProgress:
    tensor, unit = _tensor_and_unit(writer, number)
    return UnitProgress(tensor, (unit.stop - unit.start) * tensor.row_bytes, resumed)
