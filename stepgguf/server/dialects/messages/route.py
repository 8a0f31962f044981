"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from stepgguf.server.body.sampling import token_limit
from stepgguf.server.dialects.dialect import OF_A_BODY, Dialect, refusals
from stepgguf.server.dialects.messages.errors import ANTHROPIC_ERRORS
from stepgguf.server.dialects.messages.request import MessagesBody, MessagesPrompt
from stepgguf.server.dialects.messages.writer import PING, MessageWriter
from stepgguf.server.dialects.writer import respond
from stepgguf.server.service import TheService, trace_id

MESSAGES = Dialect.below("/v1/messages", ANTHROPIC_ERRORS, tag="Anthropic")
router = MESSAGES.router


class MessageTokenCount(TypedDict):
    input_tokens: int


@router.post("", responses=MESSAGES.of_an_answer)
async def create(body: MessagesBody, request: Request, service: TheService) -> Response:
    """Answer a conversation, as Anthropic's API does. With `stream`, as server-sent events."""
    model = service.model_id(body.model)
    generation = await service.start_generation([await service.prepare(body, request)], request)
    writer = MessageWriter(
        trace_id(request), model, body.display, n_prompt=generation.n_prompt, max_tokens=token_limit(body.max_tokens)
    )
    return await respond(generation, writer, request, service, stream=body.stream, ping=PING)


@router.post("/count_tokens", responses=refusals(ANTHROPIC_ERRORS, *OF_A_BODY, 404))
async def count_tokens(body: MessagesPrompt, service: TheService) -> MessageTokenCount:
    """How many tokens the prompt of such a message has."""
    service.model_id(body.model)
    return {"input_tokens": await service.count_prompt(body)}
