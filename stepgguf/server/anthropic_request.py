"""What a client of Anthropic's Messages API asks for, as a ChatRequest.

    user      tool_result -> a message of role tool; text -> a user message; in the order of the blocks
    assistant thinking -> reasoning_content; text -> content; tool_use -> tool_calls
    system    one message, from a string or from text blocks

Blocks of other types. What holds text is text (unreadable.py). Images and documents become a sentence, in the results
of tools and wherever they come again with the history; in what the user has just written they are refused. Blocks that
speak of what Anthropic's own service did (server_tool_use, web_search_tool_result), and those newer than this server,
are left out with a line in the log. So are tools that Anthropic defines, unless tool_choice demands one.

Thinking. This model always thinks unless its budget is 0.
    absent         it thinks, no more than effort medium does and in at most half of max_tokens, and no thinking blocks
                   are sent. Clients that do not ask for thinking read content[0].text, wait for no more than an answer
                   without it would take, and chose max_tokens for the answer alone
    enabled        at most budget_tokens; blocks are sent
    adaptive       as much as it likes; blocks are sent
    disabled       none
output_config.effort is a limit as reasoning_effort is in chat completions. display "omitted": see sealed.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from stepgguf.chat.request import ChatRequest, JsonSchema, Tool, ToolChoice
from stepgguf.errors import RequestError
from stepgguf.server.anthropic_writer import Display
from stepgguf.server.body import Body, Part, ignored
from stepgguf.server.chat_request import Function, FunctionTool, as_tools
from stepgguf.server.fields import Effort, SamplingFields
from stepgguf.server.sealed import unseal
from stepgguf.server.service import Service
from stepgguf.server.unreadable import (
    LONGEST_TYPE,
    WORDS,
    AnyPart,
    TextPart,
    UnreadablePart,
    as_text,
    just_written,
    refuse_unreadable,
)

log = logging.getLogger(__name__)
MOST_LOGGED = 8


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


def _blocks(content: Any) -> Any:
    """A string is short for one block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[list[AnyPart], BeforeValidator(_blocks)]


def _result_part(part: Any) -> Any:
    """A client's search over its own tools gives their names; all of them are offered here from the start."""
    if isinstance(part, dict) and part.get("type") == "tool_reference":
        return {"type": "text", "text": f"The tool {part.get('tool_name')} is there."}
    return part


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[Annotated[AnyPart, BeforeValidator(_result_part)]], BeforeValidator(_blocks)] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        text = _join(block.text for block in self.content or ())
        return f"Error: {text}" if self.is_error else text


Block = TextPart | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
RENDERED: dict[str, tuple[type[Block], ...]] = {
    "user": (TextPart, ToolResultBlock),
    "assistant": (TextPart, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextPart,),
}
OURS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _block(block: Any) -> Any:
    return block if isinstance(block, dict) and block.get("type") in OURS else as_text(block)


_Block = Annotated[Annotated[Block, Field(discriminator="type")], BeforeValidator(_block)]


