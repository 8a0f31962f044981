"""Fields that several dialects share, and what they mean to the engine: sampling, the answer's length and form.

Within a class they stand in the order of their use, as /docs shows them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stepgguf.chat.request import AnswerFormat, GbnfGrammar, JsonObject, JsonSchema, OneOfTexts
from stepgguf.errors import RequestError
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body.objects import Body, ignored

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Bias = Annotated[float, Field(ge=-100, le=100)]
UNLIMITED = -1  # llama.cpp's, LM Studio's, Ollama's
Tokens = Annotated[int, Field(ge=UNLIMITED)]
AnswerTokens = Annotated[int, Field(ge=1)] | Literal[-1]
RANDOM_SEED = -1  # llama.cpp's, LM Studio's
MOST_STOPS = 16
MOST_BIASED = 4096
NO_REGEX = "regular expressions are not supported; use grammar, or `pattern` in a JSON schema"
GREEDY = 1e-3  # a temperature below makes logits overflow; the likeliest token it is in any case


def limit(tokens: int | None) -> int | None:
    """None is no limit."""
    return None if tokens == UNLIMITED else tokens


def _of_few_tokens(bias: Any) -> Any:
    """Before each is looked at."""
    if isinstance(bias, (dict, list)) and len(bias) > MOST_BIASED:
        raise PydanticCustomError("too_long", "at most {most} tokens can have a bias", {"most": MOST_BIASED})
    return bias


class SamplingFields(Body):
    """What is absent is as the model file says."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    stop: str | list[str] | None = Field(None, description=f"Up to {MOST_STOPS} texts that end the answer.")
    seed: int | None = Field(None, description="The same seed gives the same answer; -1 is a new one each time.")
    top_p: float | None = Field(None, ge=0, le=1, description="1 is off.")
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="0 is off.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, description="1 is off.")
    repeat_penalty: float | None = Field(None, ge=0.01, le=2, description="llama.cpp's name of repetition_penalty.")
    logit_bias: Annotated[dict[str, Bias] | list[tuple[int, Bias]] | None, BeforeValidator(_of_few_tokens)] = Field(
        None, description="Token ids and what is added to their logits.", examples=[{"271": -100}]
    )

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
            "seed": None if self.seed == RANDOM_SEED else self.seed,
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
            if not str(token).isdecimal() or len(str(token)) > 9 or int(token) >= n_vocab:
                raise RequestError(
                    f"logit_bias: expected token ids from 0 to {n_vocab - 1}, found {token!r}",
                    param="logit_bias",
                    hint="POST /tokenize gives the ids of a text.",
                )
            bias[int(token)] = value
        return tuple(bias.items())


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's way to give a schema.")


class NamedSchema(Body):
    name: Any = ignored("the schema says it all")
    description: Any = ignored("the model does not see it")
    strict: Any = ignored("a schema is always kept to")
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Nvext(Body):
    """NVIDIA's extensions. Others than these steer its own routers."""

    guided_json: dict[str, Any] | bool | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    max_thinking_tokens: Tokens | None = None


class StructuredOutputs(Body):
    """vLLM's."""

    elsewhere: ClassVar = {"regex": NO_REGEX}
    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In GBNF.")


class FormatFields(Body):
    """Ways to ask for a form of the answer; one may be given. The thinking stays free."""

    elsewhere: ClassVar = {
        "guided_regex": NO_REGEX,
        "regex": NO_REGEX,
        "ebnf": "there is no EBNF here; use grammar, in GBNF",
        "structural_tag": "there are no structural tags here; use tools or response_format",
    }
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(None, discriminator="type")
    json_schema: dict[str, Any] | bool | None = Field(None, description="llama.cpp's: the answer is such JSON.")
    grammar: str | None = Field(None, description="llama.cpp's: the answer as GBNF.")
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | None = Field(None, description="NVIDIA's and once vLLM's json_schema.")
    guided_choice: list[str] | None = Field(None, description="NVIDIA's and once vLLM's: one of these texts.")
    guided_grammar: str | None = Field(None, description="NVIDIA's and once vLLM's grammar, here in GBNF.")
    nvext: Nvext | None = None

    def format(self) -> AnswerFormat | None:
        nvext, vllm = self.nvext or Nvext(), self.structured_outputs or StructuredOutputs.model_validate({})
        schemas = {
            "json_schema": self.json_schema,
            "guided_json": self.guided_json,
            "nvext.guided_json": nvext.guided_json,
            "structured_outputs.json": vllm.json_,
        }
        choices = {
            "guided_choice": self.guided_choice,
            "nvext.guided_choice": nvext.guided_choice,
            "structured_outputs.choice": vllm.choice,
        }
        grammars = {
            "grammar": self.grammar,
            "guided_grammar": self.guided_grammar,
            "nvext.guided_grammar": nvext.guided_grammar,
            "structured_outputs.grammar": vllm.grammar,
        }
        asked: dict[str, AnswerFormat] = {
            name: JsonSchema(schema) for name, schema in schemas.items() if schema is not None
        }
        asked |= {name: OneOfTexts(tuple(texts)) for name, texts in choices.items() if texts is not None}
        asked |= {name: GbnfGrammar(text) for name, text in grammars.items() if text}
        if (form := self._response_format()) is not None:
            asked["response_format"] = form
        if len(asked) > 1:
            first, second, *_ = asked
            raise RequestError(f"{first} and {second} both say what the answer looks like", param=second)
        return next(iter(asked.values()), None)

    def _response_format(self) -> AnswerFormat | None:
        asked = self.response_format
        if isinstance(asked, JsonSchemaFormat):
            return JsonSchema(asked.json_schema.schema_)
        if isinstance(asked, JsonObjectFormat):
            return JsonObject() if asked.schema_ is None else JsonSchema(asked.schema_)
        return None
