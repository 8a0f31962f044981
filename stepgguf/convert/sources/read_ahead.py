"""Ranges of remote files that are read in the background, a few connections at a time, until they are asked for.

A range is one key: it is given to whoever asks for just these bytes. Those that nobody asks for (a layer's experts that
no token chose) are dropped when so many others have been asked for after them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock

from stepgguf.convert.sources.random_access import RandomAccessFile

CONNECTIONS = 16
MOST_BYTES = 2**28  # of ranges that are not asked for yet
_STALE = 256  # later ranges after which one is dropped
_SMALL, _BLOCK = 2**16, 2**18  # bytes: reads of at most _SMALL (norms, scales) are served from blocks


class ReadAhead:
    """Shared by the files of a repository, and called from many threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="read-ahead")
        self._lock = Lock()
        self._started = self._n_bytes = 0
        self._waiting: OrderedDict[Hashable, tuple[int, int, Future[bytearray]]] = OrderedDict()  # number, bytes

    def start(self, key: Hashable, n_bytes: int, read: Callable[[], bytearray]) -> None:
        """Read n_bytes in the background, unless there are too many already; then whoever asks reads them."""
        with self._lock:
            self._started += 1
            self._drop_stale()
            if key not in self._waiting and self._n_bytes + n_bytes <= MOST_BYTES:
                self._waiting[key] = self._started, n_bytes, self._pool.submit(read)
                self._n_bytes += n_bytes

    def take(self, key: Hashable) -> bytearray | None:
        """What was started under this key, when it is read; None if it was not started. Raises what reading raised."""
        with self._lock:
            future = self._remove(key) if key in self._waiting else None
        return None if future is None or future.cancel() else future.result()

    def close(self) -> None:
        """Drop everything, and wait for what is being read."""
        self._pool.shutdown(cancel_futures=True)

    def _drop_stale(self) -> None:
        while self._waiting:
            key, (number, _, _) = next(iter(self._waiting.items()))
            if number + _STALE > self._started:
                return
            self._remove(key).cancel()

    def _remove(self, key: Hashable) -> Future[bytearray]:
        _, n_bytes, future = self._waiting.pop(key)
        self._n_bytes -= n_bytes
        return future


class BufferedFile:
    """A file that answers late: its ranges are read ahead, and small tensors in blocks that hold their neighbours."""

    def __init__(self, file: RandomAccessFile, ahead: ReadAhead) -> None:
        self.path, self.size, self.version = file.path, file.size, file.version
        self._file, self._ahead = file, ahead
        self._block = lru_cache(maxsize=4)(self._read_block)

    def read_at(self, into: bytearray | memoryview, offset: int, name: str) -> None:
        view = memoryview(into).cast("B")
        if len(view) > _SMALL:
            known = self._ahead.take((self.path, offset, len(view)))
            if known is None:
                self._file.read_at(view, offset, name)
            else:
                view[:] = known
        elif view:
            first, last = offset // _BLOCK, (offset + len(view) - 1) // _BLOCK
            blocks = b"".join(map(self._block, range(first, last + 1)))
            view[:] = blocks[offset - first * _BLOCK :][: len(view)]

    def prefetch_at(self, size: int, offset: int) -> None:
        if size > _SMALL:
            self._ahead.start((self.path, offset, size), size, lambda: self._read_bytes(offset, size, "read ahead"))

    def close(self) -> None:
        self._block.cache_clear()
        self._file.close()

    def _read_block(self, number: int) -> bytearray:
        start = number * _BLOCK
        return self._read_bytes(start, min(_BLOCK, self.size - start), "small tensors")

    def _read_bytes(self, offset: int, n: int, name: str) -> bytearray:
        data = bytearray(n)
        self._file.read_at(data, offset, name)
        return data
