"""OpenAI's Responses API: POST /v1/responses. Nothing is stored, so there is nothing to fetch or delete later."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stepgguf.server.body import JsonRoute
from stepgguf.server.problems import Problem, Refusal
from stepgguf.server.responses_request import SEND_ALL, ResponseBody
from stepgguf.server.responses_writer import Event, ResponseWriter
from stepgguf.server.service import TheService, now, trace
from stepgguf.server.sse import Events, EventStream, event
from stepgguf.server.stream import Exchange

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/responses", responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})
async def create(body: ResponseBody, request: Request, service: TheService) -> Response:
    """Answer a conversation, as OpenAI's Responses API does. With `stream`, as server-sent events."""
    model = service.model(body.model)
    asked = body.chat_request(service)
    exchange = await service.start([await service.prepare(asked)], request)
    writer = ResponseWriter(trace(request), model, now(), body.echo(asked.sampling), sealed=body.sealed)
    if body.stream:

        def failure(problem: Problem) -> bytes:
            return _joined(writer.fail(problem))

        return EventStream(stream(exchange, writer), service.config, failure=failure)
    (deltas,) = await exchange.whole(request)
    writer.feed(deltas)
    writer.finish(exchange.reply)
    return JSONResponse(writer.response)


@router.api_route("/v1/responses/{id}", methods=["GET", "DELETE"], include_in_schema=False)
async def missing(id: str) -> None:
    """Nothing is stored."""
    raise Refusal(404, f"there is no response {id!r}: {SEND_ALL}", param="id")


async def stream(exchange: Exchange, writer: ResponseWriter) -> Events:
    yield _joined(writer.start())
    async for part in exchange.parts():
        if chunk := _joined(writer.feed(part.deltas)):
            yield chunk
    yield _joined(writer.finish(exchange.reply))


def _joined(events: list[Event]) -> bytes:
    return b"".join(event(data, data["type"]) for data in events)
