"""A connection that cannot be held for nothing: uvicorn has no limit for how long a request's head may take, and none
for how many connections there are. Whoever opens a thousand and says nothing would use up this process' descriptors.

A connection waits until the head of a request is complete. It is closed when that takes longer than HEAD_SECONDS, or
when there are too many connections and no other has waited longer. One whose request is being answered is left alone.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # for a few kilobytes
MOST_CONNECTIONS = 512


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with a deadline while it waits for a request."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._since = time.monotonic()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for the head of a request, the first or another."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()
        if len(self.connections) > most_connections():
            waiting = [other for other in self.connections if isinstance(other, Connection) and other.is_waiting]
            min(waiting, key=lambda other: other._since).transport.close()

    def data_received(self, data: bytes) -> None:
        """Take bytes. The first of another head, after a pause that uvicorn bounds, start its time."""
        super().data_received(data)
        if not self.is_waiting:
            self._clear_deadline()
        elif self._deadline is None:
            self._set_deadline()

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self.is_waiting:
            self.transport.close()


@functools.cache
def most_connections() -> int:
    """Return how many connections there may be: half of the descriptors that this process may have, if that is less
    than MOST_CONNECTIONS, for files and caches need some."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, descriptors // 2)
