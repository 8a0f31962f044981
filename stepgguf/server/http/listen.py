"""How the application is served: uvicorn, with limits. The command line and the tests use the same."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from stepgguf.runtime.engine import Engine
from stepgguf.server.http.connection import Connection

log = logging.getLogger(__name__)
HEADER_BYTES = 32 * 1024  # of a request's head; browsers and agents stay below 16
KEEP_ALIVE_SECONDS = 30  # an idle connection between two requests
LOOK_SECONDS = 1.0  # between two looks at whether the engine lives
SHUTDOWN_SECONDS = 5  # for answers that are being sent when the server is told to end


def uvicorn_config(app: FastAPI, *, host: str, port: int) -> uvicorn.Config:
    """Return uvicorn's settings. Port 0 is any free one. `Connection` is on h11, which alone bounds a head's size. The
    application logs requests itself."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def serve(app: FastAPI, listener: socket.socket, engine: Engine, *, host: str) -> None:
    """Serve until SIGINT or SIGTERM, which let running answers end, or until the engine has died."""
    server = uvicorn.Server(uvicorn_config(app, host=host, port=listener.getsockname()[1]))

    async def end_with_engine() -> None:
        while engine.stats().alive:
            await asyncio.sleep(LOOK_SECONDS)
        log.error("the engine has died; the server ends")
        server.should_exit = True

    async def serve_and_watch() -> None:
        watching = asyncio.create_task(end_with_engine())
        await server.serve(sockets=[listener])
        watching.cancel()

    with _signals_taken(server):
        asyncio.run(serve_and_watch())


@contextlib.contextmanager
def _signals_taken(server: uvicorn.Server) -> Iterator[None]:
    """Have the signals end the server and nothing else: what comes after the block, saving conversations to disk, must
    still happen. uvicorn takes them itself while it runs, and sends itself the one that ended it again."""

    def end(number: int, _frame: object) -> None:
        server.should_exit = True  # also before uvicorn looks for signals: it asks when it has started

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