class Turn(Part):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_Block], BeforeValidator(_blocks)]

    @property
    def has_results(self) -> bool:
        return any(isinstance(block, ToolResultBlock) for block in self.content)

    def renders(self, block: Block) -> bool:
        """Whether the model is shown anything of it. A sentence in an image's place is not put into its own mouth."""
        if isinstance(block, UnreadablePart):
            return self.role == "user" and any(word in block.was for word in WORDS)
        return isinstance(block, RENDERED[self.role])

    def messages(self) -> Iterator[dict[str, Any]]:
        """As OpenAI's chat messages."""
        blocks = [block for block in self.content if self.renders(block)]
        if self.role == "assistant":
            yield from _answer(blocks)
            return
        texts: list[str] = []
        for block in blocks:
            if isinstance(block, TextPart):
                texts.append(block.text)
            elif isinstance(block, ToolResultBlock):
                yield from self._said(texts)
                texts = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        yield from self._said(texts)

    def _said(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        if texts:
            yield {"role": self.role, "content": _join(texts)}


def _answer(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    """The assistant's message, if there is anything of it."""
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks
        if isinstance(b, ToolUseBlock)
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": _join(b.text for b in blocks if isinstance(b, TextPart)),
        "reasoning_content": _join(b.reasoning for b in blocks if isinstance(b, ThinkingBlock)),
    }
    if calls:
        message["tool_calls"] = calls
    if blocks:
        yield message


class CustomTool(Function):
    parameters: dict[str, Any] | None = Field(alias="input_schema")


class ForeignTool(Part):
    """One whose schema only Anthropic's models know (bash_20250124), or that runs on its servers (web_search)."""

    type: str
    name: str | None = None


def _is_foreign(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "foreign" if isinstance(kind, str) and kind != "custom" and "input_schema" not in tool else "custom"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ForeignTool, Tag("foreign")], Discriminator(_is_foreign)
]


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
    tools: list[AnyTool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(None, description="The old name of output_config.format.")

    cache_control: Any = ignored("every prefix is found without marks")
    context_management: Any = ignored("a prompt that does not fit is refused, not cut")
    compaction: Any = ignored("a prompt that does not fit is refused, not cut")
    mcp_servers: Any = ignored("nothing is called from here; offer their tools in `tools`")
    speed: Any = ignored("there is one speed")
    user_profile_id: Any = ignored("there is one user")
    workspace_id: Any = ignored("there is one workspace")
    betas: Any = ignored("what is known is always on")

    def chat_request(self, service: Service) -> ChatRequest:
        """RequestError: the fields do not go together."""
        choice = self.tool_choice or Choice(type="auto")
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        self._log_left_out()
        return ChatRequest(
            messages=[*self.told(), *(message for turn in self.messages for message in turn.messages())],
            sampling=service.engine.info.sampling,
            tools=self._tools(choice),
            tool_choice=choice.as_tool_choice(),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            format=JsonSchema(form.format_schema) if form else None,
            reasoning_budget=self._budget(service.config.efforts, config.effort),
        )

    def _tools(self, choice: Choice) -> tuple[Tool, ...]:
        foreign = [tool for tool in self.tools or () if isinstance(tool, ForeignTool)]
        offered = [tool for tool in self.tools or () if isinstance(tool, CustomTool)]
        forced = [tool for tool in foreign if choice.type == "tool" and tool.name == choice.name]
        if choice.type == "any" and not offered:
            forced = foreign
        if forced:
            raise RequestError(
                f"{forced[0].name or 'a tool'} must be called, but {forced[0].type} is a tool that Anthropic defines",
                param="tool_choice",
                hint="This server takes tools with a name and an input_schema.",
            )
        return as_tools([FunctionTool(function=tool) for tool in offered])

    def _log_left_out(self) -> None:
        tools = [tool.type for tool in self.tools or () if isinstance(tool, ForeignTool)]
        blocks = [
            block.was if isinstance(block, UnreadablePart) else block.type
            for turn in self.messages
            for block in turn.content
            if not turn.renders(block)
        ]
        for what, types in (("tools", tools), ("blocks", blocks)):
            if types:
                shown = [kind[:LONGEST_TYPE] for kind in dict.fromkeys(types)][:MOST_LOGGED]
                log.info("left out %d %s that mean nothing to this model: %r", len(types), what, shown)

    def told(self) -> Iterator[dict[str, Any]]:
        text = _join(block.text for block in self.system or ())
        if text:
            yield {"role": "system", "content": text}

    def _budget(self, efforts: Mapping[str, int | None], effort: Effort | None) -> int | None:
        """Tokens of thinking."""
        if self.thinking is None:
            return efforts[effort or "medium"]
        if self.thinking.type == "adaptive":
            return efforts[effort or "max"]
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
        written = just_written(["tool" if turn.has_results else turn.role for turn in self.messages])
        if written is not None:
            turn = self.messages[written]
            refuse_unreadable((b if turn.renders(b) else None for b in turn.content), f"messages[{written}].content")
        info = service.engine.info
        return replace(
            super().chat_request(service),
            sampling=self.sampling(info.sampling, info.n_vocab),
            max_tokens=self.max_tokens,
            stops=(*self.stops(), *(self.stop_sequences or ())),
        )

    def _budget(self, efforts: Mapping[str, int | None], effort: Effort | None) -> int | None:
        budget, half = super()._budget(efforts, effort), self.max_tokens // 2
        if self.thinking is not None:
            return budget
        return half if budget is None else min(budget, half)


def _join(texts: Iterable[str]) -> str:
    """Blocks are paragraphs."""
    return "\n\n".join(text for text in texts if text)
