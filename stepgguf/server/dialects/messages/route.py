"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from stepgguf.server.body.objects import JsonRoute
from stepgguf.server.body.sampling import limit
from stepgguf.server.dialects.messages.request import Create, Prompt
from stepgguf.server.dialects.messages.writer import PING, Event, MessageWriter
from stepgguf.server.generation import Exchange
from stepgguf.server.http.sse import Events, EventStream, event
from stepgguf.server.problem import Problem, anthropic_error
from stepgguf.server.service import TheService, trace


class Counted(TypedDict):
    input_tokens: int


router = APIRouter(route_class=JsonRoute, tags=["Anthropic"])


@router.post("/v1/messages", responses={200: {"content": {"text/event-stream": {}}}})
async def create(body: Create, request: Request, service: TheService) -> Response:
    """Answer a conversation, as Anthropic's API does. With `stream`, as server-sent events."""
    model = service.model(body.model)
    exchange = await service.start([await service.prepare(body)], request)
    writer = MessageWriter(trace(request), model, body.display, limit(body.max_tokens))
    if body.stream:

        def failure(problem: Problem) -> bytes:
            return event(anthropic_error(problem, trace(request)), "error")

        return EventStream(stream(exchange, writer), service.config, failure=failure, ping=_named(PING))
    (deltas,) = await exchange.whole(request)
    writer.feed(deltas)
    writer.finish(exchange.reply)
    return JSONResponse(writer.message)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: Prompt, service: TheService) -> Counted:
    """How many tokens the prompt of such a message has."""
    service.model(body.model)
    return {"input_tokens": await service.count(body)}


async def stream(exchange: Exchange, writer: MessageWriter) -> Events:
    """Thinking that is not sent is no chunk, so that there are pings meanwhile."""
    yield _joined(writer.start(exchange.n_prompt))
    async for part in exchange.parts():
        if chunk := _joined(writer.feed(part.deltas)):
            yield chunk
    yield _joined(writer.finish(exchange.reply))


def _joined(events: list[Event]) -> bytes:
    return b"".join(map(_named, events))


def _named(data: Event) -> bytes:
    return event(data, data["type"])
