"""Tools of the Responses dialect: namespaces, free text, tools that run elsewhere. OpenAI's types judge the shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from stepgguf.errors import RequestError
from stepgguf.server.dialects.responses.tools import (
    InputReader,
    Offers,
    ResponsesTool,
    ResponsesToolChoice,
    resolve_choice,
)
from stepgguf.server.dialects.responses.writer import ResponseWriter
from tests.server.conftest import Server
from tests.server.dialects.answers import answer, streamed
from tests.server.dialects.test_responses import COLD, ECHO

TOOLS: TypeAdapter[list[ResponsesTool]] = TypeAdapter(list[ResponsesTool])
CHOICE: TypeAdapter[ResponsesToolChoice] = TypeAdapter(ResponsesToolChoice)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PATCH: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF'},
}
HOSTED = ["web_search", "image_generation", "code_interpreter", "file_search", "tool_search", "mcp", "newer"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def offers(*tools: dict[str, Any]) -> Offers:
    return Offers(TOOLS.validate_python(list(tools)))


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name}


def space(name: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "description": f"Tools in {name}.", "tools": list(tools)}


def call(name: str, value: str) -> list[str]:
    return ["<tool_call>", f"\n<function={name}>\n", "<parameter=", "input>\n", *value, "\n</parameter>\n</function>\n"]


def written(offered: Offers, pieces: list[str], **how: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    deltas, reply = answer(["Hm", "</think>", *pieces], tools=offered.tools, **how)
    writer = ResponseWriter("abc", "demo", 1763600000, ECHO, offered.by_name)
    events = [dict(event.data) for event in streamed(writer, deltas, reply)]
    for event in events:
        EVENT.validate_python(event)
    Response.model_validate(writer.response)
    return events, writer.response


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        ([space("mcp__files", function("read"))], {"mcp__files__read": ("mcp__files", "read")}),
        ([space("mcp__files__", function("read"))], {"mcp__files__read": ("mcp__files__", "read")}),
        (
            [space("a", function("read")), space("b", function("read")), function("read")],
            {"read": (None, "read"), "a__read": ("a", "read"), "b__read": ("b", "read")},
        ),
        (
            [space("a", function("b__c")), space("a__b", function("c")), function("a__b__c")],
            {"a__b__c": (None, "a__b__c"), "a__b__c_2": ("a", "b__c"), "a__b__c_3": ("a__b", "c")},
        ),
        ([space("my <files>", function("read"))], {"my__files___read": ("my <files>", "read")}),
        ([space("s", {**PATCH, "name": "edit"})], {"s__edit": ("s", "edit")}),
    ],
)
def test_a_namespace_and_a_name_are_one_name_to_the_model(declared: Any, names: Any) -> None:
    offered = offers(*declared)
    assert {name: (offer.namespace, offer.name) for name, offer in offered.by_name.items()} == names
    for name, (namespace, inner) in names.items():
        assert offered.model_name(namespace, inner) == name


def test_names_stay_apart_where_they_are_too_long() -> None:
    offered = offers(space("n" * 100, *(function("f" * 60 + end) for end in "abc")))
    assert len(offered.by_name) == 3
    assert all(len(name) <= 128 for name in offered.by_name)


def test_two_tools_of_one_name_in_one_namespace_are_refused() -> None:
    for same in ([function("f"), function("f")], [space("s", function("f"), {**PATCH, "name": "f"})]):
        with pytest.raises(RequestError, match="are called f"):
            offers(*same)


@pytest.mark.parametrize("kind", HOSTED)
def test_a_tool_that_runs_elsewhere_is_left_out(kind: str) -> None:
    offered = offers({"type": kind, "server_label": "x"}, WEATHER, space("s", {"type": kind}))
    assert (list(offered.by_name), offered.left_out) == (["get_weather"], [kind, kind])


# which of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "mode", "name", "left"),
    [
        (None, "auto", None, 3),
        ("none", "none", None, 3),
        ("required", "required", None, 3),
        ({"type": "function", "name": "get_weather"}, "required", "get_weather", 3),
        ({"type": "function", "name": "read", "namespace": "files"}, "required", "files__read", 3),
        ({"type": "custom", "name": "apply_patch"}, "required", "apply_patch", 3),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]},
            "auto",
            None,
            1,
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "web_search"}, {"type": "function", "name": "read", "namespace": "files"}],
            },
            "required",
            None,
            1,
        ),
    ],
)
def test_a_choice_is_understood(choice: Any, mode: str, name: str | None, left: int) -> None:
    offered = offers(WEATHER, PATCH, space("files", function("read")), {"type": "web_search"})
    chosen, kept = resolve_choice(None if choice is None else CHOICE.validate_python(choice), offered)
    assert (chosen.mode, chosen.name, len(kept.tools)) == (mode, name, left)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "absent"},
        {"type": "function", "name": "get_weather", "namespace": "absent"},
        {"type": "custom", "name": "absent"},
        {"type": "web_search_preview"},
        {"type": "mcp", "server_label": "x"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "absent"}]},
    ],
)
def test_what_must_be_called_must_be_offered(server: Server, choice: Any) -> None:
    body = {"input": "Hello", "tools": [WEATHER, {"type": "web_search"}], "tool_choice": choice}
    answered = server.client.post("/v1/responses", json=body)
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, "tool_choice")
    assert "not offered" in answered.json()["error"]["message"]


# calls come back as they were declared ----------------------------------------------------------------------------


def test_a_call_of_a_tool_in_a_namespace_has_both_names() -> None:
    offered = offers(space("mcp__notes", function("read")))
    _, response = written(offered, [*call("mcp__notes__read", "a"), "</tool_call>"])
    item = response["output"][-1]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", "mcp__notes", "read")


@pytest.mark.parametrize("namespace", [None, "code"])
def test_a_call_of_a_custom_tool_is_its_text(namespace: str | None) -> None:
    text = '*** Begin "Patch"\\\n\t- {a}\n+ größer 🙂\n'
    offered = offers(PATCH) if namespace is None else offers(space(namespace, PATCH))
    events, response = written(offered, [*call(offered.model_name(namespace, "apply_patch"), text), "</tool_call>"])
    names = [event["type"] for event in events if event.get("output_index") == 1]
    assert names[0] == "response.output_item.added"
    assert names[-2:] == ["response.custom_tool_call_input.done", "response.output_item.done"]
    assert set(names[1:-2]) == {"response.custom_tool_call_input.delta"}
    assert len(names) > 10, "it arrives in pieces"
    assert "".join(event["delta"] for event in events if event["type"].endswith("input.delta")) == text
    item = response["output"][-1]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", text)
    assert item.get("namespace") == namespace


def test_the_model_is_shown_the_grammar_of_a_custom_tool() -> None:
    (tool,) = offers(PATCH).tools
    assert PATCH["format"]["definition"] in tool.parameters["properties"]["input"]["description"]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("text", ["", "a", '"\\{}', "a\nb\x01\t", "größer 🙂", "}", '"}'])
def test_a_string_is_read_out_of_json_in_pieces(text: str, size: int) -> None:
    for ascii_only in (False, True) if text != "größer 🙂" else (False,):
        arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
        reader = InputReader()
        found = [reader.feed(arguments[i : i + size]) for i in range(0, len(arguments), size)]
        assert ("".join(found), reader.is_complete) == (text, True)
    for end in range(len(arguments)):
        cut = InputReader()
        assert text.startswith(cut.feed(arguments[:end]))
        assert not cut.is_complete or text.endswith("}")


@pytest.mark.parametrize("tool", [PATCH, function("apply_patch")])
def test_a_call_that_is_cut_is_incomplete_wherever_it_is_cut(tool: dict[str, Any]) -> None:
    offered = offers(tool)
    whole, _ = answer(["</think>", *call("apply_patch", 'a "b" {c}\n\nd'), "</tool_call>"], tools=offered.tools)
    _, reply = answer(["</think>"], reason="length")
    text = "input" if tool is PATCH else "arguments"
    for end in range(1, len(whole) + 1):
        writer = ResponseWriter("abc", "demo", 1763600000, ECHO, offered.by_name)
        events = [event.data for event in streamed(writer, whole[:end], reply)]
        item, last = writer.response["output"][-1], events[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
        assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
        assert item["status"] == ("completed" if end == len(whole) else "incomplete")
        if end < len(whole) and text == "arguments":
            with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
                json.loads(item[text])
        for event in events:
            EVENT.validate_python(event)


# a real server and OpenAI's client --------------------------------------------------------------------------------


def test_the_embedded_model_calls_a_tool_in_a_namespace(client: openai.OpenAI) -> None:
    """It was trained on the name that it knows."""
    forced: Any = {"type": "function", "name": "get_weather", "namespace": "mcp__weather"}
    tools: Any = [space("mcp__weather", WEATHER), {"type": "web_search"}]
    response = client.responses.create(input="What is the weather in Paris?", tools=tools, tool_choice=forced, **COLD)
    found = response.output[-1]
    assert (found.type, found.namespace, found.name) == ("function_call", "mcp__weather", "get_weather")  # type: ignore[union-attr]
    assert json.loads(found.arguments).keys() == {"city"}  # type: ignore[union-attr]
    Response.model_validate(response.to_dict())


@pytest.mark.slow
def test_the_embedded_model_calls_a_custom_tool(client: openai.OpenAI) -> None:
    tools: Any = [PATCH]
    asked: dict[str, Any] = {"input": "Hello", "tools": tools, "tool_choice": {"type": "custom", "name": "apply_patch"}}
    events: list[Any] = list(client.responses.create(max_output_tokens=300, stream=True, **asked, **COLD))
    assert "response.custom_tool_call_input.delta" in {event.type for event in events}
    assert events[-1].type in ("response.completed", "response.incomplete")  # it has not learnt when a patch ends
    assert events[-1].response.output[-1].type == "custom_tool_call"
