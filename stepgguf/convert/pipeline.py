"""The loop: read -> widen -> quantize -> write, unit by unit on a thread pool.

    main thread     submits units in file order, a few ahead, and has the kernel read their bytes in the background
    workers         pread, widen to float32, check, encode (ggml, GIL released), pwrite
    journal thread  every few seconds: fdatasync, then the journal

A worker holds one unit: its stored bytes, its float32 values and its blocks. The number of workers is cut so that all
of them together stay below the memory limit. Nothing else grows with the model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.plan import PlannedTensor, Unit
from stepgguf.convert.source import TensorSource
from stepgguf.convert.writer import Writer, disk_errors
from stepgguf.errors import CorruptTensor
from stepgguf.quants import codec

DEFAULT_MEMORY = 2 * 2**30
COMMIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Done:
    """One finished unit, for progress: the tensor and how many output bytes it was. `resumed`: by an earlier run."""

    tensor: PlannedTensor
    n_bytes: int
    resumed: bool


Progress = Callable[[Done], None]


def run(
    source: TensorSource,
    writer: Writer,
    *,
    progress: Progress = lambda done: None,
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> None:
    """Make every unit that the writer does not have yet, then finish the files.

    On any error or Ctrl+C what is done is committed first; the same call on a new Writer goes on from there.
    """
    workers = n_workers(writer, threads, memory)
    for number in sorted(writer.digests):
        progress(_done(writer, number, resumed=True))
    todo = iter([number for number in range(len(writer.units)) if number not in writer.digests])
    maker = UnitMaker(source)
    running: dict[Future[bytes], int] = {}
    journal = _Journal(writer)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unit")

    def submit() -> None:
        """Keep the workers busy: one unit each, and as many waiting whose bytes are on their way from the disk."""
        while len(running) < 2 * workers and (number := next(todo, None)) is not None:
            tensor, unit = _unit(writer, number)
            if tensor.source is not None:
                source.prefetch(tensor.source, unit.start, unit.stop)
            running[pool.submit(lambda n: writer.write(n, maker.make(*_unit(writer, n)).data), number)] = number

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


def n_workers(writer: Writer, threads: int | None, memory: int) -> int:
    """Threads to use: all cores or `threads`, fewer where `memory` bytes would not hold a unit for each."""
    wanted = threads or os.cpu_count() or 1
    largest = max((unit_memory(tensor) for tensor in writer.plan.tensors), default=1)
    return max(1, min(wanted, memory // largest))


def unit_memory(tensor: PlannedTensor) -> int:
    """The most bytes that making a unit of it holds: stored (at most 4 bytes a value), float32, encoded."""
    return tensor.rows_per_unit * (tensor.shape[-1] * 8 + tensor.row_bytes)


class UnitMaker:
    """Makes the bytes of a unit. One per run; each thread has its own float32 buffer, used again for each unit."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._local = threading.local()

    def make(self, tensor: PlannedTensor, unit: Unit) -> NDArray[np.uint8]:
        """The encoded rows [start, stop), [n, row bytes]. CorruptTensor on a value that is not finite."""
        if tensor.constant is not None:
            return np.frombuffer(tensor.constant, np.uint8).reshape(1, -1)
        assert tensor.source is not None
        stored = self._source.tensors[tensor.source]
        values = self._floats(unit.stop - unit.start, tensor.shape[-1])
        if stored.ggml_type == tensor.ggml_type and not tensor.plus_one:
            data = self._source.raw(tensor.source, unit.start, unit.stop)
            codec.dequantize(tensor.ggml_type, data, values)
            self._check_finite(tensor, unit, values)
            return data
        self._source.floats(tensor.source, unit.start, unit.stop, values)
        self._check_finite(tensor, unit, values)
        if tensor.plus_one:
            values += 1.0
        out = np.empty((unit.stop - unit.start, tensor.row_bytes), np.uint8)
        codec.quantize(tensor.ggml_type, values, out)
        return out

    def _floats(self, rows: int, columns: int) -> NDArray[np.float32]:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < rows * columns:
            buffer = self._local.buffer = np.empty(rows * columns, np.float32)
        view: NDArray[np.float32] = buffer[: rows * columns].reshape(rows, columns)
        return view

    def _check_finite(self, tensor: PlannedTensor, unit: Unit, values: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # one pass; only a sum that is not finite needs a closer look
                return
        bad = np.flatnonzero(~np.isfinite(values))
        if not bad.size:
            return
        row, column = divmod(int(bad[0]), tensor.shape[-1])
        expert, row = divmod(unit.start + row, tensor.rows_per_expert)
        where = (
            f"expert {expert}, row {row}, column {column}" if len(tensor.shape) == 3 else f"row {row}, column {column}"
        )
        if len(tensor.shape) == 1:
            where = f"index {column}"
        raise CorruptTensor(
            f"{tensor.source}: {where} is {values.flat[bad[0]]} ({bad.size} such values nearby)",
            hint="The checkpoint is damaged; download the shard again.",
        )


class _Journal:
    """Collects finished units and commits them on its own thread, so that a slow disk does not stop the workers."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._commit: Future[None] | None = None
        self._last = time.monotonic()

    def add(self, number: int, digest: bytes) -> None:
        self._waiting[number] = digest

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
