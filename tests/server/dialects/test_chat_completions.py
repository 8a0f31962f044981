"""Chat Completions on the wire: what clients were seen to need, byte by byte."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import httpx
import pytest

from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.request import EFFORTS
from stepgguf.chat.template import CLOSING_WORDS
from stepgguf.server.dialects.chat_completions.request import ChatInputMessage, as_chat
from tests.server.conftest import Serve, Server

LETTERS = "How many 'r's are in the word strawberry?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of every event but [DONE], each of which must be one line."""
    events = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def deltas(response: httpx.Response) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks(response) for choice in chunk["choices"]]


def joined(response: httpx.Response, key: str) -> str:
    return "".join(delta[key] or "" for delta in deltas(response))


def message(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]["message"]
    return found


def test_it_thinks_and_answers(server: Server) -> None:
    response = server.chat(LETTERS)
    assert message(response)["content"] == "There are 3 'r's."
    assert "r (1), a, w, b, e, r (2), r (3), y" in message(response)["reasoning"]
    assert message(response)["reasoning_content"] == message(response)["reasoning"]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_the_bytes_of_a_stream(server: Server) -> None:
    """Ids, times and versions are replaced; how many tokens a piece has is MTP's affair."""
    response = server.chat("Hello", stream=True, model="step-3.5-flash", stream_options={"include_usage": True})
    trace = response.headers["x-request-id"]
    text = re.sub(r'"created":\d+', '"created":0', response.text.replace(trace, "TRACE"))
    text = re.sub(r'"system_fingerprint":"stepgguf-[^"]+-llama-cpp-python-[^"]+"', '"system_fingerprint":"F"', text)
    head = (
        'data: {"id":"chatcmpl-TRACE","object":"chat.completion.chunk","created":0,"model":"step-3.5-flash",'
        '"system_fingerprint":"F","choices":['
    )
    events = text.split("\n\n")
    assert events[0] == head + (
        '{"index":0,"delta":{"role":"assistant","content":"","reasoning":null,"reasoning_content":null},'
        '"logprobs":null,"finish_reason":null}]}'
    )
    piece = re.search(r'"reasoning":"(The[^"]*)"', events[1])
    assert piece
    assert events[1] == head + (
        f'{{"index":0,"delta":{{"content":null,"reasoning":"{piece[1]}","reasoning_content":"{piece[1]}"}},'
        '"logprobs":null,"finish_reason":null}]}'
    )
    cached = re.findall(r'"cached_tokens":(\d+)', text)[0]
    assert events[-4:-2] == [
        head + '{"index":0,"delta":{"content":null,"reasoning":null,"reasoning_content":null},'
        '"logprobs":null,"finish_reason":"stop"}]}',
        head + '],"usage":{"prompt_tokens":23,"completion_tokens":21,"total_tokens":44,'
        f'"prompt_tokens_details":{{"cached_tokens":{cached}}},'
        f'"completion_tokens_details":{{"reasoning_tokens":11}},"cached_tokens":{cached}}}}}',
    ]
    assert events[-2:] == ["data: [DONE]", ""]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}, {"max_tokens": 5}, {"n": 2}])
def test_every_stream_keeps_what_clients_rely_on(server: Server, fields: dict[str, Any]) -> None:
    response = server.chat("What is the weather in Paris?", stream=True, **fields)
    found = chunks(response)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in found)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1
    for delta in deltas(response):
        assert {"content", "reasoning", "reasoning_content"} <= set(delta)
        assert delta["reasoning"] == delta["reasoning_content"]
        assert sum(bool(delta.get(key)) for key in ("content", "reasoning", "tool_calls")) <= 1
    choices = [choice for chunk in found for choice in chunk["choices"]]
    for index in range(fields.get("n", 1)):
        reasons = [c["finish_reason"] for c in choices if c["index"] == index]
        assert sum(reason is not None for reason in reasons) == 1
        assert reasons[-1] is not None


def test_a_stream_and_a_whole_answer_say_the_same(server: Server) -> None:
    whole, streamed = server.chat(LETTERS), server.chat(LETTERS, stream=True)
    assert joined(streamed, "content") == message(whole)["content"]
    assert joined(streamed, "reasoning") == message(whole)["reasoning"]


