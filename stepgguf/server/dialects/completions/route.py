"""POST /v1/completions: prompts as they are, texts or token ids, without template, thinking or tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.exchange import PreparedRequest, Reply
from stepgguf.chat.output import Delta, Markers
from stepgguf.chat.request import ToolChoice
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Request as EngineRequest
from stepgguf.runtime.engine import Step
from stepgguf.server.body.objects import ExtraBody, Ignored, JsonRoute
from stepgguf.server.body.sampling import AnswerTokens, FormatFields, SamplingFields, limit
from stepgguf.server.dialects.chat_completions.request import StreamOptions, wants_usage
from stepgguf.server.dialects.chat_completions.route import usage
from stepgguf.server.dialects.openai import FinishReason, TextChoice, TextCompletion, TextLogprobs, Usage
from stepgguf.server.generation import Exchange
from stepgguf.server.http.sse import DONE, Events, EventStream, event
from stepgguf.server.problem import Problem, openai_error
from stepgguf.server.service import Service, TheService, copies, now, trace

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
MAX_TOKENS = 16  # OpenAI's default
_NO_MARKERS = Markers(None, None, None)  # every token is text


class CompletionBody(SamplingFields, FormatFields, ExtraBody, Ignored):
    elsewhere: ClassVar = {
        **FormatFields.elsewhere,
        "messages": "messages belong to /v1/chat/completions",
    }
    prompt: str | list[str] | list[int] | list[list[int]] = Field(examples=["Once upon a time"])
    model: str | None = Field(None, description="Any id: one model is served. Default: its own.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    max_tokens: AnswerTokens | None = Field(
        None, description=f"Default: {MAX_TOKENS}, as OpenAI's. -1: what the context holds."
    )
    n: int | None = Field(None, ge=1, description="Answers to each prompt.")
    best_of: int | None = Field(None, ge=1, description="Must be n if it is given.")
    echo: bool | None = Field(None, description="The text starts with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=5, description="So many alternatives to each token, and the token.")
    suffix: str | None = Field(None, description="Refused: the model cannot fill in.")

    def check(self) -> None:
        """RequestError: what this server cannot do."""
        if self.suffix:
            raise RequestError("suffix: the model cannot fill in between two texts", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise RequestError("best_of: only n answers are made", param="best_of", hint="Leave it out.")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo: there are no logprobs of a prompt", param="echo", hint="Leave out one of them.")

    def prompts(self, service: Service) -> list[tuple[int, ...]]:
        """Token ids of each. RequestError: a prompt is empty, an id is not one, or they are too many."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        given = cast("list[str] | list[list[int]]", [self.prompt] if one else self.prompt)
        n, most = len(given) * (self.n or 1), service.config.max_n
        if n > most:
            raise RequestError(f"this server makes at most {most} answers at a time, found {n}", param="n")
        tokenized = [service.engine.tokenize(text) if isinstance(text, str) else text for text in given]
        if not tokenized or not all(tokenized):
            raise RequestError("prompt: expected at least one token", param="prompt")
        n_vocab = service.engine.info.n_vocab
        for token in (token for tokens in tokenized for token in tokens):
            if not 0 <= token < n_vocab:
                raise RequestError(f"prompt: expected token ids from 0 to {n_vocab - 1}, found {token}", param="prompt")
        return [tuple(tokens) for tokens in tokenized]

    def prepare(self, service: Service) -> list[PreparedRequest]:
        self.check()
        info, markers, n = service.engine.info, service.chat.markers, self.n or 1
        grammar = constrain_answer(
            markers, in_reasoning=False, format=self.format(), tools=(), choice=ToolChoice("none"), parallel=False
        )
        prepared = []
        for prompt in self.prompts(service):
            request = EngineRequest(
                prompt,
                self.sampling(info.sampling, info.n_vocab),
                max_tokens=limit(self.max_tokens or MAX_TOKENS),
                grammar=grammar,
                top_logprobs=self.logprobs,
            )
            prepared += copies(
                PreparedRequest(request, _NO_MARKERS, in_reasoning=False, tools=(), stops=self.stops()), n
            )
        return prepared


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def completions(body: CompletionBody, request: Request, service: TheService) -> Response:
    """Go on from a prompt as it is. For conversations use /v1/chat/completions."""
    model, with_usage = service.model(body.model), wants_usage(body.stream, body.stream_options)
    prepared = await run_in_threadpool(body.prepare, service)
    echoes = await run_in_threadpool(lambda: [_text(service, p) if body.echo else "" for p in prepared])
    writer = TextWriter(f"cmpl-{trace(request)}", now(), model, service.fingerprint, body.logprobs, trace(request))
    exchange = await service.start(prepared, request)
    if body.stream:
        events = writer.stream(exchange, echoes, with_usage=with_usage)
        return EventStream(events, service.config, failure=lambda problem: writer.failure(problem, exchange))
    return JSONResponse(writer.whole(exchange, echoes, await exchange.whole(request)))


