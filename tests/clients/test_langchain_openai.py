"""ChatOpenAI of langchain-openai. It does not look at the thinking."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, Literal

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.clients.conftest import COUNTED, FORECAST, LETTERS, WEATHER, Count, get_weather, n_answers
from tests.server.conftest import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", model="step-3.5-flash", api_key=SecretStr("none"), temperature=0, max_retries=0
    )


def streamed(llm: Any, asked: Any, **how: Any) -> Any:
    return reduce(add, llm.stream(asked, **how))


def test_an_answer_counts_its_tokens_whole_and_streamed(llm: ChatOpenAI) -> None:
    whole, stream = llm.invoke(LETTERS), streamed(llm, LETTERS, stream_usage=True)
    assert whole.content == stream.content == COUNTED
    assert stream.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata
    assert whole.usage_metadata["output_token_details"]["reasoning"] > 0
    assert stream.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert streamed(llm, LETTERS).usage_metadata is None, "usage was not asked for"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_used(llm: ChatOpenAI, stream: bool) -> None:
    armed = llm.bind_tools([get_weather])
    turns: list[Any] = [HumanMessage(WEATHER)]
    first = streamed(armed, turns) if stream else armed.invoke(turns)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert first.response_metadata["finish_reason"] == "tool_calls"
    turns += [first, ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])]
    second = streamed(armed, turns) if stream else armed.invoke(turns)
    assert second.content == FORECAST


def test_a_tools_image_does_not_end_the_conversation(llm: ChatOpenAI) -> None:
    armed = llm.bind_tools([get_weather])
    turns: list[Any] = [HumanMessage(WEATHER)]
    (call,) = (first := armed.invoke(turns)).tool_calls
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    result = {"type": "text", "text": get_weather(**call["args"])}
    turns += [first, ToolMessage([result, image], tool_call_id=call["id"])]
    assert armed.invoke(turns).content
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        llm.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_takes_one_answer(
    server: Server, llm: ChatOpenAI, method: Literal["json_schema", "function_calling"]
) -> None:
    before = n_answers(server)
    found = llm.with_structured_output(Count, method=method).invoke(LETTERS)
    assert isinstance(found, Count)
    assert found.count == 3
    assert n_answers(server) == before + 1


def test_a_full_context_is_an_error_of_its_own(server: Server, llm: ChatOpenAI) -> None:
    """Middleware that summarizes a conversation waits for it."""
    responses = llm.model_copy(update={"use_responses_api": True})
    for model in (llm, responses):
        with pytest.raises(ContextOverflowError):
            model.invoke("a " * 5000)
        with pytest.raises(ContextOverflowError):
            streamed(model, "a " * 5000)
