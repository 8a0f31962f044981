"""What a schema says that no grammar can hold is refused by its place; hostile schemas cost little."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from stepgguf.chat.request import JsonSchema
from stepgguf.errors import BadGrammar
from tests.grammar.walk import GrammarVocabulary, GrammarWalk, constrained
from tests.processor_time import at_most


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        (
            {"type": "object", "properties": {"a/b": {"type": "array", "uniqueItems": True}}},
            "#/properties/a~1b/uniqueItems",
        ),
        ({"anyOf": [{"type": "string"}, {"not": {}}]}, "#/anyOf/1/not"),
        ({"$ref": "https://example.org/x.json"}, "#/$ref"),
        ({"$ref": "#/$defs/none"}, "#/$ref"),
        ({"type": "number", "multipleOf": 0.5}, "#/multipleOf"),
        ({"type": "string", "maxLength": 2001}, "#/maxLength"),
        ({"type": "string", "pattern": "(?=a)"}, "#/pattern"),
        ({"type": "string", "pattern": r"(a)\1"}, "#/pattern"),
        ({"type": "string", "pattern": "(a*)*"}, "#/pattern"),
        ({"type": "string", "pattern": "("}, "#/pattern"),
        ({"type": "string", "pattern": "x" * 2000}, "#/pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "minLength"),
        ({"type": "strnig"}, "#/type"),
        ({"type": "object", "properties": []}, "#/properties"),
        ({"type": "number", "minimum": True}, "#/minimum"),
        ({"enum": ["a"], "minLength": 3}, "#/enum"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "itself"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}, "itself"),
        ({"x": 5, "type": "string"}, "#/x"),
        (False, "nothing"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nothing"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "nothing"),
        ("object", "#"),
    ],
    ids=str,
)
def test_a_constraint_that_cannot_be_held_is_refused_by_name(schema: Any, pointer: str) -> None:
    with pytest.raises(BadGrammar, match=re.escape(pointer)) as error:
        constrained(JsonSchema(schema))
    assert error.value.param == "response_format"
    assert error.value.hint


def test_left_recursion_behind_a_finished_rule_is_found(vocab: GrammarVocabulary) -> None:
    schema = {
        "$defs": {
            "a": {
                "anyOf": [
                    {"type": "object", "properties": {"p": {"$ref": "#/$defs/b"}}},
                    {"anyOf": [{"$ref": "#/$defs/b"}]},
                ]
            },
            "b": {"anyOf": [{"$ref": "#/$defs/a"}]},
        },
        "$ref": "#/$defs/a",
    }
    with pytest.raises(BadGrammar, match="itself"):
        constrained(JsonSchema(schema))


def doubling(n: int, combine: Callable[[Any], Any]) -> Any:
    definitions = {f"d{i}": combine([{"$ref": f"#/$defs/d{i + 1}"}] * 2) for i in range(n)}
    return {
        "$defs": {**definitions, f"d{n}": {"type": "object", "properties": {"x": {"type": "null"}}}},
        "$ref": "#/$defs/d0",
    }


def nested(n: int, key: str) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(n):
        schema = {key: [schema, {"type": "integer"}]} if key == "anyOf" else {"type": "array", "items": schema}
    return schema


def chain(n: int) -> Any:
    definitions = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(n)}
    return {"$defs": {**definitions, f"d{n}": True}, "$ref": "#/$defs/d0"}


def product(n: int) -> Any:
    return {
        "type": "object",
        "allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(n)],
    }


HOSTILE: dict[str, tuple[Any, bool]] = {  # schema, whether it is refused
    "64 anyOf in each other": (nested(64, "anyOf"), False),
    "70 anyOf in each other": (nested(70, "anyOf"), True),
    "5000 arrays in each other": (nested(5000, "items"), True),
    "a chain of 3000 references": (chain(3000), True),
    "allOf doubling 60 times": (doubling(60, lambda refs: {"allOf": refs}), False),
    "anyOf doubling 60 times": (doubling(60, lambda refs: {"anyOf": refs}), False),
    "properties doubling 60 times": (
        doubling(60, lambda r: {"type": "object", "properties": {"a": r[0], "b": r[1]}}),
        False,
    ),
    "a product of 40 anyOf": (product(40), True),
    "an enum of 20000": ({"enum": [f"member {i}" for i in range(20000)]}, True),
    "an enum of 2000": ({"enum": [f"member {i}" for i in range(2000)]}, False),
    "prefixes of one text": ({"enum": ["a" * i for i in range(600)]}, False),
    "two large enums": (
        {"allOf": [{"enum": list(range(9000))}, {"enum": list(range(9000, 0, -1))}, {"enum": [1]}]},
        False,
    ),
    "many long strings": (
        {"type": "array", "prefixItems": [{"type": "string", "maxLength": 2000 - i} for i in range(50)]},
        True,
    ),
    "a thousand allOf with ten thousand names": (
        {"allOf": [{"properties": {}}] * 1000 + [{"properties": {f"p{i}": True for i in range(5000)}}]},
        True,
    ),
    "300 KiB": ({"description": "x" * 300 * 1024}, True),
    "tiny and huge bounds": ({"type": "number", "minimum": 5e-324, "maximum": 1.7e308}, True),
    "a loop of allOf": ({"allOf": [{"$ref": "#"}, {"type": "null"}]}, False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_cost_little(vocab: GrammarVocabulary, name: str) -> None:
    schema, refused = HOSTILE[name]
    with at_most(0.3):
        _build_or_refuse(vocab, schema, refused)


def _build_or_refuse(vocab: GrammarVocabulary, schema: Any, refused: bool) -> None:
    try:
        grammar = constrained(JsonSchema(schema))
    except BadGrammar:
        assert refused
    else:
        assert not refused
        assert len(grammar.gbnf) < 300 * 1024
        GrammarWalk(vocab, grammar.gbnf).__exit__()
