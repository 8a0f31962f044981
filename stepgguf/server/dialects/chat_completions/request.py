"""What a client of Chat Completions asks for, as a ChatRequest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from stepgguf.chat.request import ChatRequest, Tool, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import Body, ExtraBody, Ignored, Part, ignored
from stepgguf.server.body.reasoning import ReasoningFields
from stepgguf.server.body.sampling import AnswerTokens, FormatFields, SamplingFields, limit
from stepgguf.server.body.unreadable import AnyPart, as_output, just_written, refuse_unreadable
from stepgguf.server.service import Service


class CalledFunction(Part):
    name: str
    arguments: Any = "{}"


class ToolCall(Part):
    id: str | int | None = None
    type: str = "function"
    function: CalledFunction


def _as_function(call: Any) -> Any:
    """Calls of other types in old turns: of a custom tool, which takes text, or of what is newer than this server."""
    if not isinstance(call, dict) or isinstance(call.get("function"), dict):
        return call
    custom = call["custom"] if isinstance(call.get("custom"), dict) else {}
    arguments = {"input": custom["input"]} if "input" in custom else {}
    return {"id": call.get("id"), "function": {"name": custom.get("name", call.get("type")), "arguments": arguments}}


def _thinking(value: Any) -> Any:
    """Text, or the text of parts: Mistral's {"thinking": [{"text": ...}]}, Anthropic's {"thinking": ...}."""
    if isinstance(value, list):
        return "".join(_thinking(part) for part in value)
    if isinstance(value, dict):
        return _thinking(value.get("thinking", value.get("text", value.get("content"))))
    return value if isinstance(value, str) else ""


THOUGHT = ("thinking", "redacted_thinking", "reasoning", "reasoning_text")  # parts of an answer
_Thinking = Annotated[str | None, BeforeValidator(_thinking)]


def _answer(data: dict[str, Any]) -> dict[str, Any]:
    """The assistant's own message, of parts: its thinking goes where thinking belongs."""
    thought = [part for part in data["content"] if isinstance(part, dict) and part.get("type") in THOUGHT]
    if not thought:
        return data
    told = [part for part in data["content"] if part not in thought]
    return {**data, "content": told, "reasoning_content": data.get("reasoning_content") or thought}


class Message(Part):
    """`content`: null is empty; that of a tool may be anything. The thinking of earlier answers may come back under any
    of three names, and old clients send the functions of before there were tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[AnyPart] | None = None
    name: str | None = None
    reasoning: _Thinking = None
    reasoning_content: _Thinking = None
    reasoning_details: Any = None
    tool_calls: list[Annotated[ToolCall, BeforeValidator(_as_function)]] | None = None
    tool_call_id: str | int | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_tools(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("role") in ("tool", "function"):
            content = data.get("content")
            return {**data, "role": "tool", "content": content if isinstance(content, str) else as_output(content)}
        if data.get("role") == "assistant" and isinstance(data.get("content"), list):
            data = _answer(data)
        if data.get("function_call") and not data.get("tool_calls"):
            return {**data, "tool_calls": [{"function": data["function_call"]}]}
        return data


def as_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As OpenAI's chat messages. RequestError: the message that the user has just written has more than text."""
    newest = just_written([message.role for message in messages])
    if newest is not None and isinstance(parts := messages[newest].content, list):
        refuse_unreadable(parts, f"messages[{newest}].content")
    return [message.model_dump(exclude_none=True) for message in messages]


class Function(Body):
    name: str = Field(pattern=r"^[^<>\s]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Any = ignored("arguments are always kept to their schema")
    cache_control: Any = ignored("every prefix is found without marks")
    defer_loading: Any = ignored("the model sees all tools")
    allowed_callers: Any = ignored("the model is the one caller")
    input_examples: Any = ignored("the chat template shows no examples")
    eager_input_streaming: Any = ignored("arguments are always sent as they come")


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Function
    cache_control: Any = ignored("every prefix is found without marks")


class OtherTool(Part):
    """It runs at some vendor's, or is newer than this server: the model does without."""

    type: str


def _runs_at(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "the client" if kind in (None, "function") else "others"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("the client")] | Annotated[OtherTool, Tag("others")], Discriminator(_runs_at)
]


