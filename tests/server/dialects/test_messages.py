"""Anthropic's dialect: its events byte by byte, and Anthropic's own client against a real server."""

from __future__ import annotations

import asyncio
import json
import typing
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.request import ChatRequest, ToolChoice
from stepgguf.runtime.engine import Sampling
from stepgguf.server.body.reasoning import ReasoningMap
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.messages.request import (
    MessagesBody,
    MessagesPrompt,
    MessagesTool,
    MessagesToolChoice,
    OutputConfig,
)
from stepgguf.server.dialects.messages.writer import Display, MessageWriter
from stepgguf.server.dialects.sealed_reasoning import seal
from stepgguf.server.dialects.writer import stream_records
from stepgguf.server.generation import Generation
from stepgguf.server.http.sse import Record
from stepgguf.server.metrics import Metrics
from stepgguf.server.service import Service
from stepgguf.server.tasks import TaskLedger
from tests.server.conftest import Serve, Server
from tests.server.dialects.answers import CALL, answer, streamed

QUESTION: dict[str, Any] = {"role": "user", "content": "How many 'r's are in the word strawberry?"}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ADAPTIVE: Any = {"type": "adaptive"}
OFF: Any = {"type": "disabled"}
COLD: dict[str, Any] = {"model": "demo", "max_tokens": 512, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def written(
    pieces: list[str], display: Display = "shown", *, max_tokens: int | None = None, **how: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    deltas, reply = answer(pieces, **how)
    limit = len(pieces) if max_tokens is None else max_tokens
    events = streamed(MessageWriter("abc", "demo", display, n_prompt=10, max_tokens=limit), deltas, reply)
    whole = MessageWriter("abc", "demo", display, n_prompt=10, max_tokens=limit).whole([deltas], [reply])
    assert all(event.name == event.data["type"] for event in events)
    return [dict(event.data) for event in events], whole


def shape(events: list[dict[str, Any]]) -> list[str]:
    """Each event in a word or two: what it is, which block, what it brings."""
    words = []
    for event in events:
        inner = event.get("delta") or event.get("content_block") or {}
        words.append(
            " ".join(str(x) for x in (event["type"], event.get("index", ""), inner.get("type", "")) if x != "")
        )
    return words


# the writer -------------------------------------------------------------------------------------------------------


def test_thinking_text_and_a_call_are_blocks_one_after_the_other() -> None:
    events, message = written(["Hm", ".", "</think>", "Let me ", "look.", *CALL, "</tool_call>"], n_cached=4)
    assert shape(events) == [
        "message_start",
        "ping",
        "content_block_start 0 thinking",
        "content_block_delta 0 thinking_delta",
        "content_block_delta 0 thinking_delta",
        "content_block_delta 0 signature_delta",
        "content_block_stop 0",
        "content_block_start 1 text",
        "content_block_delta 1 text_delta",
        "content_block_delta 1 text_delta",
        "content_block_stop 1",
        "content_block_start 2 tool_use",
        "content_block_delta 2 input_json_delta",
        "content_block_delta 2 input_json_delta",
        "content_block_delta 2 input_json_delta",
        "content_block_delta 2 input_json_delta",
        "content_block_stop 2",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"] == {
        "id": "msg_abc",
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }
    assert events[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[11]["content_block"] == {"type": "tool_use", "id": "toolu_abc_0", "name": "get_weather", "input": {}}
    assert events[-2] == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 12,
            "output_tokens_details": {"thinking_tokens": 3},
        },
    }
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "toolu_abc_0", "name": "get_weather", "input": {"city": "Paris"}},
    ]
    assert message["stop_reason"] == "tool_use"


def test_every_event_is_one_that_the_client_library_knows() -> None:
    known: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for event in written(["Hm", "</think>", "Look.", *CALL, "</tool_call>", *CALL, "</tool_call>", "So."])[0]:
        if event["type"] != "ping":
            known.validate_python(event)


def test_two_calls_are_two_blocks_with_ids_of_their_own() -> None:
    _, message = written(["</think>", *CALL, "</tool_call>", *CALL, "</tool_call>"])
    assert [block["id"] for block in message["content"]] == ["toolu_abc_0", "toolu_abc_1"]


