"""POST /v1/completions: prompts as they are, without template, reasoning or tools."""

from __future__ import annotations

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from stepgguf.chat.exchange import PreparedRequest
from stepgguf.server.dialects.completions.request import CompletionBody
from stepgguf.server.dialects.completions.shapes import TextCompletion
from stepgguf.server.dialects.completions.writer import COMPLETION_ERRORS, CompletionWriter
from stepgguf.server.dialects.dialect import Dialect
from stepgguf.server.dialects.openai import wants_usage
from stepgguf.server.dialects.writer import respond
from stepgguf.server.service import Service, TheService

COMPLETIONS = Dialect.below("/v1/completions", COMPLETION_ERRORS, tag="OpenAI")
router = COMPLETIONS.router


@router.post("", response_model=TextCompletion, responses=COMPLETIONS.of_an_answer)
async def completions(body: CompletionBody, request: Request, service: TheService) -> Response:
    """Go on from a prompt as it is. For conversations use /v1/chat/completions."""
    head = service.answer_head(request, body.model)
    with_usage = wants_usage(body.stream, body.stream_options)
    prepared = await run_in_threadpool(body.prepare, service)
    echoes = await run_in_threadpool(lambda: [_prompt_text(service, p) if body.echo else "" for p in prepared])
    generation = await service.start_generation(prepared, request)
    writer = CompletionWriter(head, echoes, generation.n_prompt, n_top=body.logprobs, with_usage=with_usage)
    return await respond(generation, writer, request, service, stream=body.stream)


def _prompt_text(service: Service, prepared: PreparedRequest) -> str:
    return b"".join(service.engine.piece(token) for token in prepared.request.prompt).decode(errors="replace")
