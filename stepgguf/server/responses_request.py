"""What a client of OpenAI's Responses API asks for, as a ChatRequest.

    instructions          a message of role system, first
    message               system, developer, user; the assistant's own
    reasoning             reasoning_content of the assistant's message that follows
    function_call         tool_calls of the assistant's message
    function_call_output  a message of role tool

Items that follow one another and are the assistant's make one message; reasoning starts the next one. Nothing is
stored: what refers to stored things (previous_response_id, conversation, item_reference) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import ChatRequest, Format, JsonObject, JsonSchema, ToolChoice
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body import Body, Ignored, Part, ignored
from stepgguf.server.chat_request import Function, FunctionName, FunctionTool, as_tools
from stepgguf.server.fields import Effort, SamplingFields
from stepgguf.server.sealed import unseal
from stepgguf.server.service import Service

SEND_ALL = "nothing is stored here: send the whole conversation as `input`"
SEND_TEXT = "no prompt templates are stored here: send the text as `instructions` and `input`"
STAY = "nothing is stored here, so nobody could fetch the answer later: use `stream`"
NO_LOGPROBS = "log probabilities are given by /v1/chat/completions only"
SEALED = "reasoning.encrypted_content"
TEXT_PARTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text")


class TextPart(Part):
    type: str
    text: str


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _readable(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in (*TEXT_PARTS, "refusal"):
        raise PydanticCustomError("text_only", "the model reads text only, it cannot take {kind}", {"kind": kind})
    return part


def _parts(content: Any) -> Any:
    """A string is short for one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_AnyPart = Annotated[RefusalPart | TextPart, BeforeValidator(_readable)]
Content = Annotated[list[_AnyPart], BeforeValidator(_parts)]


class Message(Part):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningItem(Part):
    type: Literal["reasoning"]
    content: Content | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        return _join(self.content or ()) or unseal(self.encrypted_content or "")


class FunctionCall(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Part):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


Item = Message | ReasoningItem | FunctionCall | FunctionCallOutput
ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output")


def _item(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "item_reference":
        raise PydanticCustomError("not_stored", SEND_ALL)
    if kind not in ITEM_TYPES:
        raise PydanticCustomError("foreign_item", "items of type {kind} are not known to this model", {"kind": kind})
    return {**item, "type": kind}


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[
    list[Annotated[Annotated[Item, Field(discriminator="type")], BeforeValidator(_item)]],
    BeforeValidator(_items),
    Field(min_length=1),
]


def conversation(items: Iterable[Item]) -> list[dict[str, Any]]:
    """As OpenAI's chat messages."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while it goes on
    for item in items:
        if isinstance(item, FunctionCallOutput) or (isinstance(item, Message) and item.role != "assistant"):
            messages.append(_theirs(item))
            turn = None
            continue
        if turn is None or (isinstance(item, ReasoningItem) and (turn["content"] or turn["tool_calls"])):
            turn = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            messages.append(turn)
        _add(turn, item)
    return messages


def _theirs(item: Message | FunctionCallOutput) -> dict[str, Any]:
    if isinstance(item, Message):
        return {"role": item.role, "content": _join(item.content)}
    return {"role": "tool", "tool_call_id": item.call_id, "content": _join(item.output)}


def _add(turn: dict[str, Any], item: Message | ReasoningItem | FunctionCall | FunctionCallOutput) -> None:
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] += item.text
    elif isinstance(item, Message):
        turn["content"] = "\n\n".join(filter(None, (turn["content"], _join(item.content))))
    elif isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        turn["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})


def _join(parts: Iterable[TextPart | RefusalPart]) -> str:
    return "\n\n".join(part.text for part in parts if part.text)


class FlatTool(Function):
    """In chat completions the function is an object of its own."""

    type: Literal["function"]
    strict: bool | None = None


def _function(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        text = "there is no tool {kind} here, only tools of type function, which the client runs"
        raise PydanticCustomError("foreign_tool", text, {"kind": kind})
    return tool


class ForcedTool(FunctionName):
    type: Literal["function"]


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    format_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def as_format(self) -> Format | None:
        if self.type == "json_schema":
            return JsonSchema(self.format_schema if self.format_schema is not None else True)
        return JsonObject() if self.type == "json_object" else None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Any = ignored("the model has no such switch; ask for it in a message")


class ReasoningOptions(Body):
    effort: Effort | None = None
    summary: Any = ignored("nobody writes one; the reasoning itself is sent")
    generate_summary: Any = ignored("nobody writes one; the reasoning itself is sent")
    context: Any = ignored("the chat template decides which reasoning stays")
    mode: Any = ignored("there is one mode")


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


class ResponseBody(SamplingFields, Ignored):
    model: str | None = None
    input: Items
    instructions: str | None = None
    tools: list[Annotated[FlatTool, BeforeValidator(_function)]] | None = None
    tool_choice: Literal["auto", "none", "required"] | ForcedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    include: Annotated[list[str] | None, BeforeValidator(_without_logprobs)] = None
    stream: bool | None = None

    previous_response_id: Annotated[None, _never(SEND_ALL)] = None
    conversation: Annotated[None, _never(SEND_ALL)] = None
    prompt: Annotated[None, _never(SEND_TEXT)] = None
    background: Annotated[None, _never(STAY)] = None
    top_logprobs: Annotated[None, _never(NO_LOGPROBS)] = None

    truncation: Any = ignored("a prompt that does not fit is refused, not cut")
    stream_options: Any = ignored("it only pads events")
    context_management: Any = ignored("a prompt that does not fit is refused, not cut")
    prompt_cache_options: Any = ignored("every prefix is found without a key")
    client_metadata: Any = ignored("nothing is stored")
    max_tool_calls: Any = ignored("it limits tools that run on the server, and there are none")

    @property
    def sealed(self) -> bool:
        return SEALED in (self.include or ())

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""
        info = service.engine.info
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = self.reasoning.effort if self.reasoning else None
        return ChatRequest(
            messages=[*told, *conversation(self.input)],
            sampling=self.sampling(info.sampling, info.n_vocab),
            tools=as_tools([FunctionTool(function=tool) for tool in self.tools or ()]),
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.text.format.as_format() if self.text and self.text.format else None,
            reasoning_budget=service.config.efforts[effort or "max"],
            max_tokens=self.max_output_tokens,
            stops=self.stops(),
        )

    def _choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, ForcedTool):
            return ToolChoice("required", self.tool_choice.name)
        return ToolChoice(self.tool_choice or "auto")

    def echo(self, sampling: Sampling) -> dict[str, Any]:
        """The fields that the response repeats, as they were understood. sampling: as used."""
        reasoning = self.reasoning or ReasoningOptions()
        form = self.text.format.model_dump(by_alias=True, exclude_none=True) if self.text and self.text.format else None
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": _dumped(self.tool_choice) or "auto",
            "tools": [_dumped(tool) for tool in self.tools or ()],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


def _dumped(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Part) else value
