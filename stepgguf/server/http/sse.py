"""Server-sent events: how they are framed, and the response that sends them.

    data: {"compact":"JSON"}\n\n                     OpenAI's: one line, because some clients parse line by line
    event: name\ndata: {...}\n\n                     Anthropic's and the Responses dialect's
    : keep-alive\n\n                                 a comment; no `{`, no fields, or clients choke on it

Every chunk of the response is one or more whole events and is written at once. The response ends with its events, when
the client leaves, or when the client has not taken what was written for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from anyio import fail_after
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepgguf.errors import StepggufError
from stepgguf.server.config import ServerConfig
from stepgguf.server.problem import Problem, problem

log = logging.getLogger(__name__)
Events = AsyncGenerator[bytes, None]
DONE = b"data: [DONE]\n\n"


def comment(text: str) -> bytes:
    """One that clients pass over."""
    return f": {text}\n\n".encode()


COMMENT = comment("keep-alive")


def compact(data: object) -> str:
    """JSON on one line, also for clients that take Unicode's line ends for line ends (str.splitlines)."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One record. With a name it has a line `event:` too."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {compact(data)}\n\n".encode()


class EventStream(Response):
    """events: chunks of whole records. An error that they raise becomes `failure(problem)`, the last chunk; any
    problem that is the server's own fault is logged with its trace id. ping: what is sent while there is nothing."""

    media_type = "text/event-stream"

    def __init__(
        self, events: Events, config: ServerConfig, *, failure: Callable[[Problem], bytes], ping: bytes = COMMENT
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._config, self._failure, self._ping = events, config, failure, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(scope, send))
        leaving = asyncio.create_task(left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            writing.cancel()
            results = await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._events.aclose()
        if isinstance(results[0], Exception):
            raise results[0]

    async def _write(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        seconds = self._config.slow_client_seconds
        await send(start)
        try:
            async with aclosing(self._with_pings(self._told(scope))) as chunks:
                async for chunk in chunks:
                    with fail_after(seconds):  # not asyncio.wait_for, which before Python 3.12 may lose a cancel
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            with fail_after(seconds):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("%s: the client has read nothing for %g s and is let go", scope["state"]["trace"], seconds)

    async def _told(self, scope: Scope) -> Events:
        """The events, and if they fail, that."""
        try:
            async for chunk in self._events:
                if chunk:  # thinking that is not shown is silence, and pings go on
                    yield chunk
        except StepggufError as error:
            yield self._failure(problem(error))
        except Exception as error:
            log.exception("%s failed", scope["state"]["trace"])
            yield self._failure(problem(error))

    async def _with_pings(self, chunks: Events) -> Events:
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(chunks))
                done, _ = await asyncio.wait({pending}, timeout=self._config.keep_alive_seconds)
                if not done:
                    yield self._ping
                    continue
                try:
                    chunk = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                yield chunk
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await chunks.aclose()


async def left(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
