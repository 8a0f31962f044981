"""Fields that several dialects share, and what they mean to the engine: sampling, the answer's form, thinking."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stepgguf.chat.request import Choice, Format, Gbnf, JsonObject, JsonSchema
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body import Body, Part
from stepgguf.server.config import ServerConfig

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Bias = Annotated[float, Field(ge=-100, le=100)]
MOST_STOPS = 16
GREEDY = 1e-3  # a temperature below makes logits overflow; the likeliest token it is in any case


class SamplingFields(Body):
    """What is absent is as the model file says."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="1 is off.")
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="0 is off.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, description="1 is off.")
    repeat_penalty: float | None = Field(None, ge=0.01, le=2, description="llama.cpp's name of repetition_penalty.")
    logit_bias: dict[str, Bias] | list[tuple[int, Bias]] | None = Field(
        None, description="Token ids and what is added to their logits.", examples=[{"271": -100}]
    )
    seed: int | None = Field(None, description="The same seed gives the same answer.")
    stop: str | list[str] | None = Field(None, description=f"Up to {MOST_STOPS} texts that end the answer.")

    def sampling(self, default: Sampling, n_vocab: int) -> Sampling:
        given: dict[str, Any] = {
            "temperature": 0.0 if self.temperature is not None and self.temperature < GREEDY else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty,
            "logit_bias": self._bias(n_vocab),
            "seed": self.seed,
        }
        return replace(default, **{name: value for name, value in given.items() if value is not None})

    def stops(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > MOST_STOPS:
            raise RequestError(f"stop: at most {MOST_STOPS} texts, found {len(texts)}", param="stop")
        return tuple(text for text in texts if text)

    def _bias(self, n_vocab: int) -> tuple[tuple[int, float], ...] | None:
        if self.logit_bias is None:
            return None
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        bias = {}
        for token, value in pairs:
            if not str(token).isdecimal() or int(token) >= n_vocab:
                raise RequestError(
                    f"logit_bias: expected token ids from 0 to {n_vocab - 1}, found {token!r}",
                    param="logit_bias",
                    hint="POST /tokenize gives the ids of a text.",
                )
            bias[int(token)] = value
        return tuple(bias.items())


class TextFormat(Part):
    type: Literal["text"]


class JsonObjectFormat(Part):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's way to give a schema.")


class NamedSchema(Part):
    name: str | None = None
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class JsonSchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Nvext(Part):
    """NVIDIA's extensions. Others than these steer its own routers."""

    guided_json: dict[str, Any] | bool | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class FormatFields(Body):
    """Ways to ask for a form of the answer; one may be given. The thinking stays free."""

    elsewhere: ClassVar = {
        "guided_regex": "regular expressions are not supported; use guided_grammar, or `pattern` in a JSON schema",
    }
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(None, discriminator="type")
    json_schema: dict[str, Any] | bool | None = Field(None, description="llama.cpp's: the answer is such JSON.")
    grammar: str | None = Field(None, description="llama.cpp's: the answer as GBNF.")
    guided_json: dict[str, Any] | bool | None = Field(None, description="vLLM's and NVIDIA's json_schema.")
    guided_choice: list[str] | None = Field(None, description="vLLM's and NVIDIA's: one of these texts.")
    guided_grammar: str | None = Field(None, description="vLLM's and NVIDIA's grammar, here in GBNF.")
    nvext: Nvext | None = None

    def format(self) -> Format | None:
        nvext = self.nvext or Nvext()
        asked: dict[str, Format] = {}
        for name, schema in (
            ("json_schema", self.json_schema),
            ("guided_json", self.guided_json),
            ("nvext.guided_json", nvext.guided_json),
        ):
            if schema is not None:
                asked[name] = JsonSchema(schema)
        for name, texts in (("guided_choice", self.guided_choice), ("nvext.guided_choice", nvext.guided_choice)):
            if texts is not None:
                asked[name] = Choice(tuple(texts))
        for name, text in (
            ("grammar", self.grammar),
            ("guided_grammar", self.guided_grammar),
            ("nvext.guided_grammar", nvext.guided_grammar),
        ):
            if text:
                asked[name] = Gbnf(text)
        if (form := self._response_format()) is not None:
            asked["response_format"] = form
        if len(asked) > 1:
            first, second, *_ = asked
            raise RequestError(f"{first} and {second} both say what the answer looks like", param=second)
        return next(iter(asked.values()), None)

    def _response_format(self) -> Format | None:
        asked = self.response_format
        if isinstance(asked, JsonSchemaFormat):
            return JsonSchema(asked.json_schema.schema_)
        if isinstance(asked, JsonObjectFormat):
            return JsonObject() if asked.schema_ is None else JsonSchema(asked.schema_)
        return None


class ReasoningMap(Body):
    """OpenRouter's."""

    enabled: bool | None = Field(None, description="false: no thinking.")
    effort: Effort | None = None
    max_tokens: int | None = Field(None, ge=0, description="At most so many tokens of thinking.")
    exclude: bool | None = Field(None, description="Think, but do not send the thinking.")


class TemplateSwitches(Body):
    """vLLM's and llama.cpp's chat_template_kwargs. The template has no switches; these act on the thinking."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ReasoningFields(Body):
    """Many spellings of one quantity: at most so many tokens of thinking. The smallest that is asked for counts."""

    reasoning: ReasoningMap | None = None
    reasoning_effort: Effort | None = Field(None, description="none: no thinking. low, medium: a limit to it.")
    thinking_budget_tokens: int | None = Field(None, ge=-1, description="llama.cpp's limit; -1 is none.")
    chat_template_kwargs: TemplateSwitches | None = None
    include_reasoning: bool | None = Field(None, description="false: think, but do not send the thinking.")
    reasoning_format: Literal["general", "deepseek-style", "deepseek", "auto"] | None = Field(
        None, description="StepFun's. The thinking is always sent under both names, reasoning and reasoning_content."
    )

    def reasoning_budget(self, config: ServerConfig) -> int | None:
        asked, switches = (
            self.reasoning or ReasoningMap.model_validate({}),
            self.chat_template_kwargs or TemplateSwitches(),
        )
        budgets = [config.efforts[effort] for effort in (asked.effort, self.reasoning_effort) if effort is not None]
        budgets += [asked.max_tokens, None if self.thinking_budget_tokens == -1 else self.thinking_budget_tokens]
        if False in (asked.enabled, switches.enable_thinking, switches.thinking):
            budgets.append(0)
        return min((budget for budget in budgets if budget is not None), default=None)

    def shows_reasoning(self) -> bool:
        excluded = self.reasoning is not None and self.reasoning.exclude
        return not excluded and self.include_reasoning is not False
