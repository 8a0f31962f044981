"""What a client of Completions asks for: prompts as they are, texts or token ids."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field

from stepgguf.chat.answer_grammar import constrain_answer
from stepgguf.chat.exchange import PreparedRequest
from stepgguf.chat.output import Markers
from stepgguf.chat.request import ToolChoice
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Request as EngineRequest
from stepgguf.server.body.answer_format import FormatFields
from stepgguf.server.body.hosted import ExtraBody, HostedServiceFields
from stepgguf.server.body.sampling import AnswerTokens, SamplingFields, token_limit
from stepgguf.server.dialects.openai import StreamOptions
from stepgguf.server.service import Service, copies_of

MAX_TOKENS = 16  # OpenAI's default
NO_MARKERS = Markers(None, None, None)  # every token is text


class CompletionBody(SamplingFields, FormatFields, ExtraBody, HostedServiceFields):
    elsewhere: ClassVar = {
        **FormatFields.elsewhere,
        "messages": "messages belong to /v1/chat/completions",
    }
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="What is to be continued: a text or token ids, or several of them.", examples=["Once upon a time"]
    )
    model: str | None = Field(None, description="Any id: one model is served. Default: its own.")
    stream: bool | None = Field(None, description="Send the answer in events as it comes.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    max_tokens: AnswerTokens | None = Field(
        None, description=f"Default: {MAX_TOKENS}, as OpenAI's. -1: what the context holds."
    )
    n: int | None = Field(None, ge=1, description="Answers to each prompt.")
    best_of: int | None = Field(None, ge=1, description="Must be n if it is given.")
    echo: bool | None = Field(None, description="The text starts with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=5, description="So many alternatives to each token, and the token.")
    suffix: str | None = Field(None, description="Refused: the model cannot fill in.")

    def check_fields(self) -> None:
        """Raise RequestError if a field asks for what this server cannot do."""
        if self.suffix:
            raise RequestError("suffix: the model cannot fill in between two texts", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise RequestError("best_of: only n answers are made", param="best_of", hint="Leave it out.")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo: there are no logprobs of a prompt", param="echo", hint="Leave out one of them.")

    def prompt_tokens(self, service: Service) -> list[tuple[int, ...]]:
        """Return the token ids of each prompt.

        RequestError: a prompt is empty, an id is not in the vocabulary, or there are too many answers to make.
        """
        # A list of numbers is one prompt, a list of texts or of lists is several.
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
        """Return a request for every answer to every prompt: those to one prompt follow each other."""
        self.check_fields()
        info, markers, n = service.engine.info, service.chat.markers, self.n or 1
        grammar = constrain_answer(
            markers,
            in_reasoning=False,
            format=self.answer_format(),
            tools=(),
            choice=ToolChoice("none"),
            parallel=False,
        )
        prepared = []
        for prompt in self.prompt_tokens(service):
            request = EngineRequest(
                prompt,
                self.sampling(info.sampling, info.n_vocab),
                max_tokens=token_limit(self.max_tokens or MAX_TOKENS),
                grammar=grammar,
                top_logprobs=self.logprobs,
            )
            prepared += copies_of(
                PreparedRequest(request, NO_MARKERS, in_reasoning=False, tools=(), stops=self.stop_texts()), n
            )
        return prepared
