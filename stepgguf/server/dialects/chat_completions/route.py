"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from stepgguf.server.body.reasoning import ReasoningMap
from stepgguf.server.dialects.chat_completions.request import ChatBody
from stepgguf.server.dialects.chat_completions.shapes import ChatCompletion
from stepgguf.server.dialects.chat_completions.writer import ChatOptions, ChatWriter
from stepgguf.server.dialects.dialect import Dialect
from stepgguf.server.dialects.openai import wants_usage
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.dialects.writer import respond
from stepgguf.server.service import TheService, copies_of

CHAT_COMPLETIONS = Dialect.below("/v1/chat/completions", OPENAI_ERRORS, tag="OpenAI")
router = CHAT_COMPLETIONS.router


@router.post("", response_model=ChatCompletion, responses=CHAT_COMPLETIONS.of_an_answer)
async def chat_completions(body: ChatBody, request: Request, service: TheService) -> Response:
    """Answer a conversation; think first, call tools, keep to a form. With `stream`, as server-sent events."""
    head = service.answer_head(request, body.model)
    n, with_usage = body.n_answers(service), wants_usage(body.stream, body.stream_options)
    prepared = await service.prepare(body, request)
    generation = await service.start_generation(copies_of(prepared, n), request)
    options = ChatOptions(
        n,
        shows_reasoning=body.shows_reasoning(),
        with_details=isinstance(body.reasoning, ReasoningMap),
        with_logprobs=bool(body.logprobs),
        with_usage=with_usage,
    )
    return await respond(generation, ChatWriter(head, options), request, service, stream=body.stream)