def test_hidden_thinking_leaves_no_block_and_omitted_thinking_only_a_signature() -> None:
    pieces = ["Hm", ".", "</think>", "Yes."]
    assert written(pieces, "hidden")[1]["content"] == [{"type": "text", "text": "Yes."}]
    events, message = written(pieces, "omitted")
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": seal("Hm.")}
    assert "thinking_delta" not in " ".join(shape(events))


@pytest.mark.parametrize("display", ["shown", "omitted", "hidden"])
def test_a_call_that_was_cut_is_json_that_nobody_closed_and_is_in_no_whole_message(display: Display) -> None:
    """Wherever it was cut. Agents parse what was streamed, and there are such as run a tool with an empty input."""
    known: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    pieces = ["Hm", "</think>", *CALL]
    for n in range(len(pieces)):
        events, message = written(pieces[:n], display, reason="length")
        assert message["stop_reason"] == events[-2]["delta"]["stop_reason"] == "max_tokens"
        assert "tool_use" not in [block["type"] for block in message["content"]]
        Message.model_validate(message, strict=True)
        for event in events[:1] + events[2:]:
            known.validate_python(event)
        streamed = "".join(event.get("delta", {}).get("partial_json", "") for event in events)
        assert '{"city":"Paris"}'.startswith(streamed)
        assert not streamed.endswith("}")
        assert bool(streamed) == ("tool_use" in " ".join(shape(events)))
    assert '{"city":"Paris' in streamed


@pytest.mark.parametrize("pieces", [[], ["Hm"], ["Hm", "</think>"]])
def test_an_answer_of_which_nothing_came_is_an_empty_text(pieces: list[str]) -> None:
    events, message = written(pieces, "hidden", reason="length")
    assert shape(events[2:-2]) == ["content_block_start 0 text", "content_block_stop 0"]
    assert message["content"] == [{"type": "text", "text": ""}]
    Message.model_validate(message, strict=True)


def test_the_reason_to_stop_is_named_in_anthropics_words() -> None:
    def end(*pieces: str, **how: Any) -> tuple[str, str | None]:
        message = written(list(pieces), **how)[1]
        return message["stop_reason"], message["stop_sequence"]

    assert end("</think>", "Yes.") == ("end_turn", None)
    assert end("Hm", reason="length") == ("max_tokens", None)
    assert end("Hm", reason="length", max_tokens=2) == ("model_context_window_exceeded", None)
    assert end("</think>", *CALL[:-1], max_tokens=99) == ("max_tokens", None), "it stopped amid a call"
    assert end("</think>", "one, two", stops=(", ",)) == ("stop_sequence", ", ")
    assert end("</think>", *CALL, "</tool_call>") == ("tool_use", None)


# the request ------------------------------------------------------------------------------------------------------


