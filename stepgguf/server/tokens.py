"""The tokenizer over HTTP, and how the server is."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict

from stepgguf.chat.request import ChatRequest
from stepgguf.errors import RequestError
from stepgguf.server.body import Body, JsonRoute
from stepgguf.server.chat_request import FunctionTool, Message, as_tools
from stepgguf.server.problems import Refusal
from stepgguf.server.service import Service, TheService

router = APIRouter(route_class=JsonRoute, tags=["stepgguf"])


class TokenizeBody(Body):
    """`text` as it is, or `messages` as /v1/chat/completions would show them to the model."""

    text: str | None = Field(None, examples=["Hello"])
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[FunctionTool] | None = None

    def ids(self, service: Service) -> list[int]:
        if (self.text is None) == (self.messages is None):
            raise RequestError("expected either text or messages", param="text")
        if self.messages is None:
            return service.engine.tokenize(self.text or "")
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        request = ChatRequest(messages, service.engine.info.sampling, tools=as_tools(self.tools))
        return service.chat.prompt(request)[0]


class DetokenizeBody(Body):
    tokens: list[int] = Field(examples=[[72, 105]])


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    context_length: int


class Detokenized(TypedDict):
    text: str


class Health(TypedDict):
    status: str
    running: int
    queued: int


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: TheService) -> Tokenized:
    ids = await run_in_threadpool(body.ids, service)
    return {"tokens": ids, "count": len(ids), "context_length": service.engine.info.n_ctx}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: TheService) -> Detokenized:
    """Special tokens are written out."""
    n_vocab = service.engine.info.n_vocab
    for token in body.tokens:
        if not 0 <= token < n_vocab:
            raise RequestError(f"tokens: expected ids from 0 to {n_vocab - 1}, found {token}", param="tokens")
    return {"text": b"".join(map(service.engine.piece, body.tokens)).decode(errors="replace")}


@router.get("/health")
async def health(service: TheService) -> Health:
    """503 once the engine cannot take requests any more."""
    stats = service.engine.stats()
    if not stats.alive:
        raise Refusal(503, "the engine has stopped; start the server again", code="engine_failed")
    return {"status": "ok", "running": stats.n_running, "queued": stats.n_queued}


@router.get("/metrics", response_class=Response)
async def metrics(service: TheService) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
