"""OpenAI's Responses API: POST /v1/responses, and what can be done with an answer later, or while it is made."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from stepgguf.server.dialects.dialect import OF_A_BODY, STREAMED, Dialect, refusals
from stepgguf.server.dialects.openai_errors import OpenAIErrorForm
from stepgguf.server.dialects.responses.request import PreparedResponse, ResponsesBody, ResponsesPrompt
from stepgguf.server.dialects.responses.store import Answer, AnswerStore
from stepgguf.server.dialects.responses.writer import ResponseWriter
from stepgguf.server.generation import Generation
from stepgguf.server.http.disconnect import on_disconnect
from stepgguf.server.http.sse import Chunks, Comment, EventStream, JsonEvent
from stepgguf.server.problem import problem_of
from stepgguf.server.service import Service, TheService, now, trace_id

RESPONSE_ERRORS = OpenAIErrorForm(prompt_field="input")
OF_A_KEPT_ANSWER = refusals(RESPONSE_ERRORS, 404)
RESPONSES = Dialect.below("/v1/responses", RESPONSE_ERRORS, tag="OpenAI")
router = RESPONSES.router


def _answer_store(request: Request) -> AnswerStore:
    answers: AnswerStore = request.app.state.answers
    return answers


TheAnswers = Annotated[AnswerStore, Depends(_answer_store)]
COUNT = (
    "In a stream: after what has come so far a comment counts its tokens, `: 12 tokens`. No field of an unfinished "
    "answer does, and with MTP a fragment is several."
)
CountTokens = Annotated[bool, Query(description=COUNT)]


class ResponsesTokenCount(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class ResponseDeletion(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


@router.post("", responses=RESPONSES.of_an_answer)
async def create(
    body: ResponsesBody, request: Request, service: TheService, answers: TheAnswers, count_tokens: CountTokens = False
) -> Response:
    """Answer a conversation, as OpenAI's Responses API does. With `stream`, as server-sent events. With `background`
    at once, and the answer goes on until it is finished or cancelled, whether or not the client stays."""
    model = service.model_id(body.model)
    asked = await run_in_threadpool(body.chat_request, service, answers)
    generation = await _start_generation(body, asked, request, service)
    writer = ResponseWriter(
        trace_id(request),
        model,
        now(),
        asked.echo,
        asked.offers.by_name,
        sealed=body.wants_sealed_reasoning,
        shows_reasoning=body.shows_reasoning(),
    )
    answer = Answer(writer, generation, asked.context, keeps=body.is_stored, background=bool(body.background))
    answers.add(answer)
    if body.stream:
        return _event_stream(answer, service, count_tokens)
    if not body.background:
        async with on_disconnect(request.receive, answer.cancel):
            await answer.wait_until_finished()
        if answer.error is not None:
            raise answer.error
    return JSONResponse(writer.response)


@router.post("/input_tokens", responses=refusals(RESPONSE_ERRORS, *OF_A_BODY, 404))
async def input_tokens(body: ResponsesPrompt, service: TheService, answers: TheAnswers) -> ResponsesTokenCount:
    """How many tokens the prompt of such a response has."""
    service.model_id(body.model)
    asked = await run_in_threadpool(body.chat_request, service, answers)
    prompt, _ = await run_in_threadpool(service.chat.render_prompt, asked.request)
    return {"object": "response.input_tokens", "input_tokens": len(prompt)}


@router.get("/{id}", responses=STREAMED | refusals(RESPONSE_ERRORS, 400, 404))
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
        return _event_stream(answer, service, count_tokens, 0 if starting_after is None else starting_after + 1)
    return JSONResponse(answer.writer.response)


@router.delete("/{id}", responses=OF_A_KEPT_ANSWER)
async def delete(id: str, answers: TheAnswers) -> ResponseDeletion:
    """Forget an answer; if it is still being made, that ends."""
    answers.delete(id)
    return {"id": id, "object": "response", "deleted": True}


@router.get("/{id}/input_items", response_model=ResponseItemList, responses=refusals(RESPONSE_ERRORS, 400, 404))
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
        items = answer.input_items()[:: 1 if order == "asc" else -1]
        start = next((i + 1 for i, item in enumerate(items) if item["id"] == after), 0)
        data = items[start : start + limit]
        first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
        has_more = start + limit < len(items)
        found: ResponseItemList = {
            "object": "list",
            "data": data,
            "first_id": first,
            "last_id": last,
            "has_more": has_more,
        }
        return json.dumps(found).encode()

    return Response(await run_in_threadpool(page), media_type="application/json")


@router.post("/{id}/cancel", responses=OF_A_KEPT_ANSWER)
async def cancel(id: str, answers: TheAnswers) -> Response:
    """End an answer where it is. One that is finished stays as it is."""
    answer = answers.get(id)
    answer.cancel()
    await answer.wait_until_finished()
    return JSONResponse(answer.writer.response)


@router.post("/{id}/end_reasoning", responses=OF_A_KEPT_ANSWER)
async def end_reasoning(id: str, answers: TheAnswers) -> Response:
    """End the reasoning of an answer that is being made, so that the answer itself begins. Not OpenAI's."""
    answer = answers.get(id)
    answer.end_reasoning()
    return JSONResponse(answer.writer.response)


async def _start_generation(
    body: ResponsesBody, asked: PreparedResponse, request: Request, service: Service
) -> Generation:
    prepared = [await run_in_threadpool(service.prepare_chat, asked.request, request)]
    if body.background:  # the store owns it, not the request
        return await service.start_unowned(prepared, request)
    return await service.start_generation(prepared, request)


def _event_stream(answer: Answer, service: Service, count_tokens: bool, start: int = 0) -> EventStream:
    return EventStream(_chunks(answer, start, count_tokens), service.config)


async def _chunks(answer: Answer, start: int, count_tokens: bool) -> Chunks:
    try:
        async for events in answer.events(start):
            yield [*events, Comment(f"{answer.n_generated} tokens")] if count_tokens else events
    except Exception as error:  # an answer that fails says so itself; this is a reading of it that does
        problem = problem_of(error)
        yield [JsonEvent({"type": "error", "code": problem.code, "message": problem.message, "param": None}, "error")]
        raise
