"""The text of a tool call becomes a name and JSON, or says why it is no call."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgguf.chat.call_reader import CallReader, value_as_json
from stepgguf.chat.parameter_types import allowed_types, parameter_types
from stepgguf.chat.request import Tool

ALL = {"string", "number", "integer", "boolean", "null", "array", "object"}


def tool(**properties: Any) -> dict[str, Tool]:
    return {"f": Tool("f", None, {"type": "object", "properties": properties})}


def written(*pairs: tuple[str, str]) -> str:
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in pairs)
    return f"\n<function=f>\n{parameters}</function>\n"


def read(text: str, tools: dict[str, Tool], cuts: list[int] | None = None) -> tuple[CallReader, str]:
    """The reader at its end, where </tool_call> stands, and the JSON it gave: unclosed if that is within a value."""
    reader = CallReader(tools)
    edges = range(len(text) + 1) if cuts is None else sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    arguments = ""
    for a, b in pairwise(edges):
        arguments += reader.feed(text[a:b])
        if reader.problem is not None:
            reader.rest += text[b:]  # as the machine does: nothing is fed any more
            return reader, arguments
    if reader.in_value and not reader.try_end():
        return reader, arguments
    return reader, arguments + reader.finish()


def arguments_of(text: str, tools: dict[str, Tool]) -> Any:
    reader, arguments = read(text, tools)
    assert reader.problem is None
    assert reader.warnings == []
    return json.loads(arguments)


# the cases of llama.cpp's tests for this model (tests/test-chat.cpp) -------------------------------------------------


@pytest.mark.parametrize(
    ("properties", "pairs", "expected"),
    [
        (
            {"name": "string", "ref": "string"},
            {"name": "fooBar", "ref": "5123123"},
            {"name": "fooBar", "ref": "5123123"},
        ),
        ({"arg1": "integer"}, {"arg1": "42555916"}, {"arg1": 42555916}),
        ({"ref": "integer", "name": "string"}, {"ref": "42555916", "name": "baz"}, {"ref": 42555916, "name": "baz"}),
        ({"text": "string"}, {"text": ""}, {"text": ""}),
        (
            {"quoted": "string", "unquoted": "string"},
            {"quoted": '"foo"', "unquoted": "foo"},
            {"quoted": '"foo"', "unquoted": "foo"},
        ),
        ({"code": "string"}, {"code": "def f():\n    return 1\n\nf()"}, {"code": "def f():\n    return 1\n\nf()"}),
        ({"todos": "array"}, {"todos": '[{"a": 1,\n "b": false}]'}, {"todos": [{"a": 1, "b": False}]}),
        ({"name": ["string", "null"]}, {"name": "null"}, {"name": None}),
        ({"name": ["string", "null"]}, {"name": "hello world"}, {"name": "hello world"}),
        ({"value": ["object", "string"]}, {"value": '{"a": 1}'}, {"value": {"a": 1}}),
        ({"value": ["object", "string"]}, {"value": "{not valid json"}, {"value": "{not valid json"}),
        ({"amount": ["number", "string"]}, {"amount": "2 dollars"}, {"amount": "2 dollars"}),
        ({"amount": ["number", "string"]}, {"amount": "42"}, {"amount": 42}),
    ],
)
def test_values_get_the_type_that_the_schema_says(properties: Any, pairs: dict[str, str], expected: Any) -> None:
    tools = tool(**{name: {"type": types} for name, types in properties.items()})
    assert arguments_of(written(*pairs.items()), tools) == expected


def test_a_call_without_parameters_is_an_empty_object() -> None:
    assert read("\n<function=f>\n</function>\n", tool())[1] == "{}"
    assert read("<function=f></function>", tool())[1] == "{}"


def test_a_string_streams_and_other_values_wait_for_their_end() -> None:
    reader = CallReader(tool(s={"type": "string"}, n={"type": "integer"}))
    assert reader.feed('<function=f>\n<parameter=s>\nHello "w') == '{"s":"Hello \\"w'
    assert reader.name == "f"
    assert reader.feed("orld\n</para") == "orld"
    assert reader.feed("graph>\n") == "\\n</paragraph>"
    assert reader.feed("</parameter>\n<parameter=n>\n4") == '","n":'
    assert reader.feed("2") == ""
    assert reader.feed("\n</parameter>\n</function>") == ""
    assert reader.finish() == "42}"


VALUES = [
    "",
    "\n",
    "a\nb",
    "\n\n\n",
    "</parameter>",
    "a</parameter>\n</function>",
    "<a>\n</parameter>\n</b>",
    "x\n</parameter>",
    "\n</parameter>\nx",
    "</parameter>\n</parameter>",
    "x\n</parameter>\n",
    "<tool_call>\n<function=g>\n",
    "</tool_call>",
    '"é🙂\\\t',
    " x ",
    "\n</parameter>\n</parameter>\n<para",
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_may_hold_anything_but_its_end(value: str) -> None:
    tools = tool(a={"type": "string"}, b={"type": ["string", "null"]})
    assert arguments_of(written(("a", value), ("b", value)), tools) == {"a": value, "b": value}
    assert arguments_of(written(("b", value), ("a", value)), tools) == {"a": value, "b": value}


def test_an_empty_value_may_lack_its_line() -> None:
    text = "<function=f>\n<parameter=a>\n</parameter>\n<parameter=b>\n</parameter>\n</function>"
    assert arguments_of(text, tool(a={"type": "string"}, b={})) == {"a": "", "b": ""}


def test_the_first_of_two_equal_parameters_counts() -> None:
    reader, arguments = read(written(("a", "1"), ("a", "2"), ("b", "3")), tool(a={"type": "string"}, b={}))
    assert json.loads(arguments) == {"a": "1", "b": 3}
    assert reader.warnings == ["the call of f has 'a' twice; the first one counts"]


def test_values_that_do_not_fit_are_passed_on_with_a_warning() -> None:
    tools = tool(a={"type": "integer"}, b={"type": "boolean"})
    reader, arguments = read(written(("a", "[1]"), ("b", "maybe\nnot")), tools)
    assert json.loads(arguments) == {"a": [1], "b": "maybe\nnot"}
    assert len(reader.warnings) == 2


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("True", {"boolean"}, "true"),
        ("None", {"null", "string"}, "null"),
        ("None", {"string"}, '"None"'),
        ("True", {"string", "integer"}, '"True"'),
        (" 5 ", {"integer"}, "5"),
        ("5.0", {"integer"}, "5.0"),
        ("5.5", {"integer", "string"}, '"5.5"'),
        ("NaN", {"number", "string"}, '"NaN"'),
        ("-Infinity", {"number"}, '"-Infinity"'),
        ("007", {"integer", "string"}, '"007"'),
        ("9" * 5000, {"integer", "string"}, json.dumps("9" * 5000)),
        ("[" * 100000, {"array", "string"}, json.dumps("[" * 100000)),
        ('"x"', ALL, '"\\"x\\""'),
        ('"x"', {"object"}, '"x"'),
    ],
    ids=lambda value: (" ".join(sorted(value)) if isinstance(value, set | frozenset) else value)[:20],
)
def test_text_becomes_json_by_its_types(text: str, types: set[str], expected: str) -> None:
    assert value_as_json(text, frozenset(types))[0] == expected


# what is not a call --------------------------------------------------------------------------------------------------

TYPED = tool(a={"type": "string"}, n={"type": "integer"})


@pytest.mark.parametrize(
    ("text", "name", "arguments", "rest"),
    [
        ("", None, "", ""),
        ("hello", None, "", "hello"),
        ("\n<functi", None, "", "\n<functi"),
        ("\n<function=g>\n</function>", None, "", "\n<function=g>\n</function>"),
        ("<function=f\n>", None, "", "<function=f\n>"),
        ('{"name": "f"}', None, "", '{"name": "f"}'),
        ("<function=f>\nhello</function>", "f", "{}", "\nhello</function>"),
        ("<function=f>\n<parameter=a\n>", "f", "{}", "\n<parameter=a\n>"),
        ("<function=f>\n", "f", "{}", "\n"),
        ("<function=f>\n<param", "f", "{}", "\n<param"),
        ("<function=f>\n</function>\nand more", "f", "{}", "\nand more"),
        ("<function=f>\n<parameter=a>\nx\n</parameter>\n</function>!", "f", '{"a":"x"}', "!"),
        ("<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=\n", "f", '{"a":"x"}', "<parameter=\n"),
    ],
)
def test_text_that_is_no_call_is_not_lost(text: str, name: str | None, arguments: str, rest: str) -> None:
    for cuts in (None, []):
        reader, found = read(text, TYPED, cuts)
        assert (reader.name, found, reader.rest) == (name, arguments, rest)
        assert reader.problem


@given(st.lists(st.sampled_from(VALUES), min_size=2, max_size=2), st.lists(st.integers(0, 500)), st.integers(0, 400))
def test_every_split_reads_the_same_even_if_cut(values: list[str], cuts: list[int], length: int) -> None:
    text = written(("a", values[0]), ("n", "12"), ("b", values[1]))[:length]
    whole, expected = read(text, {**TYPED}, [])
    reader, arguments = read(text, {**TYPED}, cuts)
    assert arguments == expected
    assert (reader.name, reader.problem, reader.rest) == (whole.name, whole.problem, whole.rest)
    if arguments and not reader.in_value:
        json.loads(arguments)


@given(st.text("<>/=\nparmetfunciox f", max_size=60), st.lists(st.integers(0, 100)))
def test_garbage_is_never_lost(text: str, cuts: list[int]) -> None:
    reader, arguments = read(text, TYPED, cuts)
    assert reader.problem
    assert reader.rest == text
    assert arguments == ""


# what a model forgets ------------------------------------------------------------------------------------------------

PLACE = {
    "f": Tool(
        "f",
        None,
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "state": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    )
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<parameter=city>\nDallas\n<parameter=state>\nTX\n</parameter>\n", {"city": "Dallas", "state": "TX"}),
        ("<parameter=city>\nDallas</parameter>\n<parameter=state>TX</parameter>\n", {"city": "Dallas", "state": "TX"}),
        ("<parameter=city>\nDallas\n</parameter>\n\n<parameter=n>\n5\n\n", {"city": "Dallas", "n": 5}),
        ("<parameter=n>\n5\n<parameter=city>\npwd\n", {"n": 5, "city": "pwd"}),
        ("<parameter=city>\npwd\n", {"city": "pwd"}),
        ("<parameter=city>\n<parameter=state>\n", {"city": "", "state": ""}),
        ("<parameter=city>\n</parameter>\n<parameter=state>\n\n", {"city": "", "state": ""}),
        ("<parameter=city>\na\n</parameter>\n\n", {"city": "a"}),
    ],
)
def test_a_forgotten_end_of_a_value_is_found_where_the_schema_says_so(body: str, expected: dict[str, Any]) -> None:
    text = f"\n<function=f>\n{body}</function>\n"
    for cuts in (None, []):
        reader, arguments = read(text, PLACE, cuts)
        assert json.loads(arguments) == expected
        assert (reader.problem, reader.rest.strip()) == (None, "")
        assert any("lacks a tag" in warning for warning in reader.warnings)


@pytest.mark.parametrize(
    "value",
    [
        "x\n<parameter=other>\ny",  # no parameter of this function
        "x\n<parameter=city>\ny",  # this one
        "x <parameter=state>",  # not at the start of a line
        "x\n</function>\ny",
        "x\n</function>\n</tool_call>\ny",  # only the token ends a call
        "a < b\n<",
        "</parameter>",
        "x</parameter>\n</function>\n",
    ],
)
def test_what_looks_like_the_protocol_but_cannot_be_it_stays_in_the_value(value: str) -> None:
    for cuts in (None, []):
        reader, arguments = read(written(("city", value), ("state", "s")), PLACE, cuts)
        assert (json.loads(arguments), reader.warnings) == ({"city": value, "state": "s"}, [])


def test_a_call_does_not_end_before_its_required_parameters_are_there() -> None:
    reader, arguments = read("\n<function=f>\n<parameter=state>\nTX\n</function>\n", PLACE)
    assert reader.in_value
    assert arguments == '{"state":"TX'


def test_arguments_are_no_json_before_the_call_is_whole() -> None:
    text = written(("a", "x\ny"), ("n", "12"), ("b", "z"))
    for n in range(len(text) + 1):
        reader = CallReader(tool(a={"type": "string"}, n={"type": "integer"}))
        arguments = reader.feed(text[:n]) + reader.cut_off()
        assert arguments.startswith("{") == (reader.name is not None)
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments)


# types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, ALL),
        (True, ALL),
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, {"number", "integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": "any"}, ALL),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"type": "string", "enum": ["a", None]}, {"string"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]}, {"string", "null"}),
        ({"oneOf": [{"type": "array"}, {"type": "object"}]}, {"array", "object"}),
        ({"allOf": [{"type": ["string", "null"]}, {"type": ["null", "array"]}]}, {"null"}),
        ({"$ref": "#/$defs/n", "description": "x"}, {"null"}),
        ({"$ref": "#/$defs/loop"}, ALL),
        ({"$ref": "https://example.org"}, ALL),
        ({"type": "string", "anyOf": [{"minLength": 1}, {"pattern": "x"}]}, {"string"}),
        (5, ALL),
    ],
)
def test_the_types_that_a_schema_allows(schema: Any, expected: set[str]) -> None:
    root = {"$defs": {"n": {"type": "null"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}]}}}
    assert allowed_types(schema, root) == expected


def test_doubling_references_cost_nothing() -> None:
    root = {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(100)}}
    root["$defs"]["d100"] = {"type": "null"}  # type: ignore[dict-item]
    assert allowed_types({"$ref": "#/$defs/d0"}, root) == {"null"}


def test_a_parameter_is_found_wherever_it_is_declared() -> None:
    parameters = {
        "$ref": "#/$defs/args",
        "$defs": {
            "args": {
                "allOf": [
                    {"properties": {"a": {"type": "string"}}},
                    {"anyOf": [{"properties": {"b": {"type": "null"}}}]},
                ]
            }
        },
    }
    assert parameter_types(parameters, "a") == {"string"}
    assert parameter_types(parameters, "b") == {"null"}
    assert parameter_types(parameters, "c") == ALL
    assert parameter_types({"additionalProperties": {"type": "integer"}}, "c") == {"integer"}
    assert parameter_types(None, "c") == ALL
