"""What a client of Anthropic's sends again with every turn: blocks and tools that this model cannot use."""

from __future__ import annotations

import base64
import logging
from typing import Any

import anthropic
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.request import ChatRequest
from stepgguf.errors import RequestError
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.messages.request import MessagesBody
from stepgguf.server.dialects.messages.turns import ToolResultBlock
from stepgguf.server.metrics import Metrics
from stepgguf.server.service import Service
from stepgguf.server.tasks import TaskLedger
from tests.server.conftest import Server

pytestmark = pytest.mark.slow

SEEN = "[image: this model reads text only]"
UNREAD = "[document: this model reads text only]"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
PDF = {"type": "document", "source": {"type": "url", "url": "http://x/y.pdf"}}
NOTES = base64.b64encode(b"Buy milk.").decode()
WEATHER: dict[str, Any] = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
BASH = {"type": "bash_20250124", "name": "bash"}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}


def test_what_a_tool_gave_is_never_wrong() -> None:
    for given, shown in ((3, "3"), ({"a": 1}, '{"a": 1}'), (["a", {"b": 1}], 'a\n\n{"b": 1}')):
        block = ToolResultBlock.model_validate({"type": "tool_result", "tool_use_id": "x", "content": given})
        assert block.text == shown


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(block) if isinstance(block, str) else block for block in blocks]}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {**user(*blocks), "role": "assistant"}


def result(*parts: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": list(parts)}


CALL = assistant({"type": "tool_use", "id": "a", "name": "get_weather", "input": {}})


def request_of(chat: ChatModel, turns: list[dict[str, Any]], **fields: Any) -> ChatRequest:
    body = MessagesBody.model_validate({"max_tokens": 99, "messages": turns, **fields})
    config, metrics = ServerConfig(("demo",)), Metrics(chat.engine)
    return body.chat_request(Service(chat, config, metrics, 0, TaskLedger(config, metrics)))


def shown(chat: ChatModel, *turns: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request_of(chat, list(turns)).messages]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (IMAGE, SEEN),
        (PDF, UNREAD),
        (
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Buy milk."}},
            "Buy milk.",
        ),
        ({"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": NOTES}}, "Buy milk."),
        ({"type": "document", "source": {"type": "content", "content": [text("Buy milk."), IMAGE]}}, "Buy milk."),
        ({"type": "document", "title": "List", "source": {"type": "content", "content": "Milk."}}, "List\n\nMilk."),
        ({"type": "search_result", "source": "x", "title": "List", "content": [text("Milk.")]}, "List\n\nMilk."),
    ],
)
def test_what_a_tool_returns_and_what_was_said_before_never_ends_a_session(
    chat_model: ChatModel, part: dict[str, Any], said: str
) -> None:
    in_result = shown(chat_model, user("Look."), CALL, user(result(text("Here:"), part)))
    assert in_result[-1] == ("tool", f"Here:\n\n{said}")
    earlier = shown(chat_model, user("Look:", part), assistant("Nice."), user("And now?"))
    assert earlier == [("user", f"Look:\n\n{said}"), ("assistant", "Nice."), ("user", "And now?")]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "assistant", "content": None}, None),
        (assistant(), None),
        (assistant({"type": "thinking", "thinking": None, "signature": None}, "Hm."), {"content": "Hm."}),
        (assistant({"type": "tool_use", "id": "a", "name": "f", "input": None}), {"arguments": {}}),
        (assistant({"type": "tool_use", "id": "a", "name": "f", "input": '{"x": 1}'}), {"arguments": '{"x": 1}'}),
    ],
)
def test_an_answer_that_comes_back_incomplete_is_taken(
    chat_model: ChatModel, turn: dict[str, Any], said: dict[str, Any] | None
) -> None:
    _, *answers, _ = request_of(chat_model, [user("Hi"), turn, user("And now?")]).messages
    flat = [{**message, **message.get("tool_calls", [{"function": {}}])[0]["function"]} for message in answers]
    assert [said.items() <= message.items() for message in flat] == [True] if said else flat == []


def test_names_of_tools_that_a_search_found_are_text(chat_model: ChatModel) -> None:
    found = result({"type": "tool_reference", "tool_name": "get_weather"})
    assert shown(chat_model, user("Look."), CALL, user(found))[-1] == ("tool", "The tool get_weather is there.")


