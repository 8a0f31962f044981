"""Tool calls under a grammar: as the protocol writes them, read to the same end, valid."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from stepgguf.chat.output import OutputMachine
from stepgguf.chat.request import GbnfGrammar, JsonObject, JsonSchema, Tool
from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import Grammar, Step
from tests.grammar.walk import LINKED_LIST, MARKERS, GrammarVocabulary, GrammarWalk, accepts, constrained
from tests.processor_time import at_most


@pytest.fixture(scope="module")
def vocab(demo_gguf: Path) -> GrammarVocabulary:
    return GrammarVocabulary(demo_gguf)


WEATHER = Tool(
    "get_weather",
    "",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
CLOCK = Tool("clock", "", {})
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


def test_parameters_come_once_and_in_any_order_if_they_are_few(vocab: GrammarVocabulary) -> None:
    few, many = constrained(None, ANY_ORDER), constrained(None, IN_ORDER)

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
    vocab: GrammarVocabulary, schema: Any, good: list[str], bad: list[str]
) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"k": schema}, "required": ["k"]})
    grammar = constrained(None, tool)
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
            "$defs": {"node": LINKED_LIST},
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


@pytest.mark.slow
def test_calls_drawn_from_the_grammar_are_read_to_the_same_end_and_valid(vocab: GrammarVocabulary) -> None:
    """Models may forget </parameter>, and only that, and repeat a parameter that has no schema."""
    grammar = constrained(None, *TOOLS)
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
        with GrammarWalk(vocab, grammar.gbnf, "calls") as walk:
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


def test_hostile_tools_cost_little() -> None:
    looped = Tool("f", "", {"anyOf": [{"$ref": "#"}, {"type": "object"}]})
    wide = Tool(
        "f",
        "",
        {"type": "object", "anyOf": [{"anyOf": [{"required": [f"a{i}-{j}"]} for j in range(3)]} for i in range(400)]},
    )
    with at_most(1):
        with pytest.raises(BadGrammar):
            constrained(None, looped)
        constrained(None, wide)
        with pytest.raises(BadGrammar):
            constrained(
                None,
                *(
                    Tool(f"f{i}", "", {"type": "object", "properties": {f"p{i}-{j}": {} for j in range(5)}})
                    for i in range(2000)
                ),
            )


def test_no_rule_name_is_defined_twice() -> None:
    def names(gbnf: str) -> Iterator[str]:
        return (line.split(" ::=")[0] for line in gbnf.splitlines())

    for format in (
        None,
        JsonObject(),
        JsonSchema({"$ref": "#/$defs/node", "$defs": {"node": LINKED_LIST}}),
        GbnfGrammar("root ::= ws\nws ::= [ ]"),
    ):
        listed = list(names(constrained(format, *TOOLS).gbnf))
        assert len(listed) == len(set(listed))