def messages_of(turns: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    body = MessagesBody.model_validate({"max_tokens": 9, "messages": turns, **fields})
    return normalize_messages(
        [*body.system_messages(), *(message for turn in body.messages for message in turn.messages())]
    )


def test_results_of_tools_come_before_and_after_text_as_they_were_sent() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": "21"},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "no"}], "is_error": True},
        {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
    ]
    assert messages_of([{"role": "user", "content": results}]) == [
        {"role": "tool", "tool_call_id": "a", "content": "21"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no"},
        {"role": "user", "content": "And now?"},
    ]


def test_an_answer_comes_back_with_its_thinking_also_when_that_is_only_in_the_signature() -> None:
    content = [
        {"type": "thinking", "thinking": "", "signature": seal("Hm.")},
        {"type": "redacted_thinking", "data": "of somebody else"},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
    ]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert messages_of([{"role": "assistant", "content": content}]) == [
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": [call]}
    ]


@pytest.mark.parametrize("signature", ["ErUBCkYIBxgCIkD", "stepgguf:%%%", "stepgguf:/w=="])
def test_a_signature_of_somebody_else_is_no_thinking(signature: str) -> None:
    content = [{"type": "thinking", "thinking": "", "signature": signature}]
    assert "reasoning_content" not in messages_of([{"role": "assistant", "content": content}])[0]


def test_the_billing_line_of_claude_code_never_reaches_the_prompt() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    told = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hi"}]
    turns = [{"role": "user", "content": "Hi"}]
    blocks = [{"type": "text", "text": line}, {"type": "text", "text": "You help."}]
    for text in (blocks, blocks[::-1], f"{line}\nYou help.", f"You help.\n\n{line}"):
        assert messages_of(turns, system=text) == told
        assert messages_of([{"role": "system", "content": text}, *turns]) == told
    assert messages_of([*turns, {"role": "system", "content": line}], system=line) == turns


def request_of(chat: ChatModel, **fields: Any) -> ChatRequest:
    body = MessagesBody.model_validate({"max_tokens": 99, "messages": [QUESTION], **fields})
    config, metrics = ServerConfig(("demo",)), Metrics(chat.engine)
    return body.chat_request(Service(chat, config, metrics, 0, TaskLedger(config, metrics)))


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, 49),  # half of max_tokens is the answer's
        ({"max_tokens": 1}, 0),
        ({"max_tokens": 32_000}, 8192),  # as effort medium
        ({"max_tokens": 32_000, "output_config": {"effort": "high"}}, 16_000),
        ({"max_tokens": 32_000, "output_config": {"effort": "low"}}, 2048),
        ({"thinking": ADAPTIVE}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, 7),
        ({"thinking": OFF, "output_config": {"effort": "high"}}, 0),
        ({"thinking": ADAPTIVE, "output_config": {"effort": "low"}}, 2048),
        ({"thinking": ADAPTIVE, "output_config": {"effort": "max"}}, None),
        ({"thinking": False}, 0),
        ({"thinking": "disabled"}, 0),
        ({"thinking": True, "max_tokens": -1}, None),
        ({"max_tokens": -1}, 8192),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"max_tokens": 32_000, "reasoning_effort": "low"}, 2048),
        ({"thinking": ADAPTIVE, "thinking_budget": 5}, 5),
    ],
)
def test_thinking_and_effort_are_a_budget(chat_model: ChatModel, fields: dict[str, Any], budget: int | None) -> None:
    assert request_of(chat_model, **fields).reasoning_budget == budget


def test_parallel_calls_can_be_switched_off(chat_model: ChatModel) -> None:
    assert request_of(chat_model).parallel_tool_calls
    choice = {"type": "any", "disable_parallel_tool_use": True}
    one = request_of(chat_model, tools=[WEATHER], tool_choice=choice)
    assert (one.parallel_tool_calls, one.tool_choice) == (False, ToolChoice("required"))


# a real server and Anthropic's client -----------------------------------------------------------------------------


def test_a_message_without_thinking_asked_for_is_its_text(client: anthropic.Anthropic) -> None:
    message = client.messages.create(messages=[QUESTION], **COLD)  # type: ignore[list-item]
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "There are 3 'r's."  # type: ignore[union-attr]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens_details.thinking_tokens > 0  # type: ignore[union-attr]
    assert message._request_id in message.id  # type: ignore[operator]


def test_thinking_is_streamed_in_a_block_before_the_text(client: anthropic.Anthropic) -> None:
    with client.messages.stream(messages=[QUESTION], thinking=ADAPTIVE, **COLD) as stream:  # type: ignore[list-item]
        events = [event.type for event in stream]
        message = stream.get_final_message()
    thinking, text = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking
    assert thinking.signature
    assert text.type == "text"
    assert text.text == "There are 3 'r's."
    assert {"thinking", "signature", "text", "message_stop"} <= set(events)


def test_the_stream_and_the_whole_message_say_the_same(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"messages": [QUESTION], "thinking": ADAPTIVE, **COLD}
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(**asked)
    assert [b.to_dict() | {"signature": ""} for b in streamed.content] == [
        b.to_dict() | {"signature": ""} for b in whole.content
    ]
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert streamed.stop_reason == whole.stop_reason


def test_thinking_that_was_not_asked_for_leaves_room_for_the_answer(client: anthropic.Anthropic) -> None:
    message = client.messages.create(messages=[QUESTION], **{**COLD, "max_tokens": 24})  # type: ignore[list-item]
    assert message.usage.output_tokens_details.thinking_tokens < 24  # type: ignore[union-attr]
    assert [block.type for block in message.content] == ["text"]


def test_thinking_that_is_bounded_leaves_room_for_the_answer_in_the_context_too(chat_model: ChatModel) -> None:
    prepared = chat_model.prepare(request_of(chat_model, max_tokens=32_000))
    assert prepared.request.reasoning is not None
    room = chat_model.engine.info.n_ctx - len(prepared.request.prompt)
    assert prepared.request.reasoning.budget == room - room // 4 - len(prepared.request.reasoning.closing)