def _text(service: Service, prepared: PreparedRequest) -> str:
    return b"".join(service.engine.piece(token) for token in prepared.request.prompt).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class TextWriter:
    id: str
    created: int
    model: str
    fingerprint: str
    n_top: int | None
    trace: str

    async def stream(self, exchange: Exchange, echoes: Sequence[str], *, with_usage: bool) -> Events:
        offsets = [len(echo) for echo in echoes]
        yield b"".join(self._chunk(i, echo) for i, echo in enumerate(echoes))
        async for part in exchange.parts():
            text = "".join(delta.text for delta in part.deltas)
            steps = [step for delta in part.deltas for step in delta.steps]
            logprobs = self._logprobs(steps, offsets[part.index])
            offsets[part.index] += len(text)
            yield self._chunk(part.index, text, logprobs, cast("FinishReason | None", part.finish_reason))
        last = event({**self._completion([]), "usage": self._usage(exchange)}) if with_usage else b""
        yield last + DONE

    def whole(self, exchange: Exchange, echoes: Sequence[str], answers: Sequence[Sequence[Delta]]) -> TextCompletion:
        choices = [self._choice(i, *one) for i, one in enumerate(zip(echoes, answers, exchange.replies, strict=True))]
        return {**self._completion(choices), "usage": self._usage(exchange)}

    def failure(self, problem: Problem, exchange: Exchange) -> bytes:
        ends = [self._chunk(i, "", None, "length") for i in exchange.unfinished]
        return b"".join([event(openai_error(problem, self.trace)), *ends, DONE])

    def _choice(self, index: int, echo: str, deltas: Sequence[Delta], reply: Reply) -> TextChoice:
        steps = [step for delta in deltas for step in delta.steps]
        return {
            "index": index,
            "text": echo + "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(steps, len(echo)),
            "finish_reason": cast(FinishReason, reply.finish_reason),
        }

    def _chunk(
        self, index: int, text: str, logprobs: TextLogprobs | None = None, reason: FinishReason | None = None
    ) -> bytes:
        choice: TextChoice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event(self._completion([choice]))

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, steps: Sequence[Step], offset: int) -> TextLogprobs | None:
        if self.n_top is None:
            return None
        tokens = [step.piece.decode(errors="replace") for step in steps]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [step.logprob or 0.0 for step in steps],
            "top_logprobs": [_tops(step) for step in steps],
            "text_offset": offsets,
        }

    def _usage(self, exchange: Exchange) -> Usage:
        """Each prompt counts once, however many answers it has."""
        total: Any = usage(exchange.replies)
        total["prompt_tokens"] = exchange.n_prompt
        total["total_tokens"] = exchange.n_prompt + total["completion_tokens"]
        return cast(Usage, total)


def _tops(step: Step) -> dict[str, float]:
    """The likeliest tokens, and the one that was taken if it is not among them."""
    alternatives = [(top.piece, top.logprob) for top in step.top]
    taken = [(step.piece, step.logprob)] if step.logprob is not None else []
    return {piece.decode(errors="replace"): logprob for piece, logprob in [*alternatives, *taken]}
