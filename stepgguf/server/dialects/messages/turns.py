"""A conversation as a client of Anthropic's sends it: turns of blocks, and what the model is shown of them.

    user      tool_result -> a message of role tool; text -> a user message; in the order of the blocks
    assistant thinking -> reasoning_content; text -> content; tool_use -> tool_calls

Blocks of other types. What holds text is text (unreadable.py). Images and documents become a sentence, in the results
of tools and wherever they come again with the history. Blocks that speak of what Anthropic's own service did
(server_tool_use, web_search_tool_result), and those newer than this server, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stepgguf.server.body.objects import RequestObject
from stepgguf.server.body.unreadable import (
    MEDIA_WORDS,
    AnyPart,
    TextPart,
    UnreadablePart,
    as_parts,
    as_text,
    as_tool_output,
    paragraphs,
)
from stepgguf.server.dialects.sealed_reasoning import unseal


class ThinkingBlock(RequestObject):
    """Reasoning of an earlier answer, in plain or sealed in the signature."""

    type: Literal["thinking"]
    thinking: str = ""
    signature: str = ""

    @property
    def reasoning(self) -> str:
        return self.thinking or unseal(self.signature)


class RedactedThinkingBlock(RequestObject):
    """Encrypted by Anthropic, for Anthropic: nothing of it can be read here."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(RequestObject):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Any = Field(default_factory=dict)  # some clients keep the JSON


Texts = Annotated[list[AnyPart], BeforeValidator(as_parts)]


def _result_part(part: Any) -> Any:
    """Return a part of a tool's result as it is shown. A client's search over its own tools gives their names; all of
    them are offered here from the start."""
    if isinstance(part, dict) and part.get("type") == "tool_reference":
        return {"type": "text", "text": f"The tool {part.get('tool_name')} is there."}
    return part


def _result_parts(content: Any) -> list[Any]:
    return as_tool_output([_result_part(part) for part in content] if isinstance(content, list) else content)


_Results = Annotated[list[TextPart], BeforeValidator(_result_parts)]


class ToolResultBlock(RequestObject):
    """What the client's tool gave for a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: _Results | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        text = paragraphs(block.text for block in self.content or ())
        return f"Error: {text}" if self.is_error else text


Block = TextPart | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
RENDERED: dict[str, tuple[type[Block], ...]] = {
    "user": (TextPart, ToolResultBlock),
    "assistant": (TextPart, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextPart,),
}
TYPED_BLOCKS = ("thinking", "redacted_thinking", "tool_use", "tool_result")


def _known_block(block: Any) -> Any:
    return block if isinstance(block, dict) and block.get("type") in TYPED_BLOCKS else as_text(block)


_Block = Annotated[Annotated[Block, Field(discriminator="type")], BeforeValidator(_known_block)]


class Turn(RequestObject):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_Block], BeforeValidator(as_parts)] = Field(default_factory=list)

    @property
    def has_results(self) -> bool:
        """Whether it has results of tools among its blocks."""
        return any(isinstance(block, ToolResultBlock) for block in self.content)

    def renders(self, block: Block) -> bool:
        """Whether the model is shown anything of this block. The sentence that stands for an image is not put into the
        mouth of the assistant."""
        if isinstance(block, UnreadablePart):
            return self.role == "user" and any(word in block.was for word in MEDIA_WORDS)
        return isinstance(block, RENDERED[self.role])

    @property
    def left_out(self) -> list[str]:
        """The types of the blocks that the model is shown nothing of."""
        blocks = [block for block in self.content if not self.renders(block)]
        return [block.was if isinstance(block, UnreadablePart) else block.type for block in blocks]

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the turn as OpenAI's chat messages, in the order of the blocks."""
        blocks = [block for block in self.content if self.renders(block)]
        if self.role == "assistant":
            yield from _assistant_messages(blocks)
            return
        texts: list[str] = []
        for block in blocks:
            if isinstance(block, TextPart):
                texts.append(block.text)
            elif isinstance(block, ToolResultBlock):
                yield from self._text_message(texts)  # what was written before the result comes before it
                texts = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        yield from self._text_message(texts)

    def _text_message(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        if texts:
            yield {"role": self.role, "content": paragraphs(texts)}


def _assistant_messages(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    """Yield one message of the assistant's with its text, reasoning and calls; none if there is no block."""
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks
        if isinstance(b, ToolUseBlock)
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": paragraphs(b.text for b in blocks if isinstance(b, TextPart)),
        "reasoning_content": paragraphs(b.reasoning for b in blocks if isinstance(b, ThinkingBlock)),
    }
    if calls:
        message["tool_calls"] = calls
    if blocks:
        yield message