def test_a_tool_is_called_and_its_result_used(server: Server) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    first = server.chat(messages=[question], tools=[WEATHER])
    (call,) = message(first)["tool_calls"]
    assert first.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert message(first)["content"] is None
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temp_c": 21, "sky": "sunny"}'}
    second = server.chat(messages=[question, message(first), result], tools=[WEATHER])
    assert message(second)["content"] == "It is 21 degrees and sunny in Paris."
    assert second.json()["usage"]["cached_tokens"] > 300


def test_a_streamed_call_has_an_opener_and_fragments(server: Server) -> None:
    response = server.chat("What is the weather in Paris?", tools=[WEATHER], stream=True)
    opener, *rest = [delta["tool_calls"][0] for delta in deltas(response) if "tool_calls" in delta]
    assert opener["id"].startswith("call_")
    assert opener == {
        "index": 0,
        "id": opener["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert len(rest) > 1
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest)
    assert json.loads("".join(call["function"]["arguments"] for call in rest)) == {"city": "Paris"}


def test_a_named_tool_is_forced_and_none_forbids(server: Server) -> None:
    forced = server.chat(
        "Hello", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}
    )
    assert message(forced)["tool_calls"][0]["function"]["name"] == "get_weather"
    assert "tool_calls" not in message(server.chat("Weather in Paris?", tools=[WEATHER], tool_choice="none"))


SCHEMA = {
    "type": "object",
    "properties": {"letter": {"enum": ["r", "s"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["letter", "count"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"guided_json": SCHEMA},
        {"nvext": {"guided_json": SCHEMA}},
        {"json_schema": SCHEMA},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_the_answer_keeps_to_a_schema_and_the_thinking_is_free(server: Server, fields: dict[str, Any]) -> None:
    found = message(server.chat(LETTERS, **fields))
    answer = json.loads(found["content"])
    assert set(answer) == {"letter", "count"}
    assert answer["letter"] in ("r", "s")
    assert isinstance(answer["count"], int)
    assert found["reasoning"].startswith("Looking for r.")


def test_the_answer_is_one_of_the_choices(server: Server) -> None:
    assert message(server.chat(LETTERS, guided_choice=["yes", "no"]))["content"] in ("yes", "no")
    assert message(server.chat(LETTERS, grammar='root ::= "x" "y"'))["content"] == "xy"


def test_two_forms_at_once_are_refused(server: Server) -> None:
    response = server.chat("Hello", guided_choice=["a"], grammar='root ::= "x"')
    assert response.status_code == 400
    assert "guided_choice and grammar" in response.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"reasoning": {"enabled": False}},
        {"reasoning": {"max_tokens": 0}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking_budget_tokens": 0, "reasoning_effort": "high"},
    ],
    ids=str,
)
def test_thinking_can_be_switched_off(server: Server, fields: dict[str, Any]) -> None:
    response = server.chat("Hello", **fields)
    assert message(response)["reasoning"] is None
    assert message(response)["content"] == "Hello! How can I help you?"
    assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_a_budget_cuts_the_thinking(server: Server) -> None:
    response = server.chat(LETTERS, thinking_budget_tokens=8)
    assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 8
    assert message(response)["reasoning"].endswith(f"\n\n{CLOSING_WORDS}")
    assert re.fullmatch(r"There (is 1 'r'|are \d+ 'r's)\.", message(response)["content"])


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}], ids=str)
def test_thinking_can_be_hidden(server: Server, fields: dict[str, Any]) -> None:
    response = server.chat("Hello", **fields)
    assert message(response)["reasoning"] is None
    assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 11
    streamed = server.chat("Hello", stream=True, **fields)
    assert joined(streamed, "reasoning") == ""
    assert joined(streamed, "content") == "Hello! How can I help you?"


def test_details_of_the_reasoning_come_with_the_map(server: Server) -> None:
    assert "reasoning_details" not in message(server.chat("Hello"))
    found = message(server.chat("Hello", reasoning={"effort": "high"}))
    assert found["reasoning_details"] == [
        {"type": "reasoning.text", "text": found["reasoning"], "format": "unknown", "index": 0}
    ]


def test_thinking_that_takes_all_tokens_is_a_length(server: Server) -> None:
    response = server.chat(LETTERS, max_completion_tokens=5)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert message(response)["content"] == ""
    assert message(response)["reasoning"].startswith("Looking")
    assert response.json()["usage"]["completion_tokens"] == 5


