"""openai-python: whole answers, tools, forms, limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import COUNTED, FORECAST, LETTERS, RESULT, THINKING, TOOL, WEATHER, Count, user
from tests.server.conftest import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, **fields)


def choice(client: openai.OpenAI, content: str = LETTERS, **fields: Any) -> Any:
    (only,) = chat(client, user(content), **fields).choices
    return only


def test_an_answer_counts_its_tokens_and_carries_the_id_of_its_request(client: openai.OpenAI) -> None:
    completion = chat(client, user(LETTERS))
    assert completion.choices[0].message.content == COUNTED
    assert completion.choices[0].finish_reason == "stop"
    assert completion.id == f"chatcmpl-{completion._request_id}"
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_conversation_goes_on_and_finds_its_beginning_in_the_cache(client: openai.OpenAI) -> None:
    question = user(LETTERS)
    first = chat(client, question).choices[0].message
    second = chat(client, question, first.model_dump(exclude_none=True), user("What is 347 + 286?"))
    assert second.choices[0].message.content == "347 + 286 = 633"
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_a_tool_is_called_and_its_result_used(client: openai.OpenAI) -> None:
    asked = chat(client, user(WEATHER), tools=[TOOL]).choices[0]
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    told = chat(client, user(WEATHER), asked.message, result, tools=[TOOL]).choices[0]
    assert (told.finish_reason, told.message.content) == ("stop", FORECAST)


def test_a_streamed_call_is_put_together_by_its_index(client: openai.OpenAI) -> None:
    calls: dict[int, dict[str, str]] = {}
    reasons = []
    for chunk in chat(client, user(WEATHER), tools=[TOOL], stream=True):
        reasons += [chunk.choices[0].finish_reason]
        for part in chunk.choices[0].delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            call["arguments"] += part.function.arguments
    (call,) = calls.values()
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city":"Paris"}')
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    message = {
        "role": "assistant",
        "tool_calls": [{"id": call["id"], "type": "function", "function": {k: call[k] for k in ("name", "arguments")}}],
    }
    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    told = chat(client, user(WEATHER), message, result, tools=[TOOL], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == FORECAST


@pytest.mark.parametrize("forced", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_call_can_be_forced(client: openai.OpenAI, forced: Any) -> None:
    answer = choice(client, "Hello", tools=[TOOL], tool_choice=forced)
    assert answer.finish_reason == "tool_calls"
    assert [call.function.name for call in answer.message.tool_calls] == ["get_weather"]


def test_a_call_can_be_forbidden(client: openai.OpenAI) -> None:
    answer = choice(client, WEATHER, tools=[TOOL], tool_choice="none")
    assert answer.message.tool_calls is None
    assert answer.message.content == "I cannot look up the weather without a tool."


def test_an_answer_is_parsed_into_a_model_of_pydantic(client: openai.OpenAI) -> None:
    completion: Any = client.chat.completions.parse(
        model="demo", messages=[user(LETTERS)], temperature=0, response_format=Count
    )
    message = completion.choices[0].message
    assert isinstance(message.parsed, Count)
    assert message.parsed.count == 3
    assert message.reasoning == THINKING


def test_logprobs_are_of_the_tokens_of_the_answer(client: openai.OpenAI) -> None:
    answer = choice(client, logprobs=True, top_logprobs=2)
    tokens = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode().strip() == COUNTED
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens), "the likeliest, at temperature 0"


def test_answers_differ_and_a_seed_makes_them_again(client: openai.OpenAI) -> None:
    hot: Any = {"temperature": 2, "top_p": 1, "extra_body": {"top_k": 2}, "max_completion_tokens": 12}

    def answers() -> list[str]:
        made: Any = client.chat.completions.create(model="demo", messages=[user("Hello")], n=3, seed=1, **hot)
        assert [answer.index for answer in made.choices] == [0, 1, 2]
        return [answer.message.reasoning for answer in made.choices]

    first = answers()
    assert len(set(first)) > 1
    assert answers() == first


def test_a_stop_and_a_limit_end_the_answer(client: openai.OpenAI) -> None:
    stopped, cut = choice(client, stop=[" 'r"]), choice(client, max_completion_tokens=5)
    assert (stopped.finish_reason, stopped.message.content.strip()) == ("stop", "There are 3")
    assert (cut.finish_reason, cut.message.content) == ("length", "")
    assert THINKING.startswith(cut.message.reasoning.strip())


def test_effort_none_is_no_thinking_and_low_is_some(client: openai.OpenAI) -> None:
    assert choice(client, reasoning_effort="none", max_completion_tokens=8).message.reasoning is None
    assert choice(client, reasoning_effort="low").message.reasoning == THINKING
