"""What StepFun, NVIDIA and OpenRouter show their users to do with openai-python. Their scripts read without asking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import COUNTED, LETTERS, THINKING, user
from tests.server.conftest import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def stream(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=[user(LETTERS)], stream=True, **{"temperature": 0, **fields}
    )


def test_stepfuns_script_has_a_choice_in_every_chunk_and_either_thinking_or_text_in_it(client: openai.OpenAI) -> None:
    thinking = answer = ""
    for chunk in stream(client, "step-3.5-flash"):
        delta = chunk.choices[0].delta
        if hasattr(delta, "reasoning") and delta.reasoning:
            thinking += delta.reasoning
        elif delta.content:
            answer += delta.content
    assert (thinking, answer) == (THINKING, COUNTED)


def test_stepfuns_second_snippet_reads_the_thinking_of_every_delta_unasked(client: openai.OpenAI) -> None:
    said = ""
    for chunk in stream(client, "step-3.5-flash"):
        if chunk.choices[0].delta.reasoning:
            said += chunk.choices[0].delta.reasoning
        if chunk.choices[0].delta.content:
            said += chunk.choices[0].delta.content
    assert said == THINKING + COUNTED


@pytest.mark.parametrize("fields", [{}, {"extra_body": {"include_reasoning": False}}], ids=["shown", "hidden"])
def test_stepfuns_third_snippet_reads_the_thinking_of_a_message_unasked(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    completion: Any = client.chat.completions.create(
        model="step-3.5-flash", messages=[user(LETTERS)], temperature=0, **fields
    )
    assert completion.choices[0].message.reasoning == (None if fields else THINKING)
    assert completion.choices[0].message.content == COUNTED


def test_nvidias_script_reads_reasoning_content(client: openai.OpenAI) -> None:
    """Its max_tokens is more than this context holds. The seed makes the outcome certain."""
    thinking = answer = ""
    settings = {"temperature": 1, "top_p": 0.9, "max_tokens": 16384, "seed": 1}
    for chunk in stream(client, "stepfun-ai/step-3.5-flash", **settings):
        if not getattr(chunk, "choices", None):
            continue
        thinking += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        answer += chunk.choices[0].delta.content or ""
    assert thinking.startswith("Looking for r.")
    assert answer.startswith("There ")


def test_openrouters_fields_and_headers_are_understood(client: openai.OpenAI) -> None:
    completion: Any = client.chat.completions.create(
        model="stepfun/step-3.5-flash",
        messages=[user(LETTERS)],
        temperature=0,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={"5": -1},
        extra_headers={"HTTP-Referer": "http://localhost", "X-Title": "a title"},
        extra_body={
            "reasoning": {"effort": "high"},
            "include_reasoning": True,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.0,
        },
    )
    message = completion.choices[0].message
    assert completion.model == "stepfun/step-3.5-flash"
    assert message.content == COUNTED
    assert message.reasoning == THINKING
    assert "".join(detail["text"] for detail in message.reasoning_details) == THINKING


def test_openrouters_reasoning_map_limits_and_hides_the_thinking(client: openai.OpenAI) -> None:
    *_, last = stream(
        client,
        "step-3.5-flash",
        stream_options={"include_usage": True},
        extra_body={"reasoning": {"max_tokens": 8, "exclude": True}},
    )
    assert 0 < last.usage.completion_tokens_details.reasoning_tokens <= 8
    chunks = list(stream(client, "step-3.5-flash", extra_body={"reasoning": {"exclude": True}}))
    assert all(chunk.choices[0].delta.reasoning is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == COUNTED