def test_a_stop_ends_the_answer_before_it(server: Server) -> None:
    response = server.chat("Hello", stop=["help", "zebra"])
    assert message(response)["content"] == "Hello! How can I "
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert server.idle_within(2)


def test_logprobs_are_those_of_the_answer(server: Server) -> None:
    response = server.chat("Hello", logprobs=True, top_logprobs=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).strip() == b"Hello! How can I help you?"
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # at temperature 0
    streamed = server.chat("Hello", logprobs=True, top_logprobs=2, stream=True)
    again = [e for c in chunks(streamed) if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert [entry["token"] for entry in again] == [entry["token"] for entry in content]


def test_n_answers_share_a_prompt_and_differ_by_seed(server: Server) -> None:
    """Two candidates: among all, a draw often falls so near to a border that the last bits of a logit, which depend on
    the batch, decide it."""
    fields = {"n": 3, "temperature": 2, "top_k": 2, "top_p": 1, "seed": 1, "max_tokens": 12}
    first, again = (server.chat("Hello", **fields).json() for _ in range(2))
    texts = [choice["message"]["reasoning"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice["message"]["reasoning"] for choice in again["choices"]] == texts
    assert first["usage"]["prompt_tokens"] == 23
    assert first["usage"]["completion_tokens"] > 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        ([{"role": "user", "content": ""}], "Please ask me something."),
        ([{"role": "user", "content": None}], "Please ask me something."),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "Hello! How can I help you?"),
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "Hello! How can I help you?",
        ),
    ],
)
def test_messages_come_in_many_forms(server: Server, messages: list[dict[str, Any]], answer: str) -> None:
    assert message(server.chat(messages=messages))["content"] == answer


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
NOTES = {"type": "file", "file": {"filename": "notes.txt", "file_data": "data:text/plain;base64,SGVsbG8="}}


def text(part_type: str) -> dict[str, Any]:
    return {"type": "text", "text": f"[{part_type}: this model reads text only]"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (IMAGE, text("image")),
        ({"type": "image", "source": {}}, text("image")),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, text("audio")),
        ({"type": "video_url", "video_url": {"url": "x"}}, text("video")),
        ({"type": "file", "file": {"file_id": "f"}}, text("file")),
        ({"type": "hologram"}, text("hologram")),
        (NOTES, {"type": "text", "text": "notes.txt\n\nHello"}),
    ],
    ids=lambda part: part["type"],
)
@pytest.mark.parametrize("place", ["user", "assistant", "tool", "tool's image as a message"])
def test_a_part_of_an_old_turn_or_of_a_tools_result_is_shown_as_text(
    server: Server, place: str, part: dict[str, Any], shown: dict[str, Any]
) -> None:
    """A 400 there would end the session, as the same part comes with every later turn."""

    def turns(part: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        parts = {"user": "What?", "assistant": "That.", "tool": "It.", place: [part]}
        asked = [{"role": "user", "content": parts["user"]}, {"role": "assistant", "tool_calls": [call]}]
        asked += [{"role": "tool", "tool_call_id": "c1", "content": parts["tool"]}]
        if place == "tool's image as a message":
            return [*asked, {"role": "user", "content": [part]}]
        if place == "tool":
            return asked
        return [*asked, {"role": "assistant", "content": parts["assistant"]}, {"role": "user", "content": "Hello"}]

    assert server.chat(messages=turns(part), max_tokens=1).status_code == 200
    told, expected = (server.client.post("/tokenize", json={"messages": turns(p)}).json() for p in (part, shown))
    assert told == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (3, "3"),
        ({"temp": 3}, '{"temp": 3}'),
        (["a", "b"], "a\nb"),
        ([{"temp": 3}, None], '{"temp": 3}\nnull'),
        ([{"type": "text", "text": None}], ""),
    ],
    ids=str,
)
def test_what_a_tool_gave_is_never_wrong(server: Server, result: Any, shown: str) -> None:
    def told(result: Any) -> dict[str, Any]:
        call = {"id": 1, "type": "", "function": {"name": "look", "arguments": [1]}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": 1, "content": result}]
        found = server.client.post("/tokenize", json={"messages": messages})
        assert found.status_code == 200
        answer: dict[str, Any] = found.json()
        return answer

    assert told(result) == told(shown)


@pytest.mark.parametrize(
    "answer",
    [
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "x"},
            ]
        },
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "x"}]},
        {"content": [{"type": "reasoning", "text": "Hm."}, "x"]},
        {"content": "x", "reasoning": [{"type": "reasoning.text", "text": "Hm."}]},
        {"content": "x", "reasoning_content": {"text": "Hm."}},
    ],
    ids=str,
)
def test_the_thinking_of_an_old_answer_is_thinking_whatever_its_form(answer: dict[str, Any]) -> None:
    read = as_chat([ChatInputMessage.model_validate({"role": "assistant", **answer})])
    (found,) = normalize_messages(read)
    assert (found["content"], found["reasoning_content"]) == ("x", "Hm.")


