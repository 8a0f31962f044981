"""What holds for every dialect: errors have its form wherever they come from, its stream and its whole answer agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import ContextLengthExceeded, EngineBusy, EngineDied, StepggufError
from stepgguf.runtime.engine import Request
from stepgguf.server.app import DIALECTS
from stepgguf.server.config import ServerConfig
from tests.scripted_engine import Pause, Script, ScriptedEngine
from tests.server.conftest import Server, running

pytestmark = pytest.mark.slow

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "Hello"}]
# The body of a request, the text of a whole answer, and what an event adds to that text.
CASES: dict[str, tuple[Json, Callable[[Json], str], Callable[[Json], str]]] = {
    "/v1/chat/completions": (
        {"messages": MESSAGES},
        lambda whole: whole["choices"][0]["message"]["content"],
        lambda event: event["choices"][0]["delta"]["content"] or "",
    ),
    "/v1/completions": (
        {"prompt": "Hello"},
        lambda whole: whole["choices"][0]["text"],
        lambda event: event["choices"][0]["text"],
    ),
    "/v1/messages": (
        {"messages": MESSAGES, "max_tokens": 99},
        lambda whole: "".join(block["text"] for block in whole["content"]),
        lambda event: event["delta"]["text"] if event["type"] == "content_block_delta" else "",
    ),
    "/v1/responses": (
        {"input": "Hello", "include_reasoning": False},
        lambda whole: whole["output"][-1]["content"][0]["text"],
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
    ),
}


@pytest.fixture(scope="module")
def scripted() -> Iterator[Server]:
    engine = ScriptedEngine("Hm", "</think>", "On", Pause(0.02), "e, ", Pause(0.02), "two.")
    with running(ChatModel(engine), ServerConfig(model_ids=("demo",), api_key="secret")) as server:
        server.client.headers["x-api-key"] = "secret"
        yield server


def test_each_has_a_case_here() -> None:
    assert {dialect.router.prefix for dialect in DIALECTS} == set(CASES)


@pytest.mark.parametrize("path", CASES)
def test_the_text_of_a_whole_answer_is_that_of_its_stream(scripted: Server, path: str) -> None:
    body, text_of, text_in = CASES[path]
    whole = text_of(scripted.client.post(path, json=body).json())
    stream = scripted.client.post(path, json={**body, "stream": True}).text
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    added = [text for text in (text_in(json.loads(event)) for event in events) if text]
    assert "".join(added) == whole
    assert whole.endswith("One, two.")
    assert len(added) > 1, "it came in parts"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.router.prefix)
def test_errors_have_its_form_wherever_they_come_from(scripted: Server, dialect: Any) -> None:
    prefix = dialect.router.prefix
    answers = [
        scripted.client.post(prefix, json={}),
        scripted.client.post(prefix, content=b"{"),
        scripted.client.post(prefix, json={}, headers={"x-api-key": "wrong"}),
        scripted.client.post(prefix, json={}, headers={"host": "elsewhere.example"}),
        scripted.client.put(prefix),
        scripted.client.post(f"{prefix}/nothing/here"),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 401, 403, 405, 404]
    for answer in answers:
        assert answer.json().keys() == dialect.error_form.schema.__annotations__.keys()


def refuse(error: StepggufError) -> Callable[[Request], Script]:
    def submit(request: Request) -> Script:
        raise error

    return submit


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.router.prefix)
def test_every_status_that_it_answers_with_is_documented(dialect: Any) -> None:
    prefix = dialect.router.prefix
    body = CASES[prefix][0]
    busy, dead = EngineBusy("the queue is full", retry_after=2), EngineDied("it broke", recovered=True)
    long = ContextLengthExceeded(9000, 4096)
    engine = ScriptedEngine("Yes.")
    with running(ChatModel(engine), ServerConfig(model_ids=("demo",), strict=True)) as server:
        found = [server.client.post(prefix, json=body), server.client.post(prefix, json={**body, "model": "other"})]
        for error in (busy, dead, long):
            engine.say(refuse(error))
            found.append(server.client.post(prefix, json=body))
        documented = server.client.get("/openapi.json").json()["paths"][prefix]["post"]["responses"]
    statuses = [answer.status_code for answer in found]
    assert statuses == [200, 404, 429, 503, 400]
    assert {str(status) for status in statuses} <= documented.keys()