@pytest.mark.parametrize("beside", [[result(text("21")), IMAGE], [result(IMAGE), "Go on."]])
def test_an_image_beside_the_result_of_a_tool_is_the_tools(chat_model: ChatModel, beside: list[Any]) -> None:
    assert SEEN in "".join(content for _, content in shown(chat_model, user("Look."), CALL, user(*beside)))


@pytest.mark.parametrize(("block", "said"), [(IMAGE, "Could not process image"), (PDF, "Could not process PDF")])
def test_only_what_the_user_has_just_written_is_refused_in_words_that_claude_code_knows(
    server: Server, block: dict[str, Any], said: str
) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        turns: Any = [user("Hi"), assistant("Hello."), user("Look:", block)]
        with pytest.raises(anthropic.BadRequestError, match=said):
            client.messages.create(model="demo", max_tokens=2, messages=turns)
        assert client.messages.count_tokens(model="demo", messages=turns).input_tokens > 0
        turns += [assistant("Nice."), user("And now?")]
        assert client.messages.create(model="demo", max_tokens=2, messages=turns).content


def test_blocks_about_anthropics_own_tools_are_left_out_with_a_line_in_the_log(
    chat_model: ChatModel, caplog: pytest.LogCaptureFixture
) -> None:
    searched = assistant(
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "rain"}},
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": [{"type": "web_search_result", "url": "http://x", "title": "Rain", "encrypted_content": "e"}],
        },
        {"type": "mcp_tool_use", "id": "m", "name": "x", "server_name": "y", "input": {}},
        "It rains.",
    )
    nothing = assistant({"type": "fallback", "from": {}, "to": {}}, IMAGE)
    with caplog.at_level(logging.INFO):
        found = shown(chat_model, user("Rain?"), searched, user("Sure?"), nothing, user({"type": "hologram"}, "Hm."))
    assert found == [("user", "Rain?"), ("assistant", "It rains."), ("user", "Sure?"), ("user", "Hm.")]
    for kind in ("server_tool_use", "web_search_tool_result", "mcp_tool_use", "fallback", "image", "hologram"):
        assert f"ignored a type of block that is not known here (said once): '{kind}'" in caplog.messages


def test_the_summary_in_a_compaction_is_not_lost(chat_model: ChatModel) -> None:
    turns = [assistant({"type": "compaction", "content": "The user likes rain."}), user("And now?")]
    assert shown(chat_model, *turns)[0] == ("assistant", "The user likes rain.")


def test_tools_that_anthropic_defines_are_left_out_with_a_line_in_the_log(
    chat_model: ChatModel, caplog: pytest.LogCaptureFixture
) -> None:
    toolset = {"type": "mcp_toolset", "mcp_server_name": "docs"}
    with caplog.at_level(logging.INFO):
        request = request_of(chat_model, [user("Hi")], tools=[BASH, WEATHER, SEARCH, toolset])
    assert [tool.name for tool in request.tools] == ["get_weather"]
    for kind in ("bash_20250124", "web_search_20250305", "mcp_toolset"):
        assert f"ignored a type of tool that is not known here (said once): '{kind}'" in caplog.messages
    known = {"type": "newer_20270101", **WEATHER}
    assert [tool.name for tool in request_of(chat_model, [user("Hi")], tools=[known]).tools] == ["get_weather"]


@pytest.mark.parametrize(
    ("tools", "choice"),
    [([BASH, WEATHER], {"type": "tool", "name": "bash"}), ([BASH, SEARCH], {"type": "any"})],
)
def test_such_a_tool_is_refused_where_the_request_demands_it(
    chat_model: ChatModel, tools: list[Any], choice: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="bash must be called, but bash_20250124 is a tool that Anthropic") as caught:
        request_of(chat_model, [user("Hi")], tools=tools, tool_choice=choice)
    assert caught.value.param == "tool_choice"
    request_of(chat_model, [user("Hi")], tools=[BASH, WEATHER], tool_choice={"type": "any"})


def test_both_names_of_an_answers_format_are_known(chat_model: ChatModel) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    old = request_of(chat_model, [user("Hi")], output_format=form)
    assert old.format == request_of(chat_model, [user("Hi")], output_config={"format": form}).format
    assert old.format is not None