def test_a_file_of_text_is_text_in_the_newest_message_too(server: Server) -> None:
    hello = {"type": "file", "file": {"file_data": "SGVsbG8="}}
    assert message(server.chat(messages=[{"role": "user", "content": [hello]}]))["content"] == (
        "Hello! How can I help you?"
    )


@pytest.mark.slow
def test_tools_that_run_elsewhere_are_left_out_with_one_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    others = [{"type": "web_search"}, {"type": "custom", "custom": {"name": "sh"}}, {"type": "mcp", "server_url": "x"}]
    with serve() as server, caplog.at_level(logging.WARNING, "stepgguf.server"):
        for _ in range(2):
            found = server.chat("What is the weather in Paris?", tools=[*others, WEATHER])
            assert message(found)["tool_calls"][0]["function"]["name"] == "get_weather"
        forced = server.chat(
            "Hello", tools=others, tool_choice={"type": "function", "function": {"name": "web_search"}}
        )
    assert [m for m in caplog.messages if "type of tool" in m] == [
        f"ignored a type of tool that is not known here (said once): {kind!r}"
        for kind in ("web_search", "custom", "mcp")
    ]
    assert forced.status_code == 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "result"),
    [
        (
            {"tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]},
            {"role": "tool", "tool_call_id": "c1"},
        ),
        (
            {"function_call": {"name": "sh", "arguments": '{"input": "ls"}'}, "content": None},
            {"role": "function", "name": "sh"},
        ),
    ],
    ids=["custom", "before there were tools"],
)
def test_a_call_of_another_form_in_an_old_turn_is_kept(
    server: Server, call: dict[str, Any], result: dict[str, Any]
) -> None:
    asked = [{"role": "user", "content": "List."}, {"role": "assistant", **call}, {**result, "content": "a.txt"}]
    asked += [{"role": "user", "content": "Hello"}]
    assert server.chat(messages=asked, max_tokens=1).status_code == 200
    tokens = server.client.post("/tokenize", json={"messages": asked}).json()["tokens"]
    shown = server.client.post("/detokenize", json={"tokens": tokens}).json()["text"]
    assert "<function=sh>\n<parameter=input>\nls\n" in shown
    assert "<tool_response>" in shown


def test_only_allowed_tools_are_offered(server: Server) -> None:
    other = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "add"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    found = server.chat("What is the weather in Paris?", tools=[WEATHER, other], tool_choice=choice)
    assert message(found)["tool_calls"][0]["function"]["name"] == "add"


def test_what_openais_library_calls_extra_body_may_come_as_it_is(server: Server) -> None:
    extra = {"thinking": {"type": "disabled"}, "temperature": 2}
    assert message(server.chat("Hello", max_tokens=4, extra_body=extra))["reasoning"] is None
    assert server.chat("Hello", extra_body={"temprature": 1}).json()["error"]["param"] == "temprature"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort", "did you mean effort?"),
        ({"temperature": "warm"}, "temperature", "expected a valid number"),
        ({"temperature": 3}, "temperature", "expected less than or equal to 2"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "found 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "reads text only",
        ),
        ({"functions": []}, "functions", "use tools"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"max_tokens": 0}, "max_tokens", "expected greater than or equal to 1 or -1, found 0"),
        ({"reasoning_effort": "hihg"}, "reasoning_effort", "one of none, minimal, low"),
        ({"tools": [{"function": {"name": "a", "paramaters": {}}}]}, "tools[0].function.paramaters", "mean parameters"),
        ({"guided_regex": "a*"}, "guided_regex", "pattern"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"n": 100}, "n", "at most 8"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"tool_choice": "required"}, "tool_choice", "must be called"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "get_weather"),
        ({"guided_json": {"type": "strung"}}, "response_format", "strung"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "expected token ids"),
        ({"reasoning_format": "none"}, "reasoning_format", "expected"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    server: Server, fields: dict[str, Any], param: str, text: str
) -> None:
    for stream in (False, True):  # also a stream is refused by its status
        response = server.chat(**{"stream": stream, **fields})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert text in error["message"]
        assert error["type"] == "invalid_request_error"
        assert error["object"] == "error"
        assert error["request_id"] == response.headers["x-request-id"]


