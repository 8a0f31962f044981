"""OpenAI's Responses dialect: its events, and OpenAI's own client against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent, ResponseTextConfigParam
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.shared_params import Reasoning as ReasoningParam
from pydantic import BaseModel, TypeAdapter

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.request import ChatRequest
from stepgguf.server.body.objects import CheckedObject
from stepgguf.server.body.reasoning import ReasoningMap
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.responses.request import ResponsesBody, ResponsesPrompt, TextOptions
from stepgguf.server.dialects.responses.store import AnswerStore
from stepgguf.server.dialects.responses.tools import Offers, ResponsesFunctionTool
from stepgguf.server.dialects.responses.writer import ResponseWriter
from stepgguf.server.dialects.sealed_reasoning import seal
from stepgguf.server.generation import AnswerPart
from stepgguf.server.metrics import Metrics
from stepgguf.server.problem import Problem
from stepgguf.server.service import Service
from stepgguf.server.tasks import TaskLedger
from tests.server.conftest import Serve, Server
from tests.server.dialects.answers import CALL, answer, streamed
from tests.server.test_beat import MOST_SECONDS
from tests.server.test_beat import pauses as pauses

QUESTION = "How many 'r's are in the word strawberry?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
COLD: dict[str, Any] = {"model": "demo", "temperature": 0}
OFFERS = Offers([ResponsesFunctionTool.model_validate(WEATHER)])
ECHO = b'{"parallel_tool_calls": true, "tool_choice": "auto", "tools": []}'


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def written(pieces: list[str], *, sealed: bool = False, **how: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    deltas, reply = answer(pieces, **how)
    writer = ResponseWriter("abc", "demo", 1763600000, ECHO, OFFERS.by_name, sealed=sealed)
    events = streamed(writer, deltas, reply)
    assert events == list(writer.events()), "read as it comes or afterwards, the stream is the same"
    assert all(event.name == event.data["type"] for event in events)
    return [dict(event.data) for event in events], writer.response


# the writer -------------------------------------------------------------------------------------------------------


def test_reasoning_text_and_a_call_are_items_one_after_the_other() -> None:
    events, response = written(["Hm", ".", "</think>", "Let me ", "look.", *CALL, "</tool_call>"], n_cached=4)
    assert [(event["type"].removeprefix("response."), event.get("output_index")) for event in events] == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("completed", None),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["response"]["output"] == []
    reasoning = {"type": "reasoning_text", "text": "Hm."}
    text = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}
    output = [
        {"id": "rs_abc_0", "type": "reasoning", "status": "completed", "summary": [], "content": [reasoning]},
        {"id": "msg_abc_1", "type": "message", "status": "completed", "role": "assistant", "content": [text]},
        {
            "id": "fc_abc_2",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_abc_2",
            "name": "get_weather",
            "arguments": '{"city":"Paris"}',
        },
    ]
    assert response["output"] == events[-1]["response"]["output"] == output
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == output
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 22,
    }


def test_every_event_is_one_that_the_client_library_knows() -> None:
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events, response = written(["Hm", "</think>", "Look.", *CALL, "</tool_call>", *CALL, "</tool_call>", "So."])
    for event in events:
        assert known.validate_python(event).type == event["type"]
    Response.model_validate(response)


def test_an_answer_that_was_cut_is_incomplete_and_says_why() -> None:
    events, response = written(["</think>", "one, ", "two"], reason="length")
    assert events[-1]["type"] == "response.incomplete"
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_an_answer_that_failed_ends_with_what_there_was() -> None:
    deltas, _ = answer(["Hm", "</think>", "one, "])
    writer = ResponseWriter("abc", "demo", 1763600000, ECHO, {})
    writer.feed(AnswerPart(0, deltas, None))
    (*_, last_event) = writer.fail(Problem(500, "it died", "server_error", "x"))
    last = last_event.data
    assert last["type"] == "response.failed"
    response = last["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "it died"})
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]
    TypeAdapter(ResponseStreamEvent).validate_python(last)


def test_reasoning_is_also_sealed_if_the_client_asks_for_it() -> None:
    assert written(["Hm", "</think>"], sealed=True)[1]["output"][0]["encrypted_content"] == seal("Hm")


# the request ------------------------------------------------------------------------------------------------------


def test_fields_become_those_of_the_request(chat_model: ChatModel) -> None:
    config = ServerConfig(("demo",))
    metrics = Metrics(chat_model.engine)
    service = Service(chat_model, config, metrics, 0, TaskLedger(config, metrics))

    def request_of(**fields: Any) -> ChatRequest:
        return (
            ResponsesBody.model_validate({"input": "Hello", **fields})
            .chat_request(service, AnswerStore(config))
            .request
        )

    plain = request_of()
    assert (plain.parallel_tool_calls, plain.reasoning_budget, plain.max_tokens) == (True, None, None)
    told = request_of(instructions="Be brief.", parallel_tool_calls=False, reasoning={"effort": "low"}, temperature=0.5)
    assert told.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (told.parallel_tool_calls, told.reasoning_budget, told.sampling.temperature) == (False, 2048, 0.5)


# a real server and OpenAI's client --------------------------------------------------------------------------------


def test_an_answer_is_reasoning_and_a_message(client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, **COLD)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text  # type: ignore[union-attr,index]
    assert response.output_text == "There are 3 'r's."
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response._request_id in response.id  # type: ignore[operator]


@pytest.mark.slow
def test_the_stream_says_the_same_as_the_whole_response(client: openai.OpenAI) -> None:
    with client.responses.stream(input=QUESTION, **COLD) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    whole = client.responses.create(input=QUESTION, **COLD)
    assert text == streamed.output_text == whole.output_text == "There are 3 'r's."
    assert streamed.output[0].content[0].text == whole.output[0].content[0].text  # type: ignore[union-attr,index]
    assert streamed.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI, streamed: bool, sealed: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {"tools": [WEATHER], **COLD}
    if sealed:
        asked |= {"include": ["reasoning.encrypted_content"], "store": False}

    def ask() -> Any:
        if not streamed:
            return client.responses.create(input=items, **asked)
        with client.responses.stream(input=items, **asked) as stream:
            return stream.get_final_response()

    first = ask()
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    for item in first.output:
        data = item.to_dict()
        if sealed and item.type == "reasoning":
            data.pop("content")  # as clients do that keep only what is sealed
        data.pop("parsed_arguments", None)
        items.append(data)
    output = json.dumps({"temp_c": 21, "sky": "sunny"})
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    second = ask()
    assert second.output_text == "It is 21 degrees and sunny in Paris."
    # the reasoning came back: all but the last tokens of the first exchange are found in the cache
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens


def test_a_tool_can_be_forced_and_forbidden(client: openai.OpenAI) -> None:
    forced = client.responses.create(
        input="Hello", tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, **COLD
    )
    assert forced.output[-1].type == "function_call"
    assert forced.tool_choice.name == "get_weather"  # type: ignore[union-attr]
    asked: dict[str, Any] = {"input": "What is the weather in Paris?", "tools": [WEATHER], **COLD}
    forbidden = client.responses.create(tool_choice="none", **asked)
    assert "function_call" not in [item.type for item in forbidden.output]


class Count(BaseModel):
    n: int


@pytest.mark.slow
def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    response = client.responses.parse(input=QUESTION, text_format=Count, **COLD)
    assert isinstance(response.output_parsed, Count)
    assert response.text.format.type == "json_schema"  # type: ignore[union-attr]
    some: Any = {"format": {"type": "json_object"}}
    free = client.responses.create(input=QUESTION, text=some, max_output_tokens=60, **COLD)
    assert free.output_text.startswith("{")


@pytest.mark.parametrize(
    "said",
    [{"reasoning": {"effort": "none"}}, {"enable_thinking": False}, {"chat_template_kwargs": {"thinking": False}}],
)
def test_no_thinking_is_no_reasoning(client: openai.OpenAI, said: dict[str, Any]) -> None:
    plain = client.responses.create(input=QUESTION, extra_body=said, **COLD)
    assert [item.type for item in plain.output] == ["message"]
    assert plain.usage is not None
    assert plain.usage.output_tokens_details.reasoning_tokens == 0


def test_reasoning_can_be_hidden(client: openai.OpenAI) -> None:
    hidden = client.responses.create(input=QUESTION, extra_body={"include_reasoning": False}, **COLD)
    assert [item.type for item in hidden.output] == ["message"]
    assert hidden.usage is not None
    assert hidden.usage.output_tokens_details.reasoning_tokens > 0


def test_max_output_tokens_cuts_and_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, max_output_tokens=2, **COLD)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]
    assert response.usage.output_tokens == 2  # type: ignore[union-attr]


def test_the_bytes_of_a_stream_are_named_events_with_one_line_of_data(server: Server) -> None:
    body = {"input": QUESTION, "temperature": 0, "stream": True}
    records = server.client.post("/v1/responses", json=body).text.split("\n\n")
    assert records.pop() == ""
    for number, record in enumerate(records):
        event, data = record.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert (event, number) == (f"event: {value['type']}", value["sequence_number"])


def test_a_comment_counts_the_tokens_where_that_is_asked_for(server: Server) -> None:
    body = {"input": QUESTION, "temperature": 0, "stream": True}
    text = server.client.post("/v1/responses?count_tokens=true", json=body).text
    counts = [int(n) for n in re.findall(r"^: (\d+) tokens$", text, re.MULTILINE)]
    completed = json.loads(text.rpartition("data: ")[2].partition("\n")[0])["response"]
    assert counts == sorted(counts)
    assert counts[-1] == completed["usage"]["output_tokens"]
    attached = server.client.get(f"/v1/responses/{completed['id']}?stream=true&count_tokens=true").text
    assert attached.endswith(f"\n\n: {counts[-1]} tokens\n\n")


@pytest.mark.slow
def test_a_stream_that_has_nothing_to_say_sends_comments(serve: Serve) -> None:
    with serve(keep_alive_seconds=0.001) as server:
        text = server.client.post("/v1/responses", json={"input": QUESTION, "temperature": 0, "stream": True}).text
        assert ": keep-alive\n\n" in text
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            client.responses.stream(input=QUESTION, **COLD) as stream,
        ):
            assert stream.get_final_response().output_text == "There are 3 'r's."


def test_an_engine_that_dies_in_a_stream_fails_the_response(dying: Server) -> None:
    with openai.OpenAI(base_url=f"{dying.url}/v1", api_key="none", max_retries=0) as client:
        *_, last = client.responses.create(input=QUESTION, stream=True, **COLD)
        assert last.type == "response.failed"
        assert last.response.error.message.startswith("it broke")  # type: ignore[union-attr]
        with pytest.raises(openai.InternalServerError, match="it broke"):
            client.responses.create(input=QUESTION, **COLD)


MANY = {f"x{i}": i for i in range(290_000)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"metadata": MANY}, {"tools": [{"type": "web_search", "filters": MANY}]}], ids=["metadata", "tool"]
)
def test_what_a_response_repeats_stops_nobody(server: Server, pauses: list[float], fields: dict[str, Any]) -> None:
    answered = server.client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 1, **fields})
    assert answered.status_code == 200
    assert len(answered.content) < 5000
    assert max(pauses) < MOST_SECONDS


# refusals ---------------------------------------------------------------------------------------------------------

IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": IMAGE}, "input[0].content[0]", "the model reads text only, it cannot take input_image"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "shell_call"}]}, "input", "nothing that can be shown"),
        ({"input": ["Hello"]}, "input[0]", "expected"),
        ({"input": None}, "input", "input is missing"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "is missing"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as `input`"),
        ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "send the text as `instructions`"),
        ({"background": True, "store": False}, "background", "needs store: true"),
        ({"include": ["message.output_text.logprobs"]}, "include", "/v1/chat/completions"),
        ({"top_logprobs": 3}, "top_logprobs", "/v1/chat/completions"),
        ({"max_tokens": 5}, "max_tokens", "here it is max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_and_named(
    server: Server, fields: dict[str, Any], param: str, said: str
) -> None:
    response = server.client.post("/v1/responses", json={"input": "Hello", **fields})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("documented", "body"),
    [
        (ResponseCreateParamsBase, ResponsesBody),
        (InputTokenCountParams, ResponsesPrompt),
        (ReasoningParam, ReasoningMap),
        (ResponseTextConfigParam, TextOptions),
    ],
)
def test_every_field_that_openai_documents_is_known(documented: type, body: type[CheckedObject]) -> None:
    assert set(documented.__annotations__) <= set(body.model_fields)


def test_what_means_nothing_here_is_accepted(server: Server) -> None:
    ignored = {
        "moderation": {"model": "omni-moderation-latest"},
        "prompt_cache_options": {"mode": "explicit"},
        "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": False},
        "metadata": {"a": "b"},
        "user": "u",
        "truncation": "auto",
        "previous_response_id": None,
        "background": False,
        "top_logprobs": 0,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "none", "summary": "auto"},
    }
    answered = server.client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 2, **ignored})
    assert answered.status_code == 200
    assert answered.json()["metadata"] == {"a": "b"}