def test_a_stream_without_thinking_asked_for_is_its_text(client: anthropic.Anthropic) -> None:
    with client.messages.stream(messages=[QUESTION], **COLD) as stream:  # type: ignore[list-item]
        assert "".join(stream.text_stream) == "There are 3 'r's."
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["text"]
    assert message.usage.output_tokens_details.thinking_tokens > 0  # type: ignore[union-attr]


def test_disabled_thinking_takes_no_token(client: anthropic.Anthropic) -> None:
    message = client.messages.create(messages=[QUESTION], thinking=OFF, **COLD)  # type: ignore[list-item]
    assert [block.type for block in message.content] == ["text"]
    assert message.usage.output_tokens_details.thinking_tokens == 0  # type: ignore[union-attr]


def test_a_budget_cuts_the_thinking_and_leaves_an_answer(client: anthropic.Anthropic) -> None:
    budget: Any = {"type": "enabled", "budget_tokens": 3}
    message = client.messages.create(messages=[QUESTION], thinking=budget, **COLD)  # type: ignore[list-item]
    free = client.messages.create(messages=[QUESTION], thinking=ADAPTIVE, **COLD)  # type: ignore[list-item]
    assert 0 < len(message.content[0].thinking) < len(free.content[0].thinking)  # type: ignore[union-attr]
    assert message.content[1].type == "text"


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic, streamed: bool) -> None:
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {"tools": [WEATHER], "thinking": ADAPTIVE, **COLD}

    def ask() -> Any:
        if not streamed:
            return client.messages.create(messages=turns, **asked)
        with client.messages.stream(messages=turns, **asked) as stream:
            return stream.get_final_message()

    first = ask()
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert call.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": json.dumps({"temp_c": 21, "sky": "sunny"})}
    turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = ask()
    assert second.content[-1].text == "It is 21 degrees and sunny in Paris."
    assert second.usage.cache_read_input_tokens > 0


@pytest.mark.slow
def test_a_tool_can_be_forced_and_forbidden(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "tools": [WEATHER], **COLD}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        forced = client.messages.create(tool_choice=choice, **asked)
        assert forced.content[-1].type == "tool_use"
    asked["messages"] = [{"role": "user", "content": "What is the weather in Paris?"}]
    forbidden = client.messages.create(tool_choice={"type": "none"}, **asked)
    assert all(block.type == "text" for block in forbidden.content)


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic) -> None:
    message = client.messages.create(messages=[QUESTION], stop_sequences=["'r's"], **COLD)  # type: ignore[list-item]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "'r's")
    assert message.content[0].text == "There are 3 "  # type: ignore[union-attr]


def test_max_tokens_cuts_and_says_so(client: anthropic.Anthropic) -> None:
    message = client.messages.create(messages=[QUESTION], thinking=OFF, **{**COLD, "max_tokens": 2})  # type: ignore[list-item]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 2


