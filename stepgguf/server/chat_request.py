"""What a client of Chat Completions asks for, as a ChatRequest."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import ChatRequest, Tool, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.body import Body, Ignored, Part
from stepgguf.server.fields import FormatFields, ReasoningFields, SamplingFields
from stepgguf.server.service import Service


class TextPart(Part):
    type: Literal["text"]
    text: str


def _readable(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "image", "input_audio", "video_url", "file"):
        raise PydanticCustomError("text_only", "the model reads text only, it cannot take {kind} parts", {"kind": kind})
    return part


class CalledFunction(Part):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    """`content`: null is empty. The thinking of earlier answers may come back under any of three names."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart, BeforeValidator(_readable)]] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Part):
    name: str = Field(pattern=r"^[^<>\s]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(Part):
    type: Literal["function"] = "function"
    function: Function


def as_tools(offered: list[FunctionTool] | None) -> tuple[Tool, ...]:
    """RequestError: two have one name."""
    functions = [tool.function for tool in offered or ()]
    names = [function.name for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"tools: two functions are called {name}", param="tools")
    return tuple(Tool(f.name, f.description, f.parameters or {}) for f in functions)


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"] = "function"
    function: FunctionName


class StreamOptions(Part):
    include_usage: bool | None = Field(None, description="true: a last chunk, without choices, has the usage.")


class ChatBody(SamplingFields, FormatFields, ReasoningFields, Ignored, Body):
    elsewhere: ClassVar = {
        **FormatFields.elsewhere,
        "functions": "functions are not supported any more; use tools",
        "function_call": "function_call is not supported any more; use tool_choice",
        "max_output_tokens": "that is the Responses dialect's; here it is max_completion_tokens",
        "audio": "the model writes text only",
    }
    messages: list[Message] = Field(
        min_length=1, examples=[[{"role": "user", "content": "How many 'r's are in the word strawberry?"}]]
    )
    model: str | None = Field(None, description="One of /v1/models. Default: the first.", examples=["step-3.5-flash"])
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, description="Answers to make.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Thinking counts. Default: what the context holds."
    )
    max_tokens: int | None = Field(None, ge=1, description="The old name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[Literal["text"]] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""
        info = service.engine.info
        return ChatRequest(
            messages=[message.model_dump(exclude_none=True) for message in self.messages],
            sampling=self.sampling(info.sampling, info.n_vocab),
            tools=as_tools(self.tools),
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            format=self.format(),
            reasoning_budget=self.reasoning_budget(service.config),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stops=self.stops(),
            top_logprobs=self._top_logprobs(),
        )

    def n_answers(self, service: Service) -> int:
        n, most = self.n or 1, service.config.max_n
        if n > most:
            raise RequestError(f"n: this server makes at most {most} answers at a time, found {n}", param="n")
        return n

    def _tool_choice(self) -> ToolChoice:
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice("required", self.tool_choice.function.name)
        return ToolChoice(self.tool_choice or "auto")

    def _top_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
