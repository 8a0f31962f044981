"""What a client of OpenAI's Responses API asks for, as a ChatRequest.

Tools are in tools.py, the conversation is in items.py. `instructions` is a message of role system,
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
from stepgguf.server.body.hosted import HostedServiceFields
from stepgguf.server.body.objects import CheckedObject, RequestObject, ignored
from stepgguf.server.body.reasoning import ReasoningFields, ReasoningMap
from stepgguf.server.body.sampling import AnswerTokens, SamplingFields, token_limit
from stepgguf.server.dialects.responses.items import (
    Items,
    Json,
    as_chat_messages,
    left_out_types,
    parse_items,
    refuse_unreadable_input,
)
from stepgguf.server.dialects.responses.store import AnswerStore
from stepgguf.server.dialects.responses.tools import (
    Offers,
    ResponsesTool,
    ResponsesToolChoice,
    echoed_tools,
    resolve_choice,
)
from stepgguf.server.service import Service

NO_CONVERSATIONS = "there are no conversation objects here: use previous_response_id, or send the items as `input`"
SEND_TEXT = "no prompt templates are stored here: send the text as `instructions` and `input`"
NO_LOGPROBS = "log probabilities are given by /v1/chat/completions only"
SEALED_REASONING = "reasoning.encrypted_content"


class ResponsesTextFormat(RequestObject):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    format_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def as_format(self) -> AnswerFormat | None:
        """Return the format as a ChatRequest has it; None for text."""
        if self.type == "json_schema":
            return JsonSchema(self.format_schema if self.format_schema is not None else True)
        return JsonObject() if self.type == "json_object" else None


class TextOptions(CheckedObject):
    format: ResponsesTextFormat | None = None
    verbosity: object = ignored("the model has no such switch; ask for it in a message")


def _must_be_absent(reason: str) -> BeforeValidator:
    """Return a validator of a field that must be absent, null, false or 0."""

    def check(value: Any) -> None:
        if value:
            raise PydanticCustomError("refused", "{reason}", {"reason": reason})

    return BeforeValidator(check)


def _without_logprobs(include: Any) -> Any:
    if isinstance(include, list) and "message.output_text.logprobs" in include:
        raise PydanticCustomError("refused", NO_LOGPROBS)
    return include


@dataclass(frozen=True, slots=True)
class PreparedResponse:
    """What a body asks for, ready to run. request: for the model. context: the conversation without instructions, as
    JSON of items. offers: what may be called. echo: the fields that the response repeats, as JSON."""

    request: ChatRequest
    context: bytes
    offers: Offers
    echo: bytes = b"{}"


class ResponsesPrompt(ReasoningFields, HostedServiceFields):
    """The fields that make the prompt. /v1/responses/input_tokens takes these alone."""

    model: str | None = Field(None, description="Any id: one model is served. Default: its own.")
    input: Items | None = Field(None, description="A text, or the items of the conversation.")
    instructions: str | None = Field(None, description="The system prompt. It holds for this answer alone.")
    tools: list[ResponsesTool] | None = Field(
        None, description="Functions and custom tools that the client runs, also in namespaces; others are left out."
    )
    tool_choice: ResponsesToolChoice | None = Field(
        None, description="Whether a tool is called: none, auto, required, or one by its name."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call in an answer at most.")
    text: TextOptions | None = Field(None, description="format: text, a JSON object, or a JSON schema.")
    previous_response_id: str | None = Field(
        None, description="The conversation goes on behind this answer, which must still be stored."
    )

    conversation: Annotated[None, _must_be_absent(NO_CONVERSATIONS)] = Field(None, description="Refused.")
    prompt: Annotated[None, _must_be_absent(SEND_TEXT)] = Field(None, description="Refused: send the text.")

    truncation: object = ignored("a prompt that does not fit is refused, not cut")
    personality: object = ignored("the model has no such switch; ask for it in `instructions`")

    def chat_request(self, service: Service, answers: AnswerStore) -> PreparedResponse:
        """Return what is asked of the model. RequestError: the fields do not go together. Refusal: they refer to what
        is not stored."""
        if self.input is None and self.previous_response_id is None:
            raise RequestError("input is missing", param="input")
        before = answers.whole_conversation(self.previous_response_id) if self.previous_response_id else []
        items = [*before, *answers.resolve_references(cast("list[Json]", self.input or []))]  # see Items
        known = parse_items(items)
        refuse_unreadable_input(known, len(before))
        declared = Offers(self.tools or ())
        service.unknown.ignore("type of tool", declared.left_out)
        service.unknown.ignore("type of item", left_out_types(known))
        choice, offers = resolve_choice(self.tool_choice, declared)
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        chat = as_chat_messages(known, declared)
        if not chat:
            raise RequestError("input has nothing that can be shown to the model", param="input")
        request = ChatRequest(
            messages=[*instructions, *chat],
            sampling=service.engine.info.sampling,
            tools=offers.tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.text.format.as_format() if self.text and self.text.format else None,
            reasoning_budget=self.reasoning_limit(service.config),
            conversation=self.conversation_name,
        )
        return PreparedResponse(request, json.dumps(items).encode(), offers)


class ResponsesBody(ResponsesPrompt, SamplingFields):
    max_output_tokens: AnswerTokens | None = Field(
        None, description="Thinking counts. Default, and -1: what the context holds."
    )
    include: Annotated[list[str] | None, BeforeValidator(_without_logprobs)] = Field(
        None, description="reasoning.encrypted_content: reasoning that a client may send back."
    )
    stream: bool | None = Field(None, description="Send the answer in events as it comes.")
    store: bool | None = Field(None, description="false: forget the answer when it is finished.")
    background: bool | None = Field(None, description="The answer goes on when the client leaves; it must be stored.")
    top_logprobs: Annotated[None, _must_be_absent(NO_LOGPROBS)] = Field(None, description="Refused.")

    metadata: object = ignored("it is repeated in the answer")
    stream_options: object = ignored("it only pads events")
    context_management: object = ignored("a prompt that does not fit is refused, not cut")
    client_metadata: object = ignored("nothing is reported to anyone")
    access_programs: object = ignored("there are none")
    image: object = ignored("the model reads text only")
    max_tool_calls: object = ignored("it limits tools that run on the server, and there are none")

    @property
    def wants_sealed_reasoning(self) -> bool:
        return SEALED_REASONING in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def chat_request(self, service: Service, answers: AnswerStore) -> PreparedResponse:
        """Return what is asked of the model, with what the response repeats. It raises what
        `ResponsesPrompt.chat_request` does."""
        if self.background and not self.is_stored:
            raise RequestError("background needs store: true, for the answer is fetched later", param="background")
        asked, info = super().chat_request(service, answers), service.engine.info
        request = replace(
            asked.request,
            sampling=self.sampling(info.sampling, info.n_vocab),
            max_tokens=token_limit(self.max_output_tokens),
            stops=self.stop_texts(),
        )
        return replace(asked, request=request, echo=json.dumps(self._echoed_fields(request.sampling)).encode())

    def _echoed_fields(self, sampling: Sampling) -> Json:
        """Return the fields that the response repeats, as they were understood. sampling: as it is used."""
        effort = self.reasoning.effort if isinstance(self.reasoning, ReasoningMap) else self.reasoning
        choice = self.tool_choice
        form = self.text.format.model_dump(by_alias=True, exclude_none=True) if self.text and self.text.format else None
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": token_limit(self.max_output_tokens),
            "metadata": _bounded_metadata(self.metadata),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": effort if isinstance(effort, str) else None, "summary": None},
            "store": self.is_stored,
            "temperature": sampling.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, RequestObject) else choice or "auto",
            "tools": echoed_tools(self.tools or ()),
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": self.user if isinstance(self.user, str) else None,
        }


def _bounded_metadata(metadata: Any) -> dict[str, str]:
    """Return as much of it as OpenAI takes: 16 pairs of 64 and 512 characters."""
    pairs = islice(metadata.items(), 16) if isinstance(metadata, dict) else ()
    return {key[:64]: str(value)[:512] for key, value in pairs}
