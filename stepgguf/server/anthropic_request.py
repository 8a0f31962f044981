"""What a client of Anthropic's Messages API asks for, as a ChatRequest.

    user      tool_result -> a message of role tool; text -> a user message; in the order of the blocks
    assistant thinking -> reasoning_content; text -> content; tool_use -> tool_calls
    system    one message, from a string or from text blocks

Thinking. This model always thinks unless its budget is 0.
    absent         it thinks, in at most three quarters of max_tokens, and no thinking blocks are sent. Clients that do
                   not ask for thinking read content[0].text, and chose max_tokens for the answer alone
    enabled        at most budget_tokens; blocks are sent
    adaptive       as much as it likes; blocks are sent
    disabled       none
output_config.effort is a limit as reasoning_effort is in chat completions. display "omitted": see sealed.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import ChatRequest, JsonSchema, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.anthropic_writer import Display
from stepgguf.server.body import Body, Part, ignored
from stepgguf.server.chat_request import Function, FunctionTool, as_tools
from stepgguf.server.fields import Effort, SamplingFields
from stepgguf.server.sealed import unseal
from stepgguf.server.service import Service

# Claude Code puts this line first into its system prompt. It changes with every request, so with it no request would
# find its prefix in the cache; it says nothing to a model.
BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
TEXT_ONLY = ("image", "document", "search_result", "container_upload")


class TextBlock(Part):
    type: Literal["text"]
    text: str


class ThinkingBlock(Part):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""

    @property
    def reasoning(self) -> str:
        return self.thinking or unseal(self.signature)


class RedactedThinkingBlock(Part):
    """Encrypted by Anthropic, for Anthropic: nothing of it can be read here."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _readable(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in TEXT_ONLY:
        raise PydanticCustomError(
            "text_only", "the model reads text only, it cannot take {kind} blocks", {"kind": kind}
        )
    return block


def _blocks(content: Any) -> Any:
    """A string is short for one block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(_readable)]], BeforeValidator(_blocks)]


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        text = _join(block.text for block in self.content or ())
        return f"Error: {text}" if self.is_error else text


_AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
Blocks = Annotated[list[Annotated[_AnyBlock, BeforeValidator(_readable)]], BeforeValidator(_blocks)]


class Turn(Part):
    role: Literal["user", "assistant", "system"]
    content: Blocks

    def messages(self) -> Iterator[dict[str, Any]]:
        """As OpenAI's chat messages."""
        if self.role == "assistant":
            yield self._assistant()
            return
        texts: list[str] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block.text)
            elif isinstance(block, ToolResultBlock):
                yield from self._said(texts)
                texts = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        yield from self._said(texts)

    def _said(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        if texts:
            yield {"role": self.role, "content": _join(texts)}

    def _assistant(self) -> dict[str, Any]:
        calls = [
            {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
            for b in self.content
            if isinstance(b, ToolUseBlock)
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": _join(b.text for b in self.content if isinstance(b, TextBlock)),
            "reasoning_content": _join(b.reasoning for b in self.content if isinstance(b, ThinkingBlock)),
        }
        return {**message, "tool_calls": calls} if calls else message


class CustomTool(Function):
    parameters: dict[str, Any] | None = Field(alias="input_schema")


def _custom(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        text = "{kind} is a tool that Anthropic defines; this server takes tools with a name and an input_schema"
        raise PydanticCustomError("foreign_tool", text, {"kind": kind})
    return tool


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_tool_choice(self) -> ToolChoice:
        if self.type == "tool":
            if self.name is None:
                raise RequestError("tool_choice of type tool has no name", param="tool_choice.name")
            return ToolChoice("required", self.name)
        return ToolChoice("required" if self.type == "any" else self.type)


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=0)
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Part):
    type: Literal["json_schema"]
    format_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Effort | None = None
    format: JsonFormat | None = None


class Prompt(Body):
    """What is counted by count_tokens, and what both routes ignore."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: Texts | None = None
    tools: list[Annotated[CustomTool, BeforeValidator(_custom)]] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    cache_control: Any = ignored("every prefix is found without marks")
    context_management: Any = ignored("a prompt that does not fit is refused, not cut")
    speed: Any = ignored("there is one speed")
    user_profile_id: Any = ignored("there is one user")
    workspace_id: Any = ignored("there is one workspace")
    betas: Any = ignored("what is known is always on")

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""
        choice = self.tool_choice or Choice(type="auto")
        config = self.output_config or OutputConfig()
        return ChatRequest(
            messages=[*self.told(), *(message for turn in self.messages for message in turn.messages())],
            sampling=service.engine.info.sampling,
            tools=as_tools([FunctionTool(function=tool) for tool in self.tools or ()]),
            tool_choice=choice.as_tool_choice(),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            format=JsonSchema(config.format.format_schema) if config.format else None,
            reasoning_budget=self._budget(service.config.efforts[config.effort or "max"]),
        )

    def told(self) -> Iterator[dict[str, Any]]:
        text = _join(BILLING_LINE.sub("", block.text) for block in self.system or ())
        if text:
            yield {"role": "system", "content": text}

    def _budget(self, effort: int | None) -> int | None:
        if self.thinking is None or self.thinking.type == "adaptive":
            return effort
        return 0 if self.thinking.type == "disabled" else self.thinking.budget_tokens


class Create(Prompt, SamplingFields):
    """temperature: Anthropic's ends at 1, that of StepFun's own Messages API at 2."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = Field(None, description="Texts that end the answer.")
    stream: bool | None = None

    metadata: Any = ignored("nothing is stored")
    service_tier: Any = ignored("there is one tier")
    container: Any = ignored("nothing is run here")
    diagnostics: Any = ignored("usage says what came from the cache")
    inference_geo: Any = ignored("it runs where it runs")

    @property
    def display(self) -> Display:
        if self.thinking is None:
            return "hidden"
        return "omitted" if self.thinking.display == "omitted" else "shown"

    def chat_request(self, service: Service) -> ChatRequest:
        """A last message of the assistant's, which Anthropic's older models continue, is refused: this model's turn
        starts with its thinking."""
        if self.messages[-1].role == "assistant":
            raise RequestError(
                "the last message is the assistant's",
                param=f"messages[{len(self.messages) - 1}]",
                hint="This model cannot continue an answer; end with a message of role user.",
            )
        info = service.engine.info
        return replace(
            super().chat_request(service),
            sampling=self.sampling(info.sampling, info.n_vocab),
            max_tokens=self.max_tokens,
            stops=(*self.stops(), *(self.stop_sequences or ())),
        )

    def _budget(self, effort: int | None) -> int | None:
        budget = super()._budget(effort)
        return self.max_tokens if budget is None and self.thinking is None else budget


def _join(texts: Iterable[str]) -> str:
    """Blocks are paragraphs."""
    return "\n\n".join(text for text in texts if text)
