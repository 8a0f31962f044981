"""What a client of OpenAI's Responses API asks for, as a ChatRequest.

Tools are in responses_tools.py, the conversation is in responses_items.py. `instructions` is a message of role system,
the first; an answer that is continued (previous_response_id) brings its conversation, but neither its instructions nor
its tools.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import AnswerFormat, ChatRequest, JsonObject, JsonSchema
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body.objects import Body, Ignored, Part, ignored
from stepgguf.server.body.reasoning import ReasoningFields, ReasoningMap
from stepgguf.server.body.sampling import AnswerTokens, SamplingFields, limit
from stepgguf.server.dialects.responses.items import (
    Items,
    Json,
    conversation,
    left_out,
    read,
    refuse_what_was_just_written,
)
from stepgguf.server.dialects.responses.store import Answers
from stepgguf.server.dialects.responses.tools import AnyChoice, AnyTool, Offers, choose, repeated
from stepgguf.server.service import Service

NO_CONVERSATIONS = "there are no conversation objects here: use previous_response_id, or send the items as `input`"
SEND_TEXT = "no prompt templates are stored here: send the text as `instructions` and `input`"
NO_LOGPROBS = "log probabilities are given by /v1/chat/completions only"
SEALED = "reasoning.encrypted_content"


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    format_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def as_format(self) -> AnswerFormat | None:
        if self.type == "json_schema":
            return JsonSchema(self.format_schema if self.format_schema is not None else True)
        return JsonObject() if self.type == "json_object" else None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Any = ignored("the model has no such switch; ask for it in a message")


def _never(reason: str) -> BeforeValidator:
    """The field must be absent, null, false or 0."""

    def check(value: Any) -> None:
        if value:
            raise PydanticCustomError("refused", "{reason}", {"reason": reason})

    return BeforeValidator(check)


def _without_logprobs(include: Any) -> Any:
    if isinstance(include, list) and "message.output_text.logprobs" in include:
        raise PydanticCustomError("refused", NO_LOGPROBS)
    return include


@dataclass(frozen=True, slots=True)
class Asked:
    """request: for the model. context: the conversation, without instructions: items, as JSON. offers: what may be
    called. echo: the fields that the response repeats, as JSON."""

    request: ChatRequest
    context: bytes
    offers: Offers
    echo: bytes = b"{}"


class Prompt(ReasoningFields, Ignored):
    """What is counted by /v1/responses/input_tokens too."""

    model: str | None = None
    input: Items | None = None
    instructions: str | None = None
    tools: list[AnyTool] | None = None
    tool_choice: AnyChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None

    conversation: Annotated[None, _never(NO_CONVERSATIONS)] = None
    prompt: Annotated[None, _never(SEND_TEXT)] = None

    truncation: Any = ignored("a prompt that does not fit is refused, not cut")
    personality: Any = ignored("the model has no such switch; ask for it in `instructions`")

    def chat_request(self, service: Service, answers: Answers) -> Asked:
        """RequestError, Refusal: the fields do not go together, or refer to what is not stored."""
        if self.input is None and self.previous_response_id is None:
            raise RequestError("input is missing", param="input")
        before = answers.conversation(self.previous_response_id) if self.previous_response_id else []
        items = [*before, *answers.resolve(cast("list[Json]", self.input or []))]  # see Items
        known = read(items)
        refuse_what_was_just_written(known, len(before))
        declared = Offers(self.tools or ())
        service.unknown.ignore("type of tool", declared.left_out)
        service.unknown.ignore("type of item", left_out(known))
        choice, offers = choose(self.tool_choice, declared)
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        said = conversation(known, declared)
        if not said:
            raise RequestError("input has nothing that can be shown to the model", param="input")
        request = ChatRequest(
            messages=[*told, *said],
            sampling=service.engine.info.sampling,
            tools=offers.tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.text.format.as_format() if self.text and self.text.format else None,
            reasoning_budget=self.reasoning_limit(service.config),
        )
        return Asked(request, json.dumps(items).encode(), offers)


class ResponseBody(Prompt, SamplingFields):
    max_output_tokens: AnswerTokens | None = Field(
        None, description="Thinking counts. Default, and -1: what the context holds."
    )
    include: Annotated[list[str] | None, BeforeValidator(_without_logprobs)] = None
    stream: bool | None = None
    store: bool | None = Field(None, description="false: forget the answer when it is finished.")
    background: bool | None = Field(None, description="The answer goes on when the client leaves; it must be stored.")
    top_logprobs: Annotated[None, _never(NO_LOGPROBS)] = None

    metadata: Any = ignored("it is repeated in the answer")
    stream_options: Any = ignored("it only pads events")
    context_management: Any = ignored("a prompt that does not fit is refused, not cut")
    client_metadata: Any = ignored("nothing is reported to anyone")
    access_programs: Any = ignored("there are none")
    image: Any = ignored("the model reads text only")
    max_tool_calls: Any = ignored("it limits tools that run on the server, and there are none")

    @property
    def sealed(self) -> bool:
        return SEALED in (self.include or ())

    @property
    def stored(self) -> bool:
        return self.store is not False

    def chat_request(self, service: Service, answers: Answers) -> Asked:
        if self.background and not self.stored:
            raise RequestError("background needs store: true, for the answer is fetched later", param="background")
        asked, info = super().chat_request(service, answers), service.engine.info
        request = replace(
            asked.request,
            sampling=self.sampling(info.sampling, info.n_vocab),
            max_tokens=limit(self.max_output_tokens),
            stops=self.stops(),
        )
        return replace(asked, request=request, echo=json.dumps(self._echo(request.sampling)).encode())

    def _echo(self, sampling: Sampling) -> Json:
        """As they were understood. sampling: as used."""
        effort = self.reasoning.effort if isinstance(self.reasoning, ReasoningMap) else self.reasoning
        choice = self.tool_choice
        form = self.text.format.model_dump(by_alias=True, exclude_none=True) if self.text and self.text.format else None
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": limit(self.max_output_tokens),
            "metadata": _bounded(self.metadata),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": effort if isinstance(effort, str) else None, "summary": None},
            "store": self.stored,
            "temperature": sampling.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, Part) else choice or "auto",
            "tools": repeated(self.tools or ()),
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": self.user if isinstance(self.user, str) else None,
        }


def _bounded(metadata: Any) -> dict[str, str]:
    """As much as OpenAI takes: 16 pairs of 64 and 512 characters."""
    pairs = islice(metadata.items(), 16) if isinstance(metadata, dict) else ()
    return {key[:64]: str(value)[:512] for key, value in pairs}
