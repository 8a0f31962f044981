"""What a client of Chat Completions asks for, as a ChatRequest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from stepgguf.chat.request import ChatRequest, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.body.answer_format import FormatFields
from stepgguf.server.body.hosted import ExtraBody, HostedServiceFields
from stepgguf.server.body.objects import CheckedObject, RequestObject, ignored
from stepgguf.server.body.reasoning import ReasoningFields
from stepgguf.server.body.sampling import AnswerTokens, SamplingFields, token_limit
from stepgguf.server.body.unreadable import AnyPart, as_tool_output, newest_user_message, refuse_unreadable
from stepgguf.server.dialects.function_tools import FunctionDeclaration, as_tools
from stepgguf.server.dialects.openai import StreamOptions
from stepgguf.server.service import Service


class ChatInputFunctionCall(RequestObject):
    name: str
    arguments: Any = "{}"


class ChatInputToolCall(RequestObject):
    id: str | int | None = None
    type: str = "function"
    function: ChatInputFunctionCall


def _as_function(call: Any) -> Any:
    """Return a call of another type in an old turn as one of a function: of a custom tool, which takes text, or of what
    is newer than this server."""
    if not isinstance(call, dict) or isinstance(call.get("function"), dict):
        return call
    custom = call["custom"] if isinstance(call.get("custom"), dict) else {}
    arguments = {"input": custom["input"]} if "input" in custom else {}
    return {"id": call.get("id"), "function": {"name": custom.get("name", call.get("type")), "arguments": arguments}}


def _reasoning_text(value: Any) -> Any:
    """Return a text, or the text of parts: Mistral's {"thinking": [{"text": ...}]}, Anthropic's {"thinking": ...}."""
    if isinstance(value, list):
        return "".join(_reasoning_text(part) for part in value)
    if isinstance(value, dict):
        return _reasoning_text(value.get("thinking", value.get("text", value.get("content"))))
    return value if isinstance(value, str) else ""


REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text")  # parts of an answer
_Reasoning = Annotated[str | None, BeforeValidator(_reasoning_text)]


def _with_reasoning_apart(data: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message whose content is parts, with those of reasoning in `reasoning_content`."""
    reasoning = [part for part in data["content"] if isinstance(part, dict) and part.get("type") in REASONING_PARTS]
    if not reasoning:
        return data
    rest = [part for part in data["content"] if part not in reasoning]
    return {**data, "content": rest, "reasoning_content": data.get("reasoning_content") or reasoning}


class ChatInputMessage(RequestObject):
    """`content`: null is empty; that of a tool may be anything. The reasoning of earlier answers may come back under
    any of three names, and old clients send the functions of before there were tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[AnyPart] | None = None
    name: str | None = None
    reasoning: _Reasoning = None
    reasoning_content: _Reasoning = None
    reasoning_details: Any = None
    tool_calls: list[Annotated[ChatInputToolCall, BeforeValidator(_as_function)]] | None = None
    tool_call_id: str | int | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_tools(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("role") in ("tool", "function"):
            content = data.get("content")
            return {**data, "role": "tool", "content": content if isinstance(content, str) else as_tool_output(content)}
        if data.get("role") == "assistant" and isinstance(data.get("content"), list):
            data = _with_reasoning_apart(data)
        if data.get("function_call") and not data.get("tool_calls"):
            return {**data, "tool_calls": [{"function": data["function_call"]}]}
        return data


def as_chat(messages: Sequence[ChatInputMessage]) -> list[dict[str, Any]]:
    """Return the messages as the chat template takes them. RequestError: the newest message of the user has more than
    text."""
    newest = newest_user_message([message.role for message in messages])
    if newest is not None and isinstance(parts := messages[newest].content, list):
        refuse_unreadable(parts, f"messages[{newest}].content")
    return [message.model_dump(exclude_none=True) for message in messages]


class ChatFunctionTool(CheckedObject):
    type: Literal["function"] = "function"
    function: FunctionDeclaration
    cache_control: object = ignored("every prefix is found without marks")


class ChatOtherTool(RequestObject):
    """It runs at some vendor's, or is newer than this server: the model does without."""

    type: str


def _runs_at(tool: Any) -> str:
    # pydantic also asks about what is an instance already
    tool_type = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "the client" if tool_type in (None, "function") else "others"  # clients leave the type out


ChatTool = Annotated[
    Annotated[ChatFunctionTool, Tag("the client")] | Annotated[ChatOtherTool, Tag("others")], Discriminator(_runs_at)
]


