"""ChatNVIDIA of langchain-nvidia-ai-endpoints. It parses a stream line by line, adds usages up, and asks three times
for structured output if it is not understood."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_nvidia_ai_endpoints import ChatNVIDIA

from tests.clients.conftest import COUNTED, FORECAST, LETTERS, THINKING, WEATHER, Count, get_weather, n_answers
from tests.server.conftest import MODEL_ID, Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(server: Server) -> ChatNVIDIA:
    return ChatNVIDIA(base_url=f"{server.url}/v1", model="step-3.5-flash", api_key="none", temperature=0)


def streamed(llm: Any, asked: Any) -> Any:
    return reduce(add, llm.stream(asked))


def test_a_stream_has_thinking_text_one_usage_and_one_reason(llm: ChatNVIDIA) -> None:
    chunks: list[AIMessageChunk] = list(llm.stream(LETTERS))
    assert len(chunks) > 10
    whole: Any = reduce(add, chunks)
    assert whole.additional_kwargs["reasoning_content"] == THINKING
    assert whole.content == COUNTED
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata == llm.invoke(LETTERS).usage_metadata


def test_a_whole_answer_has_its_thinking(llm: ChatNVIDIA) -> None:
    answer: Any = llm.invoke(LETTERS)
    assert (answer.additional_kwargs["reasoning_content"], answer.content) == (THINKING, COUNTED)


def test_an_empty_message_is_answered(llm: ChatNVIDIA) -> None:
    assert llm.invoke("").content == "Please ask me something."


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_used(llm: ChatNVIDIA, stream: bool) -> None:
    """The thinking goes back under both of its names."""
    armed = llm.bind_tools([get_weather])
    turns: list[Any] = [HumanMessage(WEATHER)]
    first = streamed(armed, turns) if stream else armed.invoke(turns)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    turns += [first, ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])]
    second = streamed(armed, turns) if stream else armed.invoke(turns)
    assert second.content == FORECAST


# It knows the models of NVIDIA's catalogue that can, and warns of every other.
@pytest.mark.filterwarnings("ignore:Model 'step-3.5-flash' is not known to support structured output:UserWarning")
def test_structured_output_is_understood_at_the_first_of_its_three_ways_to_ask(server: Server, llm: ChatNVIDIA) -> None:
    before = n_answers(server)
    assert llm.with_structured_output(Count).invoke(LETTERS).count == 3  # type: ignore[union-attr]
    assert n_answers(server) == before + 1


def test_without_a_model_it_takes_the_first(server: Server) -> None:
    with pytest.warns(UserWarning, match=f"Default model is set as: {MODEL_ID}"):
        llm = ChatNVIDIA(base_url=f"{server.url}/v1", api_key="none", temperature=0)
    assert llm.invoke(LETTERS).content == COUNTED


def test_an_error_says_what_is_wrong(server: Server) -> None:
    hot = ChatNVIDIA(base_url=f"{server.url}/v1", model="step-3.5-flash", api_key="none", model_kwargs={"top_k": -9})
    with pytest.raises(Exception, match=r"\[400\][\s\S]*top_k"):
        hot.invoke(LETTERS)


def test_an_engine_that_dies_in_a_stream_is_not_a_short_answer(dying: Server) -> None:
    llm = ChatNVIDIA(base_url=f"{dying.url}/v1", model="step-3.5-flash", api_key="none")
    with pytest.raises(Exception, match="it broke"):
        list(llm.stream(LETTERS))
