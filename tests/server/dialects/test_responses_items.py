"""The history of the Responses dialect as messages: items of all types that OpenAI has, and of newer ones."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from stepgguf.errors import RequestError
from stepgguf.server.dialects.responses.items import (
    as_chat_messages,
    left_out_types,
    parse_items,
    refuse_unreadable_input,
)
from stepgguf.server.dialects.responses.request import ResponsesBody
from stepgguf.server.dialects.responses.tools import Offers
from stepgguf.server.dialects.sealed_reasoning import seal
from tests.server.conftest import Serve, Server

UNSEEN = "[image: this model reads text only]"
USER = {"role": "user", "content": "Look."}


def messages_of(items: Any) -> list[dict[str, Any]]:
    return as_chat_messages(typed(items), Offers(()))


def test_items_of_the_assistant_make_one_message_and_reasoning_starts_the_next() -> None:
    text = {"type": "output_text", "text": "Let me look.", "annotations": []}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": [text]},
        {"type": "function_call", "id": "fc", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": seal("More.")},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": '{"x":1}'},
        {"type": "function_call_output", "call_id": "a", "output": "21"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "22"}]},
    ]

    def call(id: str, arguments: str) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    assert messages_of(items) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [call("a", "{}")],
        },
        {"role": "assistant", "content": "", "reasoning_content": "More.", "tool_calls": [call("b", '{"x":1}')]},
        {"role": "tool", "tool_call_id": "a", "content": "21"},
        {"role": "tool", "tool_call_id": "b", "content": "22"},
    ]


def test_a_string_is_a_message_of_the_user() -> None:
    assert messages_of("Hello") == [{"role": "user", "content": "Hello"}]


# tools, wherever they ran ------------------------------------------------------------------------------------------


def test_calls_of_custom_tools_and_in_namespaces_are_calls() -> None:
    items = [
        {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "Done"},
        {"type": "function_call", "call_id": "b", "namespace": "mcp__notes", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "milk"}]},
    ]
    assert [called(message) or message["content"] for message in messages_of(items)] == [
        [("apply_patch", {"input": "*** Begin Patch"})],
        "Done",
        [("mcp__notes__read", "{}")],
        "milk",
    ]


@pytest.mark.parametrize(
    ("items", "calls", "output"),
    [
        (
            [
                {"type": "local_shell_call", "call_id": "a", "action": {"type": "exec", "command": ["ls"]}},
                {"type": "local_shell_call_output", "id": "a", "output": "x.py"},
            ],
            [("local_shell", {"action": {"type": "exec", "command": ["ls"]}})],
            "x.py",
        ),
        (
            [
                {"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]}, "status": "completed"},
                {"type": "shell_call_output", "call_id": "a", "output": [{"stdout": "x.py", "stderr": ""}]},
            ],
            [("shell", {"action": {"commands": ["ls"]}})],
            '{"stdout": "x.py", "stderr": ""}',
        ),
        (
            [
                {"type": "apply_patch_call", "call_id": "a", "operation": {"type": "delete_file", "path": "x"}},
                {"type": "apply_patch_call_output", "call_id": "a", "status": "completed", "output": "ok"},
            ],
            [("apply_patch", {"operation": {"type": "delete_file", "path": "x"}})],
            "ok",
        ),
        (
            [
                {"type": "computer_call", "call_id": "a", "action": {"type": "screenshot"}},
                {"type": "computer_call_output", "call_id": "a", "output": {"type": "computer_screenshot"}},
            ],
            [("computer", {"action": {"type": "screenshot"}})],
            UNSEEN,
        ),
        (
            [
                {
                    "type": "mcp_call",
                    "id": "a",
                    "name": "read",
                    "arguments": '{"x":1}',
                    "server_label": "s",
                    "output": "milk",
                }
            ],
            [("read", '{"x":1}')],
            "milk",
        ),
        (
            [{"type": "code_interpreter_call", "id": "a", "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]}],
            [("code_interpreter", {"code": "1+1"})],
            '[{"type": "logs", "logs": "2"}]',
        ),
        (
            [{"type": "file_search_call", "id": "a", "queries": ["q"], "results": [{"text": "found", "score": 1}]}],
            [("file_search", {"queries": ["q"]})],
            '[{"text": "found", "score": 1}]',
        ),
        (
            [
                {"type": "tool_search_call", "call_id": "a", "execution": "client", "arguments": {"query": "q"}},
                {"type": "tool_search_output", "call_id": "a", "tools": []},
            ],
            [("tool_search", {"query": "q"})],
            '{"tools": []}',
        ),
        (
            [
                {"type": "telepathy_call", "call_id": "a", "thought": "cats"},
                {"type": "telepathy_call_output", "call_id": "a", "output": {"heard": True}},
            ],
            [("telepathy", {"thought": "cats"})],
            '{"heard": true}',
        ),
    ],
    ids=lambda items: items[0]["type"] if isinstance(items, list) and isinstance(items[0], dict) else "",
)
def test_a_call_with_a_result_is_shown_whatever_its_type(items: Any, calls: Any, output: str) -> None:
    asked, call, result = messages_of([USER, *items])
    assert asked["content"] == "Look."
    assert called(call) == calls
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", "a", output)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "iVBORw0K"},
        {"type": "code_interpreter_call", "id": "ci_1", "code": "1+1", "outputs": None},
        {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []},
        {"type": "mcp_approval_request", "id": "m", "name": "f", "arguments": "{}", "server_label": "s"},
        {"type": "mcp_approval_response", "approval_request_id": "m", "approve": True},
        {"type": "compaction", "id": "c", "encrypted_content": "x"},
        {"type": "compaction_trigger"},
        {"type": "additional_tools", "role": "developer", "tools": []},
        {"type": "hologram", "depth": 3},
    ],
    ids=lambda item: item["type"],
)
def test_what_cannot_be_shown_is_left_out(item: Any) -> None:
    assert messages_of([USER, item]) == [{"role": "user", "content": "Look."}]
    assert left_out_types(typed([USER, item])) == [item["type"]]


@pytest.mark.slow
def test_the_log_says_once_what_is_left_out(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    items = [USER, {"type": "hologram"}, {"type": "hologram"}, {"type": "compaction", "encrypted_content": "x"}]
    body = {"input": items, "tools": [{"type": "web_search"}], "max_output_tokens": 1}
    with serve() as server:
        for _ in range(2):
            assert server.client.post("/v1/responses", json=body).status_code == 200
    told = [record.message for record in caplog.records if "said once" in record.message]
    assert [line.rsplit(" ", 1)[1] for line in told] == ["'web_search'", "'hologram'", "'compaction'"]


def test_reasoning_of_another_provider_is_its_summary() -> None:
    foreign = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "gAAA"}
    (message,) = messages_of([foreign, {"role": "assistant", "content": "Yes."}])
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


def test_what_may_be_null_may_be_null() -> None:
    items = [
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": None},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": None, "namespace": None},
        {"type": "function_call_output", "call_id": "a", "output": None},
    ]
    call, result = messages_of(items)
    assert (called(call), result["content"]) == ([("f", {})], "")


# what a model of text cannot read ------------------------------------------------------------------------------------

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
NOTES = base64.b64encode(b"milk").decode()


def test_an_image_in_a_tools_output_or_an_earlier_turn_is_a_sentence() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "See:"}, IMAGE]},
        {"type": "function_call", "call_id": "a", "name": "view_image", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [IMAGE]},
    ]
    asked, _, result = messages_of(items)
    assert (asked["content"], result["content"]) == (f"See:\n\n{UNSEEN}", UNSEEN)
    refuse_unreadable_input(typed(items), 0)


def test_a_file_of_text_is_text() -> None:
    file = {"type": "input_file", "filename": "list.txt", "file_data": f"data:text/plain;base64,{NOTES}"}
    (asked,) = messages_of([{"role": "user", "content": [file]}])
    assert asked["content"] == "list.txt\n\nmilk"


@pytest.mark.parametrize("part", [IMAGE, {"type": "input_audio", "input_audio": {}}, {"type": "input_file"}])
def test_in_the_message_just_written_it_is_refused(server: Server, part: dict[str, Any]) -> None:
    body = {"input": [USER, {"role": "user", "content": [{"type": "input_text", "text": "See:"}, part]}]}
    answered = server.client.post("/v1/responses", json=body)
    error = answered.json()["error"]
    assert (answered.status_code, error["param"]) == (400, "input[1].content[1]")
    assert "the model reads text only" in error["message"]


def test_the_place_is_that_in_the_body_when_an_answer_is_continued() -> None:
    before = typed([USER, {"role": "assistant", "content": "Where?"}])
    with pytest.raises(RequestError) as caught:
        refuse_unreadable_input([*before, *typed([{"role": "user", "content": [IMAGE]}])], len(before))
    assert caught.value.param == "input[0].content[0]"


def typed(items: Any) -> Any:
    sent: Any = ResponsesBody.model_validate({"input": items}).input
    return parse_items(sent)


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
