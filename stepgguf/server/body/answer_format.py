"""The form that an answer must have, in every spelling that vendors have for it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from stepgguf.chat.request import AnswerFormat, GbnfGrammar, JsonObject, JsonSchema, OneOfTexts
from stepgguf.errors import RequestError
from stepgguf.server.body.objects import CheckedObject, ignored
from stepgguf.server.body.sampling import Tokens

NO_REGEX = "regular expressions are not supported; use grammar, or `pattern` in a JSON schema"


class PlainTextFormat(CheckedObject):
    type: Literal["text"]


class JsonObjectFormat(CheckedObject):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's way to give a schema.")


class NamedSchema(CheckedObject):
    name: object = ignored("the schema says it all")
    description: object = ignored("the model does not see it")
    strict: object = ignored("a schema is always kept to")
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class JsonSchemaFormat(CheckedObject):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Nvext(CheckedObject):
    """NVIDIA's extensions. Others than these steer its own routers."""

    guided_json: dict[str, Any] | bool | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    max_thinking_tokens: Tokens | None = None


class StructuredOutputs(CheckedObject):
    """vLLM's."""

    elsewhere: ClassVar = {"regex": NO_REGEX}
    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In GBNF.")


class FormatFields(CheckedObject):
    """Ways to ask for a form of the answer; one may be given. The reasoning stays free."""

    elsewhere: ClassVar = {
        "guided_regex": NO_REGEX,
        "regex": NO_REGEX,
        "ebnf": "there is no EBNF here; use grammar, in GBNF",
        "structural_tag": "there are no structural tags here; use tools or response_format",
    }
    response_format: PlainTextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(
        None, discriminator="type", description="text, json_object or json_schema; a schema is kept to."
    )
    json_schema: dict[str, Any] | bool | None = Field(None, description="llama.cpp's: the answer is such JSON.")
    grammar: str | None = Field(None, description="llama.cpp's: the answer as GBNF.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's: json, choice or grammar.")
    guided_json: dict[str, Any] | bool | None = Field(None, description="NVIDIA's and once vLLM's json_schema.")
    guided_choice: list[str] | None = Field(None, description="NVIDIA's and once vLLM's: one of these texts.")
    guided_grammar: str | None = Field(None, description="NVIDIA's and once vLLM's grammar, here in GBNF.")
    nvext: Nvext | None = Field(None, description="NVIDIA's: its guided_ fields and max_thinking_tokens.")

    def answer_format(self) -> AnswerFormat | None:
        """Return the format that is asked for, None if none is. RequestError: two fields ask for one."""
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
