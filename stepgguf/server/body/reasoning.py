"""How much the model may reason.

Vendors have two dozen spellings of this one quantity, and clients send several at once. Each is a row of
`ReasoningAmounts` and becomes a limit in tokens, of which the least counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import EFFORTS
from stepgguf.server.body.answer_format import Nvext
from stepgguf.server.body.objects import CheckedObject, ignored
from stepgguf.server.body.sampling import UNLIMITED, Effort, Tokens, token_limit
from stepgguf.server.config import ServerConfig

# Words for efforts that are not among EFFORTS. Clients leave a field of theirs empty for "as you like".
EFFORT_SYNONYMS = dict.fromkeys(("off", "disabled", "disable", "false", "no"), "none")
EFFORT_SYNONYMS |= dict.fromkeys(
    ("on", "enabled", "enable", "true", "yes", "default", "auto", "adaptive", "dynamic", ""), "max"
)


def _effort_word(value: Any) -> Any:
    """Return a word as EFFORTS has it. Clients write it with capitals, or say on and off."""
    if not isinstance(value, str):
        return value
    word = EFFORT_SYNONYMS.get(value.strip().lower(), value.strip().lower())
    if word not in EFFORTS:
        known = ", ".join(EFFORTS)
        raise PydanticCustomError("unknown_effort", "expected one of {known}, or a number of tokens", {"known": known})
    return word


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value


def _low_effort_switch(value: Any) -> Any:
    return {True: "low", False: "high"}[value] if isinstance(value, bool) else value


Level = Annotated[bool | Tokens | Effort, BeforeValidator(_effort_word)]


class MapAmounts(CheckedObject):
    """How much reasoning, as an object says it."""

    type: Level | None = Field(None, description="enabled, disabled, adaptive, auto.")
    effort: Level | None = Field(None, description="OpenRouter's, OpenAI's.")
    enabled: bool | None = Field(None, description="OpenRouter's, Together's. false: no thinking.")
    enable: bool | None = Field(None, description="SGLang's other name of enabled.")
    reasoning_effort: Level | None = Field(None, description="SGLang's other name of effort.")
    max_tokens: Tokens | None = Field(None, description="OpenRouter's.")
    budget_tokens: Tokens | None = Field(None, description="Anthropic's.")
    token_budget: Tokens | None = Field(None, description="Cohere's.")
    thinking_budget: Tokens | None = Field(None, description="Gemini's.")
    thinking_level: Level | None = Field(None, description="Gemini's.")

    def spellings(self) -> Iterator[Level | None]:
        """Return what each field says; None where it is not sent."""
        return (getattr(self, name) for name in MapAmounts.model_fields)


class ReasoningMap(MapAmounts):
    exclude: bool | None = Field(None, description="OpenRouter's: think, but do not send the thinking.")
    summary: object = ignored("nobody writes one; the reasoning itself is sent")
    generate_summary: object = ignored("nobody writes one; the reasoning itself is sent")
    display: Literal["summarized", "omitted", "updates"] | None = Field(
        None, description="Anthropic's. omitted: blocks are sent sealed, without their text."
    )
    block_binding: object = ignored("a signature holds nothing that could be bound")
    clear_thinking: object = ignored("the chat template decides which reasoning stays")
    keep: object = ignored("the chat template decides which reasoning stays")
    context: object = ignored("the chat template decides which reasoning stays")
    mode: object = ignored("there is one mode")
    include_thoughts: object = ignored("the reasoning itself is sent")


MapOrLevel = Annotated[
    Annotated[ReasoningMap, Tag("a map")] | Annotated[Level, Tag("a level")],
    Discriminator(lambda value: "a map" if isinstance(value, dict | ReasoningMap) else "a level"),
]


class ReasoningAmounts(CheckedObject):
    """THE table: every spelling of "at most so many tokens of reasoning". A field is a row, and its type says how it is
    read. Vendors have them in the body or, as vLLM, SGLang and llama.cpp, in chat_template_kwargs; here they may
    stand in both. This model's template has no switches of its own."""

    reasoning_effort: MapOrLevel | None = Field(
        None,
        description="OpenAI's and most others'. none: no thinking; low, medium: a limit to it; high: no limit. A "
        f"number is a limit in tokens, {UNLIMITED} none. Of all spellings of this that are sent the least counts.",
        examples=["low"],
    )
    reasoning: MapOrLevel | None = Field(None, description="OpenRouter's, Together's, SGLang's map; LM Studio's word.")
    thinking: MapOrLevel | None = Field(
        None, description="Map or switch of Anthropic, Z.ai, DeepSeek, Moonshot, Volcengine, Cohere, NVIDIA."
    )
    think: MapOrLevel | None = Field(None, description="Ollama's.")
    enable_thinking: bool | None = Field(None, description="DashScope's, SiliconFlow's, Qwen's, GLM's.")
    disable_reasoning: Annotated[bool | None, AfterValidator(_negated)] = Field(None, description="Cerebras'.")
    thinking_mode: Level | None = Field(None, description="MiniMax's.")
    thinking_effort: Level | None = Field(None, description="Moonshot's.")
    low_effort: Annotated[Level | None, BeforeValidator(_low_effort_switch)] = Field(
        None, description="NVIDIA's switch."
    )
    thinking_budget: Tokens | None = Field(None, description="DashScope's, SiliconFlow's, Gemini's.")
    thinking_budget_tokens: Tokens | None = Field(None, description="llama.cpp's.")
    reasoning_budget_tokens: Tokens | None = Field(None, description="llama.cpp's other name of it.")
    reasoning_budget: Tokens | None = Field(None, description="NVIDIA's.")
    max_thinking_tokens: Tokens | None = Field(None, description="NVIDIA's.")
    thinking_token_budget: Tokens | None = Field(None, description="vLLM's.")

    thinking_config: MapOrLevel | None = Field(None, description="Gemini's map.")
    google: ReasoningAmounts | None = Field(None, description="What Gemini's own is in, behind OpenAI's dialect.")
    chat_template_kwargs: ReasoningAmounts | None = Field(None, description="vLLM's, SGLang's, llama.cpp's.")
    custom_params: ReasoningAmounts | None = Field(None, description="SGLang's.")

    def spellings(self) -> Iterator[Spelling]:
        """Return what each field of the table says; None where it is not sent."""
        return (getattr(self, name) for name in ReasoningAmounts.model_fields)

    def reasoning_limit(self, config: ServerConfig) -> int | None:
        """Return the least of the limits that are sent, in tokens; None if there is none."""
        return _least_limit(self.spellings(), config.efforts)


