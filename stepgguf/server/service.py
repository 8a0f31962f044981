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
from stepgguf.server.generation import Generation
from stepgguf.server.metrics import Metrics
from stepgguf.server.problem import Refusal
from stepgguf.server.tasks import Task, TaskLedger

LONGEST_ID = 256  # characters: an id is repeated in every chunk of a stream


class ChatRequestBody(Protocol):
    """The body of a request for an answer, in whatever dialect."""

    def chat_request(self, service: Service) -> ChatRequest:
        """Return what it asks the model. RequestError: the fields do not go together."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What an answer and all its chunks say first. created: seconds since the epoch."""

    trace_id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Service:
    """What a route needs to answer. started: when the server was, in seconds since the epoch. tasks: what the messages
    of users have cost. unknown: what becomes of fields that are not known."""

    chat: ChatModel
    config: ServerConfig
    metrics: Metrics
    started: int
    tasks: TaskLedger
    unknown: UnknownFields = field(default_factory=UnknownFields)

    @property
    def engine(self) -> Engine:
        return self.chat.engine

    @property
    def fingerprint(self) -> str:
        """What OpenAI calls system_fingerprint: the versions of what made an answer."""
        return f"stepgguf-{__version__}-{self.engine.info.engine.replace(' ', '-')}"

    def model_id(self, asked: str | None) -> str:
        """Return the id to answer under: the one that was asked for.

        One model is served, so any id means it. Refusal: a strict server was asked for one that is none of its own.
        """
        known = self.config.known_ids
        if not asked:
            return known[0]
        strange = self.config.strict and _comparable_id(asked) not in map(_comparable_id, known)
        if strange or len(asked) > LONGEST_ID:
            raise Refusal(
                404,
                f"there is no model {asked[:LONGEST_ID]!r}; this server has {', '.join(known)}",
                code="model_not_found",
                param="model",
            )
        return asked

    def answer_head(self, request: Request, asked: str | None) -> AnswerHead:
        """Return the head of an answer that begins now, under the id that was asked for. Refusal: see `model_id`."""
        return AnswerHead(trace_id(request), now(), self.model_id(asked), self.fingerprint)

    async def prepare(self, body: ChatRequestBody, request: Request) -> PreparedRequest:
        """Render and tokenize the conversation, and build its grammar. That takes time: it is done off the event
        loop. Refusal: its task has used up what it may."""
        return await run_in_threadpool(lambda: self.prepare_chat(body.chat_request(self), request))

    def prepare_chat(self, asked: ChatRequest, request: Request) -> PreparedRequest:
        """Do the same for what a body has asked, in this thread."""
        admitted, request.state.task = self.tasks.admit(asked)
        return self.chat.prepare(admitted)

    async def count_prompt(self, body: ChatRequestBody) -> int:
        """Return how many tokens the prompt of such a request has."""
        prompt, _ = await run_in_threadpool(lambda: self.chat.render_prompt(body.chat_request(self)))
        return len(prompt)

    async def start_generation(self, prepared: Sequence[PreparedRequest], request: Request) -> Generation:
        """Submit what was prepared. From here on tokens are made, unless this raises."""
        generation = await self.start_unowned(prepared, request)
        request.state.generation = generation  # TraceRequests cancels it when the request is over, and logs its counts
        return generation

    async def start_unowned(self, prepared: Sequence[PreparedRequest], request: Request) -> Generation:
        """Do the same, and let it go on when the request is over."""
        task: Task | None = getattr(request.state, "task", None)  # raw prompts have none
        return await Generation.start(self.engine, prepared, self.metrics, task)


def _comparable_id(id: str) -> str:
    """Return an id as it is compared: capitals and the file's ending do not matter."""
    return id.casefold().removesuffix(".gguf")


def copies_of(prepared: PreparedRequest, n: int) -> list[PreparedRequest]:
    """Return n requests for answers to one prompt, which the engine reads once. With a seed each gets its own, the
    first the given one."""
    request, seed = prepared.request, prepared.request.sampling.seed
    if seed is None:
        return [prepared] * n
    samplings = [replace(request.sampling, seed=seed + i) for i in range(n)]  # one seed would give n equal answers
    return [replace(prepared, request=replace(request, sampling=sampling)) for sampling in samplings]


def trace_id(request: Request) -> str:
    """Return the id of this request: in its answer's header and body, and in the log."""
    value: str = request.state.trace
    return value


def now() -> int:
    """Return the seconds since the epoch, as all dialects count."""
    return int(time.time())


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
