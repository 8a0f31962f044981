"""Grammars against llama.cpp's own grammar engine, schemas against the jsonschema package."""

from __future__ import annotations

import ctypes
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepgguf.chat.answer_grammar import constrain
from stepgguf.chat.output import Markers, OutputMachine
from stepgguf.chat.request import Choice, Format, Gbnf, JsonObject, JsonSchema, Tool, ToolChoice
from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import Grammar, Step

MARKERS = Markers(end_of_reasoning=767, call=762, end_of_call=763)
MINUTES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Vocab:
    """The embedded model's, with llama.cpp's grammar sampler over it."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self.handle = llama_cpp.llama_model_get_vocab(self._model)
        n = llama_cpp.llama_vocab_n_tokens(self.handle)
        self.pieces = [self._piece(i) for i in range(n)]
        self.end = next(i for i in range(n) if llama_cpp.llama_vocab_is_eog(self.handle, i))
        self.words = [i for i in range(n) if not llama_cpp.llama_vocab_is_eog(self.handle, i)]

    def _piece(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self.handle, token_id, buffer, 64, 0, True)
        return buffer.raw[:n]

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 2))()
        n = llama_cpp.llama_tokenize(self.handle, data, len(data), buffer, len(data) + 2, False, True)
        return list(buffer[:n])


class Walk:
    """One generation under a grammar."""

    def __init__(self, vocab: Vocab, gbnf: str, root: str = "root") -> None:
        self._vocab = vocab
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab.handle, gbnf.encode(), root.encode())
        assert self._sampler, f"llama.cpp refuses\n{gbnf}"

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_sampler_free(self._sampler)

    def allowed(self, ids: list[int]) -> list[int]:
        data = (llama_cpp.llama_token_data * len(ids))(*(llama_cpp.llama_token_data(i, 0.0, 0.0) for i in ids))
        array = llama_cpp.llama_token_data_array(data, len(ids), -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return [entry.id for entry in data if entry.logit == 0.0]

    def may_end(self) -> bool:
        return bool(self.allowed([self._vocab.end]))

    def accept(self, token_id: int) -> bool:
        if not self.allowed([token_id]):
            return False
        llama_cpp.llama_sampler_accept(self._sampler, token_id)
        return True

    def accepts(self, ids: list[int]) -> bool:
        return all(self.accept(i) for i in ids) and self.may_end()

    def random(self, rng: random.Random, phrases: tuple[str, ...], limit: int = 3000) -> list[int]:
        """Tokens that are allowed, drawn at random; phrases lead to an end."""
        ids: list[int] = []
        words = [self._vocab.tokenize(phrase) for phrase in phrases]
        everything = self._vocab.words
        while len(ids) < limit:
            if self.may_end() and rng.random() < 0.6:
                return ids
            word = rng.choice(words) if rng.random() < 0.7 else []
            for token_id in word:
                if not self.accept(token_id):
                    break
                ids.append(token_id)
            if not word:
                options = self.allowed(rng.sample(everything, 200)) or self.allowed(everything)
                if options:
                    ids.append(rng.choice(options))
                    assert self.accept(ids[-1])
                else:
                    assert self.may_end(), "a dead end"
        return []


@pytest.fixture(scope="module")
def vocab(demo_gguf: Path) -> Vocab:
    return Vocab(demo_gguf)


def free(format: Format | None = None, *tools: Tool, **others: Any) -> Grammar:
    """As it holds after the thinking."""
    options: dict[str, Any] = {"choice": ToolChoice(), "parallel": True, "in_reasoning": True, **others}
    grammar = constrain(MARKERS, format=format, tools=tools, **options)
    assert grammar is not None
    return grammar


def accepts(vocab: Vocab, grammar: Grammar, text: str, root: str = "root") -> bool:
    with Walk(vocab, grammar.gbnf, root) as walk:
        return walk.accepts(vocab.tokenize(text))


# schemas: grammar == jsonschema --------------------------------------------------------------------------------------

NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
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
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
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
def test_the_grammar_allows_what_the_schema_allows(vocab: Vocab, name: str) -> None:
    schema, instances = CORPUS[name]
    grammar = free(JsonSchema(schema))
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
def test_what_is_drawn_from_the_grammar_is_valid(vocab: Vocab, name: str) -> None:
    schema = CORPUS[name][0]
    gbnf = free(JsonSchema(schema)).gbnf
    drawn = 0
    for seed in range(12):
        with Walk(vocab, gbnf) as walk:
            ids = walk.random(random.Random(seed), ('"', "}", "]", "1", '"}', "null"), limit=400)
        if ids:
            drawn += 1
            text = b"".join(vocab.pieces[i] for i in ids).decode()
            assert is_valid(schema, json.loads(text)), text
    assert drawn >= 3


def test_where_the_grammar_is_stricter_than_the_schema(vocab: Vocab) -> None:
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
        assert not accepts(vocab, free(JsonSchema(schema)), instance)


def test_escapes_of_json_are_understood_and_no_lone_surrogate(vocab: Vocab) -> None:
    grammar = free(JsonSchema({"type": "string", "maxLength": 1}))
    assert all(accepts(vocab, grammar, text) for text in ('"\\u00e9"', '"\\ud83d\\ude00"', '"\\n"', '"🙂"'))
    assert not any(accepts(vocab, grammar, text) for text in ('"\\ud83d"', '"\\ude00"', '"\n"', '"\\x"', '"ab"'))


def bounds() -> st.SearchStrategy[dict[str, Any]]:
    value = st.one_of(
        st.integers(-1200, 1200), st.decimals(-30, 30, places=2).map(float), st.sampled_from([10**20, 1e22])
    )
    keys = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
    return st.dictionaries(st.sampled_from(keys), value, min_size=1, max_size=3)


def about(limits: dict[str, Any]) -> st.SearchStrategy[Decimal]:
    near = st.sampled_from([Decimal(str(v)) for v in limits.values()])
    step = st.sampled_from([Decimal(s) for s in ("0", "0.01", "-0.01", "0.1", "1", "-1", "9", "-0.001", "100")])
    return st.one_of(st.builds(lambda a, b: a + b, near, step), st.decimals(-1300, 1300, places=3))


@MINUTES
@given(st.data())
def test_bounds_of_numbers_are_exact(vocab: Vocab, data: st.DataObject) -> None:
    limits = data.draw(bounds())
    kind = data.draw(st.sampled_from(["integer", "number"]))
    schema = {"type": kind, **limits}
    numbers = [data.draw(about(limits)) for _ in range(8)]
    texts = [f"{int(n)}" if kind == "integer" else f"{n:f}" for n in numbers]
    texts = [text for text in texts if len(text.partition(".")[0]) <= 20 and not re.fullmatch(r"-0(\.0*)?", text)]
    valid = [all(_holds(key, Decimal(text), Decimal(str(bound))) for key, bound in limits.items()) for text in texts]
    try:
        grammar = free(JsonSchema(schema))
    except BadGrammar:
        assert not any(valid)
    else:
        assert [accepts(vocab, grammar, text) for text in texts] == valid


def _holds(key: str, value: Decimal, bound: Decimal) -> bool:
    above = value > bound if key == "exclusiveMinimum" else value >= bound
    below = value < bound if key == "exclusiveMaximum" else value <= bound
    return above if key.endswith("inimum") else below


PATTERNS = [
    "^[a-z]{2,5}$",
    "abc",
    "^abc",
    "abc$",
    "^a|b$",
    "^(a|bc)*d?$",
    "^[^a-c]+$",
    r"^\d{3}-\d{4}$",
    r"^\w+\s\S+$",
    "^.{1,3}$",
    r"^[A-Z][\w.-]*$",
    "^$",
    "",
    r'^"\\$',
    r"^[\x41-\x43\u00e9]+?$",
    "^(?:x(?:y|z)+){2}$",
    r"^[]a]$".replace("[]a]", r"[\]a]"),
    r"^\t\/[-+]$",
    "^(a|)b$",
    "^a{0}b$",
    "^é+$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@MINUTES
@given(st.data())
def test_patterns_match_as_regular_expressions(vocab: Vocab, pattern: str, data: st.DataObject) -> None:
    near = st.from_regex(re.compile(pattern, re.ASCII))
    text = data.draw(st.one_of(near, near.map(lambda t: t + "a"), st.text('abcxyz19 -."\\\t\n]éZ', max_size=6)))
    if "<" in text:
        return  # a special token's text would be that token
    if not text.isascii() and "é" not in pattern:
        return  # what \w and \s mean there depends on the engine
    if "\r" in text and "." in pattern:
        return  # the dot of ECMA-262, which JSON Schema means, excludes it, and Python's does not
    escaped = json.dumps(text, ensure_ascii=False)
    expected = re.search(pattern.replace("$", r"\Z"), text, re.ASCII) is not None
    if "\\u" in escaped:
        return  # control characters are written as escapes, which a pattern does not know
    assert accepts(vocab, free(JsonSchema({"type": "string", "pattern": pattern})), escaped) == expected


# formats and tools: where a grammar holds ----------------------------------------------------------------------------

WEATHER = Tool(
    "get_weather",
    "",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
CLOCK = Tool("clock", "", {})
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
TIME = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"


def test_without_format_and_tools_nothing_is_constrained() -> None:
    for tools, choice in [((), ToolChoice()), ((CLOCK,), ToolChoice("none"))]:
        assert not constrain(MARKERS, in_reasoning=True, format=None, tools=tools, choice=choice, parallel=True)
    lacking = Markers(1, None, None)
    assert not constrain(lacking, in_reasoning=True, format=None, tools=[CLOCK], choice=ToolChoice(), parallel=True)


@pytest.mark.parametrize("in_reasoning", [True, False])
def test_a_grammar_starts_where_it_must(in_reasoning: bool) -> None:
    after = ((767, "root"),) if in_reasoning else ()
    both = ((767, "root"), (762, "calls")) if in_reasoning else ()
    assert free(JsonObject(), in_reasoning=in_reasoning).starts == after
    assert free(None, CLOCK, in_reasoning=in_reasoning).starts == ((762, "calls"),)
    assert free(JsonObject(), CLOCK, in_reasoning=in_reasoning).starts == both
    assert free(None, CLOCK, in_reasoning=in_reasoning, choice=ToolChoice("required")).starts == both
    assert free(JsonObject(), CLOCK, in_reasoning=in_reasoning, choice=ToolChoice("none")).starts == after


def test_a_free_answer_may_call_one_or_several_tools(vocab: Vocab) -> None:
    one = free(None, WEATHER, CLOCK, parallel=False)
    many = free(None, WEATHER, CLOCK)
    call, time_ = CALL.removeprefix("<tool_call>"), TIME.removeprefix("<tool_call>")
    for text in (call, time_, call + "\n"):
        assert accepts(vocab, one, text, "calls")
        assert accepts(vocab, many, text, "calls")
    for text in (call + TIME, call + "\n" + CALL + TIME):
        assert not accepts(vocab, one, text, "calls")
        assert accepts(vocab, many, text, "calls")
    wrong = [
        "",
        "\n",
        call[:-1],
        call.replace("city", "town"),
        call.replace("get_", ""),
        call + "x",
        time_.replace("\n", ""),
    ]
    assert not any(accepts(vocab, many, text, "calls") for text in wrong)


def test_a_call_needs_the_tokens_and_not_their_characters(vocab: Vocab) -> None:
    call = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    spelled = [i for part in ("</", "tool", "_call", ">") for i in vocab.tokenize(part)]
    with Walk(vocab, free(None, WEATHER).gbnf, "calls") as walk:
        assert not walk.accepts(vocab.tokenize(call) + spelled)


def test_a_required_call_is_all_there_is(vocab: Vocab) -> None:
    any_tool = free(JsonObject(), WEATHER, CLOCK, choice=ToolChoice("required"))
    named = free(None, WEATHER, CLOCK, choice=ToolChoice("required", "clock"))
    assert accepts(vocab, any_tool, "\n" + CALL)
    assert accepts(vocab, named, TIME)
    assert not accepts(vocab, named, CALL)
    assert not any(accepts(vocab, any_tool, text) for text in ("{}", "", "Hello", "\n"))


def test_with_a_format_the_answer_is_that_or_a_call(vocab: Vocab) -> None:
    grammar = free(JsonSchema({"type": "integer"}), CLOCK)
    assert [accepts(vocab, grammar, text) for text in ("5", TIME, "\n" + TIME, "x", "5" + TIME)] == [True] * 3 + [
        False
    ] * 2


def test_the_line_break_after_the_thinking_belongs_to_it(vocab: Vocab) -> None:
    schema = JsonSchema({"type": "integer"})
    assert [accepts(vocab, free(schema, in_reasoning=in_reasoning), "\n5") for in_reasoning in (True, False)] == [
        True,
        False,
    ]


def test_a_choice_is_one_of_its_texts(vocab: Vocab) -> None:
    texts = ("yes", "yes!", "no", 'say "no"\n', "é", *("ab" * n for n in range(1, 60)))
    grammar = free(Choice(texts))
    assert all(accepts(vocab, grammar, text) for text in texts)
    assert not any(accepts(vocab, grammar, text) for text in ("ye", "yesno", "aba", "", "No"))


def test_a_users_grammar_keeps_its_meaning_beside_ours(vocab: Vocab) -> None:
    own = Gbnf(
        'root ::= value (ws value)*  # "root" (\nvalue ::= "value" | [a-z"root(] | <tool_call>\n'
        'ws ::= " "{1,2}\ncall ::= "x"'
    )
    for grammar in (free(own), free(own, CLOCK)):
        assert all(accepts(vocab, grammar, text) for text in ("value", "a  value", '"', "\nt"))
        assert not any(accepts(vocab, grammar, text) for text in ("VALUE", "aa", "a   a", "{}"))
    assert accepts(vocab, free(own, CLOCK), TIME)


ANY_ORDER = Tool(
    "f", "", {"type": "object", "properties": {k: {"type": "integer"} for k in "abcd"}, "required": ["b", "d"]}
)
IN_ORDER = Tool(
    "g", "", {"type": "object", "properties": {k: {"type": "integer"} for k in "abcdefg"}, "required": ["b", "d"]}
)


def written(name: str, values: dict[str, str] | list[tuple[str, str]]) -> str:
    pairs = list(values.items()) if isinstance(values, dict) else values
    return (
        f"\n<function={name}>\n"
        + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in pairs)
        + "</function>\n</tool_call>"
    )


def test_parameters_come_once_and_in_any_order_if_they_are_few(vocab: Vocab) -> None:
    few, many = free(None, ANY_ORDER), free(None, IN_ORDER)

    def calls(tool: Tool, grammar: Grammar, keys: str) -> bool:
        return accepts(vocab, grammar, written(tool.name, [(k, "1") for k in keys]), "calls")

    assert all(calls(ANY_ORDER, few, keys) for keys in ("bd", "db", "abcd", "dcba", "bad"))
    assert not any(calls(ANY_ORDER, few, keys) for keys in ("", "b", "bdb", "bdaa", "bde"))
    assert all(calls(IN_ORDER, many, keys) for keys in ("bd", "abcdefg", "bdg"))
    assert not any(calls(IN_ORDER, many, keys) for keys in ("db", "abc", "bbd", "bdgf"))


VALUES: list[tuple[Any, list[str], list[str]]] = [
    (
        {"type": "string"},
        [
            "",
            "5",
            "a\nb\n",
            "</parameter>x",
            "x\n</parameter>\ny",
            "\n</parameter>\n<para>",
            "</tool_call>",
            "<tool_call>",
            "\n\n",
        ],
        ["x\n</parameter>\n<parameter=y", "x\n</parameter>\n</function>", "</parameter>\n</function>"],
    ),
    ({"enum": ["m", "mm", 3, None]}, ["m", "mm", "3", "null", "None"], ["", "n", "4", "mmm", '"m"']),
    ({"type": "boolean"}, ["true", "false", "True", "False"], ["yes", "TRUE", ""]),
    ({"type": ["integer", "null"]}, ["5", "null", "None"], ["5.5", "x", '"5"']),
    ({"type": ["integer", "string"]}, ["5", "x", ""], []),
    ({"type": "array", "items": {"type": "string"}}, ["[]", '["a", "b"]', '[\n  "a"\n]'], ["a", "[a]", "{}"]),
    (
        {"anyOf": [{"type": "object", "properties": {"x": {"type": "integer"}}}, {"type": "null"}]},
        ['{"x":1}', "{}", "null"],
        ['{"y":1}', "x"],
    ),
    ({"type": "string", "not": {"const": "x"}, "pattern": "(?=x)", "maxLength": 10**9}, ["y"], []),
    ({}, ["anything"], []),
]


@pytest.mark.parametrize(("schema", "good", "bad"), VALUES, ids=[json.dumps(v[0])[:40] for v in VALUES])
def test_values_are_plain_text_for_strings_and_json_for_the_rest(
    vocab: Vocab, schema: Any, good: list[str], bad: list[str]
) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"k": schema}, "required": ["k"]})
    grammar = free(None, tool)
    assert [v for v in good if not accepts(vocab, grammar, written("f", {"k": v}), "calls")] == []
    assert [v for v in bad if accepts(vocab, grammar, written("f", {"k": v}), "calls")] == []


TOOLS = (
    WEATHER,
    CLOCK,
    ANY_ORDER,
    Tool(
        "write",
        "",
        {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "mode": {"enum": ["append", "apply", "new"]},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
                "deep": {"$ref": "#/$defs/node"},
                "at": {"type": ["number", "null"], "minimum": 0},
                "force": {"type": "boolean"},
                "any": {},
            },
            "required": ["path", "tags"],
            "$defs": {"node": NODE},
            "additionalProperties": False,
        },
    ),
    Tool(
        "extra",
        "",
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
    ),
    Tool(
        "either",
        "",
        {
            "anyOf": [
                {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
                {"$ref": "#/$defs/o"},
            ],
            "$defs": {"o": {"type": "object", "properties": {"y": {"type": "string"}}}},
        },
    ),
)


def test_calls_drawn_from_the_grammar_are_read_to_the_same_end_and_valid(vocab: Vocab) -> None:
    """Models may forget </parameter>, and only that, and repeat a parameter that has no schema."""
    grammar = free(None, *TOOLS)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    phrases = (
        "\n</parameter>\n",
        "</function>\n</tool_call>",
        "\n</function>\n</tool_call>",
        '"',
        "}",
        "]",
        "1",
        "<parameter=path>\n",
        "<parameter=tags>\n",
        "\n<parameter=force>\n",
    )
    seen, forgotten = 0, 0
    for seed in range(60):
        with Walk(vocab, grammar.gbnf, "calls") as walk:
            ids = walk.random(random.Random(seed), phrases, limit=600)
        if not ids:
            continue
        machine = OutputMachine(MARKERS, in_reasoning=True, tools=TOOLS)
        deltas = [d for i in [762, *ids] for d in machine.feed(Step(i, vocab.pieces[i]))] + machine.close()
        forgotten += sum("lacks a tag" in w for w in machine.warnings)
        known = ("lacks a tag", "twice")
        assert [w for w in machine.warnings if not any(part in w for part in known)] == []
        assert not any("twice" in w and "call of extra" not in w for w in machine.warnings)
        assert not any(d.kind in ("text", "reasoning") for d in deltas)
        names = [d.text for d in deltas if d.kind == "call"]
        for index, name in enumerate(names):
            arguments = json.loads("".join(d.text for d in deltas if d.kind == "arguments" and d.index == index))
            jsonschema.validate(arguments, schemas[name] or {"type": "object", "maxProperties": 0})
        seen += len(names)
    assert seen >= 60
    assert forgotten >= 10


# refusals ------------------------------------------------------------------------------------------------------------


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
        free(JsonSchema(schema))
    assert error.value.param == "response_format"
    assert error.value.hint


def test_left_recursion_behind_a_finished_rule_is_found(vocab: Vocab) -> None:
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
        free(JsonSchema(schema))


def test_what_cannot_be_called_is_refused() -> None:
    for choice, tools in [(ToolChoice("required"), ()), (ToolChoice("required", "x"), (CLOCK,))]:
        with pytest.raises(BadGrammar, match="was not offered") as error:
            free(None, *tools, choice=choice)
        assert error.value.param == "tool_choice"
    with pytest.raises(BadGrammar, match="cannot") as error:
        constrain(
            Markers(1, None, None),
            in_reasoning=True,
            format=None,
            tools=[CLOCK],
            choice=ToolChoice("required"),
            parallel=True,
        )
    with pytest.raises(BadGrammar, match="protocol") as error:
        free(None, CLOCK, Tool("f", "", {"type": "object", "properties": {"a>b": {}}}))
    assert error.value.param == "tools[1].function.parameters"


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
def test_hostile_schemas_cost_little(vocab: Vocab, name: str) -> None:
    schema, refused = HOSTILE[name]
    started = time.process_time()
    try:
        grammar = free(JsonSchema(schema))
    except BadGrammar:
        assert refused
    else:
        assert not refused
        assert len(grammar.gbnf) < 300 * 1024
        Walk(vocab, grammar.gbnf).__exit__()
    assert time.process_time() - started < 0.3


def test_hostile_tools_cost_little() -> None:
    looped = Tool("f", "", {"anyOf": [{"$ref": "#"}, {"type": "object"}]})
    wide = Tool(
        "f",
        "",
        {"type": "object", "anyOf": [{"anyOf": [{"required": [f"a{i}-{j}"]} for j in range(3)]} for i in range(400)]},
    )
    started = time.process_time()
    with pytest.raises(BadGrammar):
        free(None, looped)
    free(None, wide)
    with pytest.raises(BadGrammar):
        free(
            None,
            *(
                Tool(f"f{i}", "", {"type": "object", "properties": {f"p{i}-{j}": {} for j in range(5)}})
                for i in range(2000)
            ),
        )
    assert time.process_time() - started < 1


def test_hostile_grammars_do_not_reach_the_parser() -> None:
    for text in ("root ::= " + "(" * 100000 + '"a"' + ")" * 100000, "x" * 300000, 'value ::= "a"', 'root ::= "\ud800"'):
        with pytest.raises(BadGrammar) as error:
            free(Gbnf(text))
        assert error.value.param == "response_format"


def test_no_rule_name_is_defined_twice() -> None:
    def names(gbnf: str) -> Iterator[str]:
        return (line.split(" ::=")[0] for line in gbnf.splitlines())

    for format in (
        None,
        JsonObject(),
        JsonSchema({"$ref": "#/$defs/node", "$defs": {"node": NODE}}),
        Gbnf("root ::= ws\nws ::= [ ]"),
    ):
        listed = list(names(free(format, *TOOLS).gbnf))
        assert len(listed) == len(set(listed))
