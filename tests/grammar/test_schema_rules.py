"""The grammar of a schema allows what the schema allows: compared with the jsonschema package."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from stepgguf.chat.request import JsonSchema
from tests.grammar.walk import LINKED_LIST, GrammarVocabulary, GrammarWalk, accepts, constrained

pytestmark = pytest.mark.slow

CORPUS: dict[str, tuple[Any, list[Any]]] = {
    "any": (True, [1, "x", None, {"a": [1.5, True]}, []]),
    "string": ({"type": "string"}, ["", 'é🙂\n"\\', 5, None]),
    "integer": ({"type": "integer"}, [0, -7, 123456, 1.5, "1", True]),
    "number": ({"type": "number"}, [0, -7.25, 1e-05, 1e16, "1"]),
    "boolean": ({"type": "boolean"}, [True, False, 0, None]),
    "null": ({"type": "null"}, [None, 0, "null"]),
    "types": ({"type": ["string", "null"]}, ["a", None, 1]),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 4}, ["a", "ab", "é🙂xy", "abcde", '""']),
    "min length": ({"type": "string", "minLength": 2}, ["a", "ab", "abcdefgh"]),
    "enum": (
        {"enum": ["a", "ab", "b c", 5, None, True, [1, 2]]},
        ["a", "ab", "abc", "b c", 5, 6, None, True, False, [1, 2]],
    ),
    "enum and type": ({"type": "string", "enum": ["a", 5]}, ["a", 5]),
    "const": ({"const": {"a": 1}}, [{"a": 1}, {"a": 2}, 1]),
    "object": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        [{"a": 1}, {"a": 1, "b": "x"}, {"b": "x"}, {}, {"a": 1, "c": 2}, {"a": "1"}],
    ),
    "optional": (
        {"properties": {k: {"type": "integer"} for k in "abc"}, "type": "object", "additionalProperties": False},
        [{}, {"a": 1}, {"b": 1}, {"c": 1}, {"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}, {"b": 1, "c": "x"}, {"d": 1}],
    ),
    "mixed": (
        {
            "properties": dict.fromkeys("abcd", True),
            "required": ["b", "d"],
            "type": "object",
            "additionalProperties": False,
        },
        [{"b": 1, "d": 1}, {"a": 1, "b": 1, "d": 1}, {"b": 1, "c": 1, "d": 1}, {"a": 1, "d": 1}, {"b": 1}],
    ),
    "extras": (
        {
            "type": "object",
            "properties": {"ab": {"type": "integer"}, 'a"': {"type": "null"}},
            "additionalProperties": {"type": "string"},
        },
        [
            {},
            {"x": "y"},
            {"ab": 1, "x": "y", "a": "z", "abc": ""},
            {"ab": "1"},
            {"x": 1},
            {'a"': "x"},
            {'a"b': "x"},
            {"a\\": "x"},
        ],
    ),
    "map": ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}, {"x": "1"}]),
    "names": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
        [{}, {"x": 1}, {"X": 1}, {"": 1}],
    ),
    "any object": ({"type": "object"}, [{}, {"x": [1, {"y": None}]}, [], 1]),
    "required without properties": (
        {"type": "object", "required": ["a"]},
        [{"a": [1]}, {"a": 1, "b": 2}, {}, {"b": 1}],
    ),
    "forbidden": ({"type": "object", "properties": {"a": False, "b": True}}, [{}, {"b": 1}, {"a": 1}]),
    "array": ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3], ["a"], {}, 1]),
    "counts": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
    ),
    "empty array": ({"type": "array", "maxItems": 0}, [[], [1]]),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[], [1], [1, "a"], ["a"], [1, "a", 2], [1, 2]],
    ),
    "tuple and more": (
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}],
            "items": {"type": "string"},
            "minItems": 2,
            "maxItems": 3,
        },
        [[1], [1, "a"], [1, "a", "b"], [1, "a", "b", "c"], [1, 2]],
    ),
    "anyOf": (
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
        [1, [None], [], "a", [1]],
    ),
    "oneOf": ({"oneOf": [{"const": 1}, {"const": "x"}]}, [1, "x", 2]),
    "anyOf beside": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "additionalProperties": False,
        },
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
    ),
    "anyOf and oneOf": (
        {
            "type": "object",
            "properties": dict.fromkeys("abc", True),
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "oneOf": [{"required": ["c"]}],
        },
        [{"a": 1}, {"c": 1}, {"a": 1, "c": 1}, {"b": 1, "c": 1}],
    ),
    "allOf": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": ["integer", "string"]}}, "required": ["a"]},
                {"properties": {"a": {"type": ["string", "null"]}, "b": {"type": "null"}}},
            ]
        },
        [{"a": "x"}, {"a": 1}, {"a": "x", "b": None}, {"b": None}],
    ),
    "allOf numbers": (
        {"allOf": [{"type": "integer", "minimum": 3}, {"type": "number", "maximum": 20, "exclusiveMinimum": 3}]},
        [3, 4, 20, 21],
    ),
    "ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, [1, "1"]),
    "ref and siblings": ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, [4, 5]),
    "recursion": (
        {"$ref": "#/$defs/node", "$defs": {"node": LINKED_LIST}},
        [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}, {"v": 1, "next": {}}],
    ),
    "recursion through anyOf": (
        {
            "$defs": {"t": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/t"}}]}},
            "$ref": "#/$defs/t",
        },
        [1, [], [1, [2, [3]]], "a", [["a"]]],
    ),
    "recursion of the root": (
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "additionalProperties": False},
        [{}, {"x": {"x": {}}}, {"x": 1}],
    ),
    "pointer": ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "null"}}}, [None, 1]),
    "inclusive": ({"type": "integer", "minimum": -12, "maximum": 105}, [-13, -12, -9, -1, 0, 9, 10, 99, 100, 105, 106]),
    "exclusive": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [0, 1, 9, 10]),
    "share": ({"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1, 1.0, 1.01, -0.1, 0.999]),
    "positive": ({"type": "number", "exclusiveMinimum": 0}, [0, 0.0, 0.001, 5, 123.5, -1]),
    "uuid": (
        {"type": "string", "format": "uuid"},
        ["123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b-12d3-a456-42661417400"],
    ),
    "date": ({"type": "string", "format": "date"}, ["2024-02-29", "2024-13-01", "24-01-01"]),
    "date-time": (
        {"type": "string", "format": "date-time"},
        ["2024-02-29T12:00:00Z", "2024-02-29T23:59:59.25+02:00", "2024-02-29", "2024-02-29T25:00:00Z"],
    ),
    "time": ({"type": "string", "format": "time"}, ["12:00:00Z", "12:60:00Z"]),
    "another format": ({"type": "string", "format": "uri"}, ["https://x", "x"]),
    "pattern": (
        {"type": "string", "pattern": "^(foo|ba[rz])-\\d{2,3}$"},
        ["foo-12", "baz-123", "bar-1234", "foo12", "xfoo-12"],
    ),
    "annotations": (
        {
            "$schema": "x",
            "title": "t",
            "description": "d",
            "default": 1,
            "examples": [1],
            "x-order": 1,
            "type": "integer",
        },
        [1, "1"],
    ),
    "draft 7 tuple": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"type": "integer"}],
            "additionalItems": {"type": "null"},
        },
        [[1], [1, None], [None], [1, 1]],
    ),
}


def is_valid(schema: Any, instance: Any) -> bool:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker = jsonschema.FormatChecker(["uuid"])
    checker.checks("date-time")(
        lambda text: bool(re.fullmatch(r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\S+(Z|[+-]\d\d:\d\d)", text))
    )
    checker.checks("date")(lambda text: bool(re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", text)))
    checker.checks("time")(lambda text: bool(re.fullmatch(r"\d\d:[0-5]\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text)))
    return bool(validator(schema, format_checker=checker).is_valid(instance))


@pytest.mark.parametrize("name", CORPUS)
def test_the_grammar_allows_what_the_schema_allows(vocab: GrammarVocabulary, name: str) -> None:
    schema, instances = CORPUS[name]
    grammar = constrained(JsonSchema(schema))
    valid = [is_valid(schema, instance) for instance in instances]
    assert any(valid)
    assert name in ("any", "another format") or not all(valid)
    for instance, expected in zip(instances, valid, strict=True):
        for text in (
            json.dumps(instance, ensure_ascii=False),
            json.dumps(instance, ensure_ascii=False, indent=2 if name not in ("enum", "const") else None),
            json.dumps(instance, ensure_ascii=False, separators=None if name in ("enum", "const") else (",", ":")),
        ):
            assert accepts(vocab, grammar, text) == expected, text
            assert accepts(vocab, grammar, "\n" + text) == expected


@pytest.mark.parametrize("name", CORPUS)
def test_what_is_drawn_from_the_grammar_is_valid(vocab: GrammarVocabulary, name: str) -> None:
    schema = CORPUS[name][0]
    gbnf = constrained(JsonSchema(schema)).gbnf
    drawn = 0
    for seed in range(12):
        with GrammarWalk(vocab, gbnf) as walk:
            ids = walk.random(random.Random(seed), ('"', "}", "]", "1", '"}', "null"), limit=400)
        if ids:
            drawn += 1
            text = b"".join(vocab.pieces[i] for i in ids).decode()
            assert is_valid(schema, json.loads(text)), text
    assert drawn >= 3


def test_where_the_grammar_is_stricter_than_the_schema(vocab: GrammarVocabulary) -> None:
    two = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    for schema, instance in [
        (two, '{"b":1,"a":1}'),  # the schema's order
        (two, '{"a":1,"c":1}'),  # nothing is said about others
        ({"prefixItems": [True]}, "[1, 2]"),
        ({"minLength": 1}, "5"),
        ({"type": "integer"}, "1.0"),
        ({"type": "number", "minimum": 0}, "1e5"),
        ({"type": "number"}, "1" * 21),
        ({"type": "string", "pattern": "^a$"}, '"\\u0061"'),
    ]:
        assert is_valid(schema, json.loads(instance))
        assert not accepts(vocab, constrained(JsonSchema(schema)), instance)


def test_escapes_of_json_are_understood_and_no_lone_surrogate(vocab: GrammarVocabulary) -> None:
    grammar = constrained(JsonSchema({"type": "string", "maxLength": 1}))
    assert all(accepts(vocab, grammar, text) for text in ('"\\u00e9"', '"\\ud83d\\ude00"', '"\\n"', '"🙂"'))
    assert not any(accepts(vocab, grammar, text) for text in ('"\\ud83d"', '"\\ude00"', '"\n"', '"\\x"', '"ab"'))
