"""Server-sent events: how records are framed, and the response that sends them.

    data: {"compact":"JSON"}\n\n                     JsonEvent of OpenAI's: one line, because some clients parse by line
    event: name\ndata: {...}\n\n                     JsonEvent of Anthropic's and of the Responses dialect's
    data: [DONE]\n\n                                 TextEvent
    : keep-alive\n\n                                 Comment; no `{`, no fields, or clients choke on it

Every chunk of the response is one or more whole records and is written at once. The response ends with its records,
when the client leaves, or when the client has not taken what was written for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from anyio import fail_after
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepgguf.errors import StepggufError
from stepgguf.server.config import ServerConfig
from stepgguf.server.http.disconnect import wait_for_disconnect

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JsonEvent:
    """An event whose data is JSON. `name`, if there is one, goes on a line `event:` before the data."""

    data: Mapping[str, Any]
    name: str | None = None

    def frame(self) -> bytes:
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {one_line(self.data)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class TextEvent:
    """An event whose data is `text` as it stands, which has no line end."""

    text: str

    def frame(self) -> bytes:
        return f"data: {self.text}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Comment:
    """A record that clients pass over. `text` has no line end."""

    text: str

    def frame(self) -> bytes:
        return f": {self.text}\n\n".encode()


Record = JsonEvent | TextEvent | Comment
Chunks = AsyncGenerator[Iterable[Record], None]  # records that come at the same time, and so go out in one write
KEEP_ALIVE = Comment("keep-alive")


def one_line(data: object) -> str:
    """Return JSON on one line, also for clients that take Unicode's line ends for line ends (str.splitlines)."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


class EventStream(Response):
    """Sends the records of `chunks`, and `ping` while there are none.

    An error that `chunks` raise ends the stream; its last records must have told the client. One that is the server's
    own fault is logged with its trace id.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, config: ServerConfig, *, ping: Record = KEEP_ALIVE) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # Starlette has counted an empty body
        self._chunks, self._config, self._ping = chunks, config, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(scope, send))
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            writing.cancel()
            results = await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._chunks.aclose()
        if isinstance(results[0], Exception):  # what writing failed with; to be cancelled is no Exception
            raise results[0]

    async def _write(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        seconds = self._config.slow_client_seconds
        await send(start)
        try:
            async with aclosing(self._with_pings(self._framed(scope))) as chunks:
                async for chunk in chunks:
                    with fail_after(seconds):  # not asyncio.wait_for, which before Python 3.12 may lose a cancel
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            with fail_after(seconds):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("%s: the client has read nothing for %g s and is let go", scope["state"]["trace"], seconds)

    async def _framed(self, scope: Scope) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of each chunk that has records; the stream ends where `chunks` raise."""
        try:
            async for records in self._chunks:
                if chunk := b"".join(record.frame() for record in records):
                    yield chunk  # no chunk for reasoning that is not shown: pings go on meanwhile
        except Exception as error:
            if not isinstance(error, StepggufError):
                log.exception("%s failed", scope["state"]["trace"])

    async def _with_pings(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield the chunks, and a ping whenever none came for keep_alive_seconds."""
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                # Waited for and not awaited: a timeout must not cancel the generator in its middle.
                pending = pending or asyncio.ensure_future(anext(chunks))
                done, _ = await asyncio.wait({pending}, timeout=self._config.keep_alive_seconds)
                if not done:
                    yield self._ping.frame()
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
