"""POST /tokenize and /detokenize: the model's tokenizer over HTTP."""

from __future__ import annotations

from json import JSONEncoder
from typing import ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from typing_extensions import TypedDict

from stepgguf.chat.request import ChatRequest
from stepgguf.errors import RequestError
from stepgguf.server.body.json_route import JsonRoute
from stepgguf.server.body.objects import CheckedObject
from stepgguf.server.dialects.chat_completions.request import ChatInputMessage, ChatTool, as_chat, client_functions
from stepgguf.server.dialects.dialect import FROM_EVERY_ROUTE, OF_A_BODY, refusals
from stepgguf.server.dialects.function_tools import as_tools
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.service import Service, TheService

router = APIRouter(
    route_class=JsonRoute, tags=["stepgguf"], responses=refusals(OPENAI_ERRORS, *FROM_EVERY_ROUTE, *OF_A_BODY)
)


class TokenizeBody(CheckedObject):
    """`text` as it is, or `messages` as /v1/chat/completions would show them to the model. `content` is llama-server's
    name of text."""

    elsewhere: ClassVar = {"prompt": "here it is text"}
    text: str | None = Field(None, examples=["Hello"])
    messages: list[ChatInputMessage] | None = Field(None, min_length=1)
    tools: list[ChatTool] | None = None
    content: str | None = None
    add_special: bool | None = Field(
        None, description="Put the model's first token in front. Default: true for text, false for content."
    )
    parse_special: bool | None = Field(
        None, description="Special tokens that are written in the text become theirs. Default: true."
    )
    with_pieces: bool | None = Field(None, description="Tokens with their text, or bytes where that is none.")

    def answer(self, service: Service) -> TokenizeAnswer:
        """Return the tokens. RequestError: see `token_ids`."""
        ids = self.token_ids(service)
        tokens = [_token_piece(service, id) for id in ids] if self.with_pieces else ids
        return {"tokens": tokens, "count": len(ids), "context_length": service.engine.info.n_ctx}

    def token_ids(self, service: Service) -> list[int]:
        """Return the ids. RequestError: there is not exactly one thing to tokenize."""
        given = [name for name in ("text", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError("expected either text or content or messages", param=given[1] if given else "text")
        if self.messages is not None:
            tools = as_tools(client_functions(self.tools, service))
            request = ChatRequest(as_chat(self.messages), service.engine.info.sampling, tools=tools)
            return service.chat.render_prompt(request)[0]
        text, engine = self.text or self.content or "", service.engine
        starts = given == ["text"] if self.add_special is None else self.add_special
        if self.parse_special is False:
            return [*(engine.tokenize("") if starts else ()), *engine.tokenize_plain(text)]
        return engine.tokenize(text) if starts else engine.tokenize_piece(text)


class DetokenizeBody(CheckedObject):
    tokens: list[int] = Field(examples=[[72, 105]])

    def text(self, service: Service) -> str:
        """Return what the tokens spell. RequestError: an id is not in the vocabulary."""
        n_vocab = service.engine.info.n_vocab
        for token in self.tokens:
            if not 0 <= token < n_vocab:
                raise RequestError(f"tokens: expected ids from 0 to {n_vocab - 1}, found {token}", param="tokens")
        return b"".join(map(service.engine.piece, self.tokens)).decode(errors="replace")


class TokenPiece(TypedDict):
    """piece: text, or the bytes of a part of a character."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(TypedDict):
    tokens: list[int] | list[TokenPiece]
    count: int
    context_length: int


class DetokenizeAnswer(TypedDict):
    """content: llama-server's name of text."""

    text: str
    content: str


@router.post("/tokenize", response_model=TokenizeAnswer)
async def tokenize(body: TokenizeBody, service: TheService) -> Response:
    return await run_in_threadpool(lambda: _encoded(body.answer(service)))


def _encoded(tokenized: TokenizeAnswer) -> Response:
    """Write the JSON in pieces, so that others get the interpreter meanwhile: a text of 8 MB has millions of tokens."""
    pieces = JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(tokenized)
    return Response("".join(pieces), media_type="application/json")


def _token_piece(service: Service, id: int) -> TokenPiece:
    piece = service.engine.piece(id)
    try:
        return {"id": id, "piece": piece.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": list(piece)}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: TheService) -> DetokenizeAnswer:
    """Special tokens are written out."""
    text = await run_in_threadpool(body.text, service)
    return {"text": text, "content": text}
