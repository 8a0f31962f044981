"""OpenAI's Responses API: POST /v1/responses, and what can be done with an answer later, or while it is made."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from stepgguf.server.body.objects import JsonRoute
from stepgguf.server.dialects.responses.request import Asked, Prompt, ResponseBody
from stepgguf.server.dialects.responses.store import Answer, Answers
from stepgguf.server.dialects.responses.writer import Event, ResponseWriter
from stepgguf.server.generation import Exchange, calling
from stepgguf.server.http.sse import EventStream, comment, event
from stepgguf.server.problem import Problem
from stepgguf.server.service import Service, TheService, now, trace

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def _answers(request: Request) -> Answers:
    answers: Answers = request.app.state.answers
    return answers


TheAnswers = Annotated[Answers, Depends(_answers)]
COUNT = (
    "In a stream: after what has come so far a comment counts its tokens, `: 12 tokens`. No field of an unfinished "
    "answer does, and with MTP a fragment is several."
)
CountTokens = Annotated[bool, Query(description=COUNT)]


class Counted(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


@router.post("/v1/responses", responses=STREAM)
async def create(
    body: ResponseBody, request: Request, service: TheService, answers: TheAnswers, count_tokens: CountTokens = False
) -> Response:
    """Answer a conversation, as OpenAI's Responses API does. With `stream`, as server-sent events. With `background`
    at once, and the answer goes on until it is finished or cancelled, whether or not the client stays."""
    model = service.model(body.model)
    asked = await run_in_threadpool(body.chat_request, service, answers)
    exchange = await _start(body, asked, request, service)
    writer = ResponseWriter(
        trace(request),
        model,
        now(),
        asked.echo,
        asked.offers.by_name,
        sealed=body.sealed,
        shows_reasoning=body.shows_reasoning(),
    )
    answer = Answer(writer, exchange, asked.context, keeps=body.stored, background=bool(body.background))
    answers.add(answer)
    if body.stream:
        return _stream(answer, service, count_tokens)
    if not body.background:
        async with calling(answer.cancel, request):
            await answer.finished()
        if answer.error is not None:
            raise answer.error
    return JSONResponse(writer.response)


@router.post("/v1/responses/input_tokens")
async def input_tokens(body: Prompt, service: TheService, answers: TheAnswers) -> Counted:
    """How many tokens the prompt of such a response has."""
    service.model(body.model)
    asked = await run_in_threadpool(body.chat_request, service, answers)
    prompt, _ = await run_in_threadpool(service.chat.render_prompt, asked.request)
    return {"object": "response.input_tokens", "input_tokens": len(prompt)}


@router.get("/v1/responses/{id}", responses=STREAM)
async def retrieve(
    id: str,
    service: TheService,
    answers: TheAnswers,
    stream: Annotated[bool, Query(description="As server-sent events, until it is finished.")] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, description="The sequence_number of the last event that is known already.")
    ] = None,
    count_tokens: CountTokens = False,
) -> Response:
    """An answer as far as it has come."""
    answer = answers.get(id)
    if stream:
        return _stream(answer, service, count_tokens, 0 if starting_after is None else starting_after + 1)
    return JSONResponse(answer.writer.response)


@router.delete("/v1/responses/{id}")
async def delete(id: str, answers: TheAnswers) -> Deleted:
    """Forget an answer; if it is still being made, that ends."""
    answers.delete(id)
    return {"id": id, "object": "response", "deleted": True}


@router.get("/v1/responses/{id}/input_items", response_model=ItemList)
async def input_items(
    id: str,
    answers: TheAnswers,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(description="The id of the last item that is known already.")] = None,
) -> Response:
    """What an answer answers: with previous_response_id, the whole conversation before it."""
    answer = answers.get(id)

    def page() -> bytes:
        items = answer.items()[:: 1 if order == "asc" else -1]
        start = next((i + 1 for i, item in enumerate(items) if item["id"] == after), 0)
        data = items[start : start + limit]
        first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
        has_more = start + limit < len(items)
        found: ItemList = {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
        return json.dumps(found).encode()

    return Response(await run_in_threadpool(page), media_type="application/json")


@router.post("/v1/responses/{id}/cancel")
async def cancel(id: str, answers: TheAnswers) -> Response:
    """End an answer where it is. One that is finished stays as it is."""
    answer = answers.get(id)
    answer.cancel()
    await answer.finished()
    return JSONResponse(answer.writer.response)


@router.post("/v1/responses/{id}/end_reasoning")
async def end_reasoning(id: str, answers: TheAnswers) -> Response:
    """End the thinking of an answer that is being made, so that the answer itself begins. Not OpenAI's."""
    answer = answers.get(id)
    answer.end_reasoning()
    return JSONResponse(answer.writer.response)


async def _start(body: ResponseBody, asked: Asked, request: Request, service: Service) -> Exchange:
    prepared = [await run_in_threadpool(service.chat.prepare, asked.request)]
    if body.background:  # the store owns it, not the request
        return await Exchange.start(service.engine, prepared, service.metrics)
    return await service.start(prepared, request)


def _stream(answer: Answer, service: Service, count_tokens: bool, start: int = 0) -> EventStream:
    return EventStream(_told(answer, start, count_tokens), service.config, failure=_failure)


async def _told(answer: Answer, start: int, count_tokens: bool) -> AsyncGenerator[bytes, None]:
    async for events in answer.events(start):
        count = comment(f"{answer.n_generated} tokens") if count_tokens else b""
        yield b"".join(map(_named, events)) + count


def _failure(problem: Problem) -> bytes:
    """An answer that fails says so itself; this is for a stream that does."""
    return _named({"type": "error", "code": problem.code, "message": problem.message, "param": None})


def _named(data: Event) -> bytes:
    return event(data, data["type"])