class ReasoningFields(ReasoningAmounts):
    include_reasoning: bool | None = Field(None, description="false: think, but do not send the thinking.")
    reasoning_format: Literal["general", "deepseek-style", "deepseek", "auto", "parsed", "hidden"] | None = Field(
        None,
        description="StepFun's, llama.cpp's, Groq's. The thinking is always sent under both names, reasoning and "
        "reasoning_content; hidden: not at all.",
    )
    nvext: Nvext | None = Field(None, description="NVIDIA's: its guided_ fields and max_thinking_tokens.")

    def spellings(self) -> Iterator[Spelling]:
        yield from super().spellings()
        yield self.nvext.max_thinking_tokens if self.nvext is not None else None

    def shows_reasoning(self) -> bool:
        """Whether the reasoning is sent. The model reasons in either case."""
        maps = (self.reasoning, self.thinking, self.reasoning_effort)
        excluded = any(isinstance(one, ReasoningMap) and one.exclude for one in maps)
        return not excluded and self.include_reasoning is not False and self.reasoning_format != "hidden"


Spelling = MapOrLevel | ReasoningAmounts | None


def _least_limit(asked: Iterable[Spelling], efforts: Mapping[str, int | None]) -> int | None:
    limits = (_limit_of(one, efforts) for one in asked)
    return min((tokens for tokens in limits if tokens is not None), default=None)


def _limit_of(asked: Spelling, efforts: Mapping[str, int | None]) -> int | None:
    if isinstance(asked, ReasoningMap | ReasoningAmounts):
        return _least_limit(asked.spellings(), efforts)
    if isinstance(asked, bool):  # before int, of which bool is one
        return None if asked else 0
    if isinstance(asked, str):
        return efforts[asked]
    return token_limit(asked)