def test_no_limit_is_minus_one(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.chat(**{name: -1}).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 21


def test_null_is_absence_at_every_depth(server: Server) -> None:
    """Each body of the table below with null for every field that it could have."""
    null = dict.fromkeys(
        ("functions", "function_call", "audio", "temprature", "n_predict", "stream_options", "thinking")
    )
    message = {
        "role": "user",
        "content": "Hello",
        **dict.fromkeys(("name", "tool_calls", "audio", "reasoning_details")),
    }
    function = {"name": "get_weather", **dict.fromkeys(("description", "parameters", "strict", "paramaters"))}
    fields = {
        "messages": [message],
        "tools": [{"type": None, "function": function, "functions": None}],
        "response_format": {"type": "text", "json_schema": None},
        "reasoning": {"effort": None, "efort": None},
        "chat_template_kwargs": {"enable_thinking": None, "enable_thinkin": None},
        "nvext": {"guided_jsn": None},
    }
    assert server.chat(**null, **fields).status_code == 200


def test_fields_of_hosted_services_are_accepted(server: Server) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "provider": {"order": []}}
    assert server.chat("Hello", **fields).status_code == 200


@pytest.mark.slow
def test_the_one_model_is_served_under_any_id_which_is_echoed(server: Server) -> None:
    assert server.chat(max_tokens=1).json()["model"] == "demo"
    for id in ("stepfun-ai/Step-3.5-Flash", "Demo.GGUF", "gpt-9", "claude-opus-4-8"):
        assert server.chat(model=id, max_tokens=1).json()["model"] == id
    assert server.chat(model="x" * 5000).status_code == 404


@pytest.mark.slow
def test_a_strict_server_knows_its_ids_whatever_the_capitals(serve: Serve) -> None:
    with serve(strict=True) as server:
        for id in ("stepfun-ai/Step-3.5-Flash", "demo", "demo.gguf", "DEMO.GGUF"):
            assert server.chat(model=id, max_tokens=1).json()["model"] == id
        response = server.chat(model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "demo, step-3.5-flash" in response.json()["error"]["message"]


@pytest.mark.slow
def test_efforts_are_limits_from_the_configuration(serve: Serve) -> None:
    with serve(efforts={**EFFORTS, "low": 8}) as server:
        low, high = (server.chat(LETTERS, reasoning_effort=effort).json() for effort in ("low", "high"))
    tokens = [answer["usage"]["completion_tokens_details"]["reasoning_tokens"] for answer in (low, high)]
    assert tokens[0] <= 8
    assert tokens[1] == 41
    cuts = [answer["usage"]["completion_tokens_details"].get("reasoning_cut") for answer in (low, high)]
    assert cuts == ["budget", None]


@pytest.mark.slow
def test_thinking_that_goes_in_circles_is_ended_and_the_usage_says_so(server: Server) -> None:
    stuck = server.chat(LETTERS, logit_bias={"99": 100}, max_tokens=300).json()
    assert stuck["usage"]["completion_tokens_details"]["reasoning_cut"] == "loop"
    assert stuck["choices"][0]["message"]["content"] is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"1" * 5000: 1}},
        {"json_schema": {"anyOf": [{"type": "string"}], "allOf": [{"$ref": "#/anyOf/" + "1" * 5000}]}},
    ],
)
def test_a_number_too_long_for_python_is_a_wrong_request(server: Server, fields: dict[str, Any]) -> None:
    assert server.chat(**fields).status_code == 400
