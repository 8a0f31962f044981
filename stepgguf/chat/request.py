"""What a client asks for, whatever dialect it speaks: each becomes a ChatRequest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stepgguf.chat.messages import ChatMessage
from stepgguf.runtime.engine import Sampling


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of type object."""

    name: str
    description: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """The answer is any JSON object."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The answer is JSON that this schema allows."""

    schema: Mapping[str, object] | bool


@dataclass(frozen=True, slots=True)
class OneOfTexts:
    """The answer is one of these texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GbnfGrammar:
    """The answer is what this GBNF grammar allows."""

    text: str


# Tokens of reasoning by effort. The model has no switch; cuts from 2048 tokens on leave it coherent (llama.cpp issue
# 24181). None is no limit, 0 no reasoning.
EFFORTS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 0,
    "low": 2048,
    "medium": 8192,
    "high": None,
    "xhigh": None,
    "max": None,
}

AnswerFormat = JsonObject | JsonSchema | OneOfTexts | GbnfGrammar
ToolMode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may call a tool. auto: text or calls; none: text; required: a call, of `name` if given."""

    mode: ToolMode = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request. Messages are OpenAI's (role, content, reasoning_content, tool_calls, tool_call_id); see messages.py.

    reasoning_budget: at most so many tokens of reasoning; 0 is none, None no limit. stops: texts that end the answer;
    they are not looked for in the reasoning. conversation: what the client calls the conversation, if it names it.
    withhold_calls: the model is shown the tools, so that the prompt stays what the cache has, and can call none of
    them; only with the tool choice auto.
    """

    messages: Sequence[ChatMessage]
    sampling: Sampling
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    format: AnswerFormat | None = None
    reasoning_budget: int | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    conversation: str = ""
    withhold_calls: bool = False
