"""What all routes share: the model, the configuration, the counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from stepgguf import __version__
from stepgguf.chat.exchange import ChatModel, PreparedRequest
from stepgguf.chat.request import ChatRequest
from stepgguf.runtime.engine import Engine
from stepgguf.server.body.unknown_fields import UnknownFields
from stepgguf.server.config import ServerConfig
from stepgguf.server.generation import Exchange
from stepgguf.server.metrics import Metrics
from stepgguf.server.problem import Refusal

LONGEST_ID = 256


class Asks(Protocol):
    """A body that asks for an answer, in whatever dialect."""

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""


@dataclass(frozen=True, slots=True)
class Service:
    """started: seconds since the epoch."""

    chat: ChatModel
    config: ServerConfig
    metrics: Metrics
    started: int
    unknown: UnknownFields = field(default_factory=UnknownFields)

    @property
    def engine(self) -> Engine:
        return self.chat.engine

    @property
    def fingerprint(self) -> str:
        return f"stepgguf-{__version__}-{self.engine.info.engine.replace(' ', '-')}"

    def model(self, asked: str | None) -> str:
        """The id to answer under: the one that was asked for. One model is served, so any id means it; a strict server
        answers 404 to one that is none of its own."""
        known = self.config.known_ids
        if not asked:
            return known[0]
        strange = self.config.strict and _plain(asked) not in map(_plain, known)
        if strange or len(asked) > LONGEST_ID:  # it is in every chunk of a stream
            raise Refusal(
                404,
                f"there is no model {asked[:LONGEST_ID]!r}; this server has {', '.join(known)}",
                code="model_not_found",
                param="model",
            )
        return asked

    async def prepare(self, body: Asks) -> PreparedRequest:
        """Rendering and tokenizing a long conversation and building a grammar take time: off the event loop."""
        return await run_in_threadpool(lambda: self.chat.prepare(body.chat_request(self)))

    async def count(self, body: Asks) -> int:
        """Tokens of the prompt."""
        prompt, _ = await run_in_threadpool(lambda: self.chat.render_prompt(body.chat_request(self)))
        return len(prompt)

    async def start(self, prepared: Sequence[PreparedRequest], request: Request) -> Exchange:
        """Submit. From here on tokens are made, unless this raises."""
        exchange = await Exchange.start(self.engine, prepared, self.metrics)
        request.state.exchange = exchange  # for the log
        return exchange


def _plain(id: str) -> str:
    """As ids are compared: capitals and the file's ending do not matter."""
    return id.casefold().removesuffix(".gguf")


def copies(prepared: PreparedRequest, n: int) -> list[PreparedRequest]:
    """n answers to one prompt, which the engine reads once. With a seed each gets its own, the first the given one."""
    request, seed = prepared.request, prepared.request.sampling.seed
    if seed is None:
        return [prepared] * n
    samplings = [replace(request.sampling, seed=seed + i) for i in range(n)]
    return [replace(prepared, request=replace(request, sampling=sampling)) for sampling in samplings]


def trace(request: Request) -> str:
    """The id of this request: in its answer's header and body, and in the log."""
    value: str = request.state.trace
    return value


def now() -> int:
    return int(time.time())


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