def functions(tools: Sequence[FunctionTool | OtherTool] | None, service: Service) -> list[FunctionTool]:
    """Those that the client runs."""
    service.unknown.ignore("type of tool", (tool.type for tool in tools or () if isinstance(tool, OtherTool)))
    return [tool for tool in tools or () if isinstance(tool, FunctionTool)]


def as_tools(offered: list[FunctionTool] | None) -> tuple[Tool, ...]:
    """RequestError: two have one name."""
    functions = [tool.function for tool in offered or ()]
    for name, n in Counter(function.name for function in functions).items():
        if n > 1:
            raise RequestError(f"tools: two functions are called {name}", param="tools")
    return tuple(Tool(f.name, f.description, f.parameters or {}) for f in functions)


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(Part):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolChoice(Part):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _form(choice: Any) -> str:
    if isinstance(choice, str):
        return "a word"
    allowed = choice.get("type") == "allowed_tools" if isinstance(choice, dict) else hasattr(choice, "allowed_tools")
    return "allowed tools" if allowed else "a tool"


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("a tool")]
    | Annotated[AllowedToolChoice, Tag("allowed tools")],
    Discriminator(_form),
]


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="true: a last chunk, without choices, has the usage.")
    include_obfuscation: Any = ignored("it only pads events")
    continuous_usage_stats: Any = ignored("usage comes with the last chunk")


def wants_usage(stream: bool | None, options: StreamOptions | None) -> bool:
    """RequestError: there is no stream to have options."""
    if options is not None and not stream:
        raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
    return options is not None and bool(options.include_usage)


class ChatBody(SamplingFields, ReasoningFields, FormatFields, ExtraBody, Ignored):
    elsewhere: ClassVar = {
        **FormatFields.elsewhere,
        "functions": "functions are not supported any more; use tools",
        "function_call": "function_call is not supported any more; use tool_choice",
        "audio": "the model writes text only",
        "system": "here it is a message of role system",
        "instructions": "here it is a message of role system",
    }
    messages: list[Message] = Field(
        min_length=1, examples=[[{"role": "user", "content": "How many 'r's are in the word strawberry?"}]]
    )
    model: str | None = Field(
        None, description="Any id: one model is served. Default: its own.", examples=["step-3.5-flash"]
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    max_completion_tokens: AnswerTokens | None = Field(
        None, description="Thinking counts. Default, and -1: what the context holds."
    )
    max_tokens: AnswerTokens | None = Field(None, description="The old name of max_completion_tokens.")
    tools: list[AnyTool] | None = Field(None, description="Functions that the client runs; other types are left out.")
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    n: int | None = Field(None, ge=1, description="Answers to make.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = None

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""
        info = service.engine.info
        return ChatRequest(
            messages=as_chat(self.messages),
            sampling=self.sampling(info.sampling, info.n_vocab),
            tools=as_tools(self._allowed(functions(self.tools, service))),
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.format(),
            reasoning_budget=self.reasoning_limit(service.config),
            max_tokens=limit(self.max_completion_tokens or self.max_tokens),
            stops=self.stops(),
            top_logprobs=self._top_logprobs(),
        )

    def n_answers(self, service: Service) -> int:
        n, most = self.n or 1, service.config.max_n
        if n > most:
            raise RequestError(f"n: this server makes at most {most} answers at a time, found {n}", param="n")
        return n

    def _allowed(self, tools: list[FunctionTool]) -> list[FunctionTool]:
        if not isinstance(self.tool_choice, AllowedToolChoice):
            return tools
        names = {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return [tool for tool in tools if tool.function.name in names]

    def _tool_choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, AllowedToolChoice):
            return ToolChoice(self.tool_choice.allowed_tools.mode)
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice("required", self.tool_choice.function.name)
        return ToolChoice(self.tool_choice or "auto")

    def _top_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
