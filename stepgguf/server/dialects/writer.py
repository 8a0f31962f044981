"""From deltas to what goes out: the one protocol of all dialects' writers, and what drives it.

    streamed   start  feed*  (finish | fail)        each gives the records that it adds to the stream
    whole      the same deltas, all at once         WholeAnswerWriter.whole gives the body of the response

A writer knows its dialect's words and nothing of bytes, HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stepgguf.chat.exchange import Reply
from stepgguf.chat.output import Delta
from stepgguf.server.generation import AnswerPart, Generation
from stepgguf.server.http.sse import KEEP_ALIVE, Chunks, EventStream, Record
from stepgguf.server.problem import Problem, problem_of
from stepgguf.server.service import Service


class AnswerWriter(Protocol):
    """Writes the answers of one request as a stream. A writer may compute records only when they are read."""

    def start(self) -> Iterable[Record]:
        """Give what comes before the first token."""

    def feed(self, part: AnswerPart) -> Iterable[Record]:
        """Give what a part of an answer adds; it may be nothing."""

    def finish(self, replies: Sequence[Reply]) -> Iterable[Record]:
        """Give the end. `replies` are complete and did not fail."""

    def fail(self, problem: Problem) -> Iterable[Record]:
        """Give the end of a stream in which something went wrong, after whatever was fed."""


class WholeAnswerWriter(AnswerWriter, Protocol):
    """Writes the answers of one request as a stream or as a whole."""

    def whole(self, answers: Sequence[Sequence[Delta]], replies: Sequence[Reply]) -> Mapping[str, Any]:
        """Return the body of a response that is not streamed. It is called instead of the other methods, not after
        them."""


async def stream_records(generation: Generation, writer: AnswerWriter) -> Chunks:
    """Yield the records of a stream from start to end, as they come. An error is written by the writer, then raised."""
    try:
        yield writer.start()  # at once: a client sees that it is heard while the prompt is read
        async for part in generation.parts():
            yield writer.feed(part)
        yield writer.finish(generation.replies)
    except Exception as error:
        yield writer.fail(problem_of(error))
        raise  # who reads this logs it, and the store keeps it


async def respond(
    generation: Generation,
    writer: WholeAnswerWriter,
    request: Request,
    service: Service,
    *,
    stream: bool | None,
    ping: Record = KEEP_ALIVE,
) -> Response:
    """Return the response to `request`: streamed, or whole once all answers have ended."""
    if stream:
        return EventStream(stream_records(generation, writer), service.config, ping=ping)
    return JSONResponse(writer.whole(await generation.whole_answers(request), generation.replies))
