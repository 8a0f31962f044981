"""The tokenizer over HTTP, and how the server is."""

from __future__ import annotations

from json import JSONEncoder
from typing import ClassVar

from fastapi import APIRouter, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict

from stepgguf.chat.request import ChatRequest
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import Body, JsonRoute
from stepgguf.server.dialects.chat_completions.request import AnyTool, Message, as_chat, as_tools, functions
from stepgguf.server.problem import Refusal
from stepgguf.server.service import Service, TheService

router = APIRouter(route_class=JsonRoute, tags=["stepgguf"])


class TokenizeBody(Body):
    """`text` as it is, or `messages` as /v1/chat/completions would show them to the model. `content` is llama-server's
    name of text."""

    elsewhere: ClassVar = {"prompt": "here it is text"}
    text: str | None = Field(None, examples=["Hello"])
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[AnyTool] | None = None
    content: str | None = None
    add_special: bool | None = Field(
        None, description="Put the model's first token in front. Default: true for text, false for content."
    )
    parse_special: bool | None = Field(
        None, description="Special tokens that are written in the text become theirs. Default: true."
    )
    with_pieces: bool | None = Field(None, description="Tokens with their text, or bytes where that is none.")

    def tokenized(self, service: Service) -> Tokenized:
        ids = self.ids(service)
        tokens = [_piece(service, id) for id in ids] if self.with_pieces else ids
        return {"tokens": tokens, "count": len(ids), "context_length": service.engine.info.n_ctx}

    def ids(self, service: Service) -> list[int]:
        given = [name for name in ("text", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError("expected either text or content or messages", param=given[1] if given else "text")
        if self.messages is not None:
            tools = as_tools(functions(self.tools, service))
            request = ChatRequest(as_chat(self.messages), service.engine.info.sampling, tools=tools)
            return service.chat.render_prompt(request)[0]
        text, engine = self.text or self.content or "", service.engine
        starts = given == ["text"] if self.add_special is None else self.add_special
        if self.parse_special is False:
            return [*(engine.tokenize("") if starts else ()), *engine.tokenize_plain(text)]
        return engine.tokenize(text) if starts else engine.tokenize_piece(text)


class DetokenizeBody(Body):
    tokens: list[int] = Field(examples=[[72, 105]])

    def spelled(self, service: Service) -> str:
        """RequestError: an id is not one."""
        n_vocab = service.engine.info.n_vocab
        for token in self.tokens:
            if not 0 <= token < n_vocab:
                raise RequestError(f"tokens: expected ids from 0 to {n_vocab - 1}, found {token}", param="tokens")
        return b"".join(map(service.engine.piece, self.tokens)).decode(errors="replace")


class Piece(TypedDict):
    """piece: text, or the bytes of a part of a character."""

    id: int
    piece: str | list[int]


class Tokenized(TypedDict):
    tokens: list[int] | list[Piece]
    count: int
    context_length: int


class Detokenized(TypedDict):
    """content: llama-server's name of text."""

    text: str
    content: str


class Health(TypedDict):
    status: str
    running: int
    queued: int


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeBody, service: TheService) -> Response:
    return await run_in_threadpool(lambda: _encoded(body.tokenized(service)))


def _encoded(tokenized: Tokenized) -> Response:
    """In pieces, so that others get the interpreter meanwhile: a text of 8 MB has millions of tokens."""
    pieces = JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(tokenized)
    return Response("".join(pieces), media_type="application/json")


def _piece(service: Service, id: int) -> Piece:
    piece = service.engine.piece(id)
    try:
        return {"id": id, "piece": piece.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": list(piece)}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: TheService) -> Detokenized:
    """Special tokens are written out."""
    text = await run_in_threadpool(body.spelled, service)
    return {"text": text, "content": text}


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
