"""Whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from starlette.types import Receive


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def on_disconnect(receive: Receive, call: Callable[[], None]) -> AsyncGenerator[None, None]:
    """Call `call` if the client leaves while the block runs."""

    async def watch() -> None:
        await wait_for_disconnect(receive)
        call()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