def test_an_answer_keeps_to_a_schema(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    message = client.messages.create(messages=[QUESTION], output_config=form, **COLD)  # type: ignore[list-item]
    assert isinstance(json.loads(message.content[0].text)["n"], int)  # type: ignore[union-attr]


def test_the_count_is_that_of_the_message(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"messages": [QUESTION], "system": "Be brief.", "tools": [WEATHER], "thinking": ADAPTIVE}
    count = client.messages.count_tokens(model="demo", **asked).input_tokens
    usage = client.messages.create(**asked, **COLD).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    asked.pop("system")
    assert client.messages.count_tokens(model="demo", **asked).input_tokens < count


def test_the_bytes_of_a_stream_are_named_events_with_one_line_of_data(server: Server) -> None:
    body = {"max_tokens": 99, "messages": [QUESTION], "temperature": 0, "stream": True}
    with server.client.stream("POST", "/v1/messages", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        records = response.read().decode().split("\n\n")
    assert records.pop() == ""
    for record in records:
        event, data = record.split("\n")
        assert event == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert records[1] == 'event: ping\ndata: {"type":"ping"}'
    assert records[-1] == 'event: message_stop\ndata: {"type":"message_stop"}'


@pytest.mark.slow
def test_a_stream_that_has_nothing_to_say_pings(serve: Serve) -> None:
    body = {"max_tokens": 99, "messages": [QUESTION], "temperature": 0, "stream": True}
    with serve(keep_alive_seconds=0.001) as server:
        text = server.client.post("/v1/messages", json=body).text
    assert text.count("event: ping\n") > 1
    assert ": keep-alive" not in text


def test_thinking_that_is_not_sent_leaves_the_time_to_pings(chat_model: ChatModel) -> None:
    async def chunks() -> list[list[Record]]:
        prepared = chat_model.prepare(ChatRequest([QUESTION], Sampling(temperature=0), max_tokens=20))
        generation = await Generation.start(chat_model.engine, [prepared], Metrics(chat_model.engine))
        writer = MessageWriter("abc", "demo", "hidden", n_prompt=generation.n_prompt, max_tokens=20)
        return [list(records) async for records in stream_records(generation, writer)]

    start, *hidden, finish = asyncio.run(chunks())
    assert start
    assert finish
    assert hidden == [[]] * len(hidden), "EventStream sends no chunk for no records"


def test_an_engine_that_dies_in_a_stream_is_an_error_to_the_client(dying: Server) -> None:
    with anthropic.Anthropic(base_url=dying.url, api_key="none", max_retries=0) as client:
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(messages=[QUESTION], **COLD) as stream,  # type: ignore[list-item]
        ):
            stream.until_done()
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")
        assert body["error"]["message"].startswith("it broke")
        assert body["request_id"] == caught.value.request_id
        with pytest.raises(anthropic.InternalServerError, match="it broke"):
            client.messages.create(messages=[QUESTION], **COLD)  # type: ignore[list-item]


# refusals ---------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}]
PREFILL = [*HELLO, {"role": "assistant", "content": "The answer is ("}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": IMAGE}, "Could not process image: the model reads text only, it cannot take image"),
        ({"messages": PREFILL}, "end with a message of role user"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice of type tool has no name"),
        ({"tools": [WEATHER, WEATHER]}, "two functions are called get_weather"),
        ({"max_token": 5}, "did you mean max_tokens?"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": None}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_in_anthropics_form(server: Server, fields: dict[str, Any], said: str) -> None:
    response = server.client.post("/v1/messages", json={"max_tokens": 9, "messages": HELLO, **fields})
    error = response.json()
    assert response.status_code == 400
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert said in error["error"]["message"]
    assert error["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize(
    ("body", "documented", "refused"),
    [
        (MessagesBody, anthropic.types.beta.message_create_params.MessageCreateParamsStreaming, {"thread"}),
        (MessagesPrompt, anthropic.types.beta.message_count_tokens_params.MessageCountTokensParams, set()),
        (MessagesTool, anthropic.types.beta.BetaToolParam, set()),
        (ReasoningMap, anthropic.types.beta.BetaThinkingConfigEnabledParam, set()),
        (ReasoningMap, anthropic.types.beta.BetaThinkingConfigAdaptiveParam, set()),
        (OutputConfig, anthropic.types.beta.BetaOutputConfigParam, set()),
        (MessagesToolChoice, anthropic.types.beta.BetaToolChoiceToolParam, set()),
    ],
)
def test_every_field_that_anthropic_documents_is_known(body: Any, documented: Any, refused: set[str]) -> None:
    known = {field.alias or name for name, field in body.model_fields.items()}
    assert set(typing.get_type_hints(documented)) - known == refused
    assert refused <= set(body.elsewhere)


def test_what_means_nothing_here_is_accepted(server: Server) -> None:
    ignored = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "container": None,
        "context_management": {"edits": []},
        "cache_control": {"type": "ephemeral"},
        "betas": ["interleaved-thinking-2025-05-14"],
        "mcp_servers": [{"type": "url", "name": "docs", "url": "http://127.0.0.1:1/"}],
        "compaction": {"trigger": {"type": "input_tokens", "value": 50000}},
    }
    body = {"max_tokens": 2, "messages": HELLO, "thinking": OFF, **ignored}
    assert server.client.post("/v1/messages", json=body).status_code == 200


def test_a_prompt_that_is_too_long_is_refused_before_the_stream_starts(client: anthropic.Anthropic) -> None:
    turns: list[Any] = [{"role": "user", "content": "long " * 5000}]
    said = r"prompt is too long: \d+ tokens > 4096 maximum\. The model knows no more"
    with pytest.raises(anthropic.BadRequestError, match=said), client.messages.stream(messages=turns, **COLD):
        pass
