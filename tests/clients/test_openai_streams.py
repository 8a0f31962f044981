"""openai-python: streams, its helpers for them, its asynchronous client, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import COUNTED, LETTERS, THINKING, WEATHER, Count, user
from tests.server.conftest import Server
from tests.server.test_stream import endless

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(content: str = LETTERS) -> Any:
    return {"model": "demo", "messages": [user(content)], "temperature": 0}


def test_usage_comes_last_and_only_if_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked()))
    whole = client.chat.completions.create(**asked())
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])


def test_the_helper_puts_a_stream_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asked()) as stream:
        events = list(stream)
        completion: Any = stream.get_final_completion()
    message = completion.choices[0].message
    assert (message.content, completion.choices[0].finish_reason) == (COUNTED, "stop")
    assert message.reasoning == message.reasoning_content == THINKING
    assert "".join(event.delta for event in events if event.type == "content.delta") == COUNTED
    assert [event.content for event in events if event.type == "content.done"] == [COUNTED]


def test_the_helper_parses_what_has_a_form(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(response_format=Count, **asked()) as stream:
        completion = stream.get_final_completion()
    parsed = completion.choices[0].message.parsed
    assert isinstance(parsed, Count)
    assert parsed.count == 3


class get_weather(BaseModel):  # noqa: N801 (the tool is called so)
    city: str


def test_the_helper_parses_the_arguments_of_a_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(tools=[openai.pydantic_function_tool(get_weather)], **asked(WEATHER)) as stream:
        events = list(stream)
        completion = stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Paris")
    (done,) = (event for event in events if event.type == "tool_calls.function.arguments.done")
    assert (done.name, done.arguments) == ("get_weather", '{"city":"Paris"}')


def test_the_raw_response_has_the_headers_and_the_lines(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**asked())
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().id == f"chatcmpl-{raw.request_id}"
    with client.chat.completions.with_streaming_response.create(stream=True, **asked()) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_more_streams_than_slots_are_all_answered(server: Server) -> None:
    async def answer(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(stream=True, **asked())
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(answer(client) for _ in range(5)))

    assert asyncio.run(answers()) == [COUNTED] * 5


def test_closing_a_stream_frees_its_slot(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="demo", stream=True, **json.loads(endless(server)))
    for _ in range(3):
        next(stream)
    assert server.engine.stats().n_running == 1
    stream.close()
    assert server.idle_within(2)


def test_cancelling_a_task_frees_its_slot(server: Server) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="demo", **json.loads(endless(server)))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(whole, 0.5)

    asyncio.run(leave())
    assert server.idle_within(2)


def test_a_timeout_frees_its_slot(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="demo", timeout=0.5, **json.loads(endless(server)))
    assert server.idle_within(2)


def test_an_engine_that_dies_in_a_stream_is_an_error_to_the_client(dying: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{dying.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="it broke"),
    ):
        list(client.chat.completions.create(stream=True, **asked()))