def client_functions(
    tools: Sequence[ChatFunctionTool | ChatOtherTool] | None, service: Service
) -> list[FunctionDeclaration]:
    """Return the functions that the client runs itself. The log names the types of the other tools."""
    service.unknown.ignore("type of tool", (tool.type for tool in tools or () if isinstance(tool, ChatOtherTool)))
    return [tool.function for tool in tools or () if isinstance(tool, ChatFunctionTool)]


class ChatFunctionName(RequestObject):
    name: str


class ChatNamedTool(RequestObject):
    type: Literal["function"] = "function"
    function: ChatFunctionName


class ChatAllowedTools(RequestObject):
    mode: Literal["auto", "required"]
    tools: list[ChatNamedTool]


class ChatAllowedToolChoice(RequestObject):
    type: Literal["allowed_tools"]
    allowed_tools: ChatAllowedTools


def _choice_form(choice: Any) -> str:
    if isinstance(choice, str):
        return "a word"
    allowed = choice.get("type") == "allowed_tools" if isinstance(choice, dict) else hasattr(choice, "allowed_tools")
    return "allowed tools" if allowed else "a tool"


ChatToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[ChatNamedTool, Tag("a tool")]
    | Annotated[ChatAllowedToolChoice, Tag("allowed tools")],
    Discriminator(_choice_form),
]


class ChatBody(SamplingFields, ReasoningFields, FormatFields, ExtraBody, HostedServiceFields):
    elsewhere: ClassVar = {
        **FormatFields.elsewhere,
        "functions": "functions are not supported any more; use tools",
        "function_call": "function_call is not supported any more; use tool_choice",
        "audio": "the model writes text only",
        "system": "here it is a message of role system",
        "instructions": "here it is a message of role system",
    }
    messages: list[ChatInputMessage] = Field(
        min_length=1,
        description="The conversation: messages of system, developer, user, assistant and tool.",
        examples=[[{"role": "user", "content": "How many 'r's are in the word strawberry?"}]],
    )
    model: str | None = Field(
        None, description="Any id: one model is served. Default: its own.", examples=["step-3.5-flash"]
    )
    stream: bool | None = Field(None, description="Send the answer in events as it comes.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    max_completion_tokens: AnswerTokens | None = Field(
        None, description="Thinking counts. Default, and -1: what the context holds."
    )
    max_tokens: AnswerTokens | None = Field(None, description="The old name of max_completion_tokens.")
    tools: list[ChatTool] | None = Field(None, description="Functions that the client runs; other types are left out.")
    tool_choice: ChatToolChoice | None = Field(
        None, description="Whether a tool is called: none, auto, required, one by its name, or one of allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call in an answer at most.")
    n: int | None = Field(None, ge=1, description="Answers to make.")
    logprobs: bool | None = Field(None, description="The log probability of each token of the answer.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many alternatives to each token.")
    modalities: list[Literal["text"]] | None = Field(None, description="The model writes text only.")

    def chat_request(self, service: Service) -> ChatRequest:
        """Return what is asked of the model. RequestError: the fields do not go together."""
        info = service.engine.info
        return ChatRequest(
            messages=as_chat(self.messages),
            sampling=self.sampling(info.sampling, info.n_vocab),
            tools=as_tools(self._allowed_functions(client_functions(self.tools, service))),
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.answer_format(),
            reasoning_budget=self.reasoning_limit(service.config),
            max_tokens=token_limit(self.max_completion_tokens or self.max_tokens),
            stops=self.stop_texts(),
            top_logprobs=self._top_logprobs(),
            conversation=self.conversation_name,
        )

    def n_answers(self, service: Service) -> int:
        """Return how many answers to make. RequestError: more than this server makes at a time."""
        n, most = self.n or 1, service.config.max_n
        if n > most:
            raise RequestError(f"n: this server makes at most {most} answers at a time, found {n}", param="n")
        return n

    def _allowed_functions(self, functions: list[FunctionDeclaration]) -> list[FunctionDeclaration]:
        if not isinstance(self.tool_choice, ChatAllowedToolChoice):
            return functions
        names = {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return [function for function in functions if function.name in names]

    def _tool_choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, ChatAllowedToolChoice):
            return ToolChoice(self.tool_choice.allowed_tools.mode)
        if isinstance(self.tool_choice, ChatNamedTool):
            return ToolChoice("required", self.tool_choice.function.name)
        return ToolChoice(self.tool_choice or "auto")

    def _top_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
