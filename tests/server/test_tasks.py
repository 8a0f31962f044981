"""What one message of a user may cost, over the many requests of an agent, in each dialect over HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.messages import normalize_messages
from stepgguf.chat.request import ChatRequest, Tool
from stepgguf.runtime.engine import Sampling, Stream, Timings, Tokens
from stepgguf.server.config import ServerConfig
from stepgguf.server.metrics import Metrics
from stepgguf.server.tasks import TaskLedger, repeated_calls
from tests.scripted_engine import ScriptedEngine
from tests.server.conftest import Server, running

CALL = ["a", "b", "</think>", "<tool_call>", "\n<function=look>\n", "</function>\n", "</tool_call>"]
N_CALL, N_THOUGHT = len(CALL), 2
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass
class Agent:
    """One conversation of an agent that has the tool `look`, in one dialect. It sends everything again each time."""

    server: Server
    system: str = "Be good."
    turns: list[dict[str, Any]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    def user(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def send(self) -> httpx.Response:
        raise NotImplementedError

    def take(self, response: httpx.Response, result: str) -> None:
        """Keep the answer, whose calls had this result."""
        raise NotImplementedError

    def work(self, n: int, result: str = "fog") -> None:
        for _ in range(n):
            response = self.send()
            assert response.status_code == 200, response.text
            self.take(response, result)

    def calls(self, response: httpx.Response) -> bool:
        return '"look"' in response.text

    def error(self, response: httpx.Response) -> str:
        text: str = response.json()["error"]["message"]
        return text


class ChatCompletions(Agent):
    def send(self) -> httpx.Response:
        tools = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
        messages = [{"role": "system", "content": self.system}, *self.turns]
        return self.server.client.post(
            "/v1/chat/completions", json={"messages": messages, "tools": tools, **self.fields}
        )

    def take(self, response: httpx.Response, result: str) -> None:
        message = response.json()["choices"][0]["message"]
        self.turns.append(message)
        self.turns += [{"role": "tool", "tool_call_id": c["id"], "content": result} for c in message["tool_calls"]]


class Responses(Agent):
    def send(self) -> httpx.Response:
        tools = [{"type": "function", "name": "look", "parameters": SCHEMA}]
        body = {"instructions": self.system, "input": self.turns, "tools": tools, **self.fields}
        return self.server.client.post("/v1/responses", json=body)

    def take(self, response: httpx.Response, result: str) -> None:
        output = response.json()["output"]
        ids = [item["call_id"] for item in output if item["type"] == "function_call"]
        self.turns += [*output, *({"type": "function_call_output", "call_id": id, "output": result} for id in ids)]


class Messages(Agent):
    """Claude Code's habits: its header in front of the system prompt changes each time, and a reminder comes with a
    result and is gone from it in the next request."""

    def send(self) -> httpx.Response:
        system = f"x-anthropic-billing-header: {len(self.turns)}\n{self.system}"
        tools = [{"name": "look", "input_schema": SCHEMA}]
        turns = [*self.turns[:-1], self._reminding(self.turns[-1])]
        body = {"system": system, "messages": turns, "tools": tools, "max_tokens": 1000, **self.fields}
        return self.server.client.post("/v1/messages", json=body)

    def take(self, response: httpx.Response, result: str) -> None:
        content = response.json()["content"]
        self.turns.append({"role": "assistant", "content": content})
        ids = [block["id"] for block in content if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": id, "content": result} for id in ids]
        self.turns.append({"role": "user", "content": results})

    def _reminding(self, turn: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        reminder = {"type": "text", "text": "<system-reminder>\nUse the list.\n</system-reminder>"}
        return {**turn, "content": [*parts, reminder]}


DIALECTS = pytest.mark.parametrize("dialect", [ChatCompletions, Responses, Messages])


@contextlib.contextmanager
def serving(*script: Any, **limits: int) -> Iterator[tuple[Server, ScriptedEngine]]:
    engine = ScriptedEngine(*(script or CALL))
    with running(ChatModel(engine), ServerConfig(("demo",), **limits)) as server:
        yield server, engine


def asked(agent: Agent, text: str = "What is outside?") -> Agent:
    agent.user(text)
    return agent


def budgets(engine: ScriptedEngine) -> list[int | None]:
    """How much each request so far may think; 0 if it is over in the prompt."""
    return [request.reasoning.budget if request.reasoning is not None else 0 for request in engine.requests]


@DIALECTS
def test_thinking_is_counted_over_all_requests_of_a_message(dialect: type[Agent]) -> None:
    with serving(task_reasoning=2 * N_THOUGHT) as (server, engine):
        agent = asked(dialect(server))
        agent.work(3)
        assert budgets(engine) == [2 * N_THOUGHT, N_THOUGHT, 0]
        assert [prompt.endswith("</think>\n") for prompt in engine.prompts] == [False, False, True]
        agent.user("And now?")
        agent.work(1)
        assert budgets(engine)[-1] == 2 * N_THOUGHT
        assert 'stepgguf_task_limits_total{limit="reasoning"} 1.0' in server.client.get("/metrics").text


@DIALECTS
def test_when_the_tokens_are_used_up_requests_are_refused_for_good(dialect: type[Agent]) -> None:
    with serving(task_tokens=2 * N_CALL + 1) as (server, engine):
        agent = asked(dialect(server))
        agent.work(2)
        assert [request.max_tokens for request in engine.requests] == [2 * N_CALL + 1, N_CALL + 1]
        assert agent.send().status_code == 200  # one token is left
        response = agent.send()
        assert response.status_code == 400  # which no client sends again
        assert agent.error(response).startswith(f"this task has used up the {2 * N_CALL + 1} tokens")
        agent.user("Go on.")
        assert agent.send().status_code == 200


@DIALECTS
def test_the_same_call_with_the_same_result_is_ended(dialect: type[Agent], caplog: pytest.LogCaptureFixture) -> None:
    with serving(task_repeats=3) as (server, engine):
        agent = asked(dialect(server))
        agent.work(2)
        agent.work(1, "rain")  # something else
        agent.work(2)
        never = (engine.token_id("<tool_call>"), float("-inf"))
        assert all(never not in request.sampling.logit_bias for request in engine.requests)
        agent.work(1)
        engine.say("Fog", "</think>", "It is fog.")
        with caplog.at_level(logging.WARNING):
            response = agent.send()
        assert never in engine.requests[-1].sampling.logit_bias
        assert "It is fog." in response.text
        assert "# Tools" in engine.prompts[-1], "the prompt is another than the cache has"
        assert "had the same results 3 times in a row" in caplog.text
        assert 'stepgguf_task_limits_total{limit="repeats"} 1.0' in server.client.get("/metrics").text


def test_the_embedded_model_cannot_call_what_is_withheld(chat_model: ChatModel) -> None:
    weather = Tool("get_weather", "Get the weather", {"properties": {"city": {"type": "string"}}, "required": ["city"]})
    request = ChatRequest(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        Sampling(temperature=0.0),
        tools=(weather,),
        max_tokens=100,
    )
    prompts, called = [], []
    for withheld in (False, True):
        prepared = chat_model.prepare(replace(request, withhold_calls=withheld))
        events = Stream(chat_model.engine, prepared.request)
        tokens = [step.token_id for event in events if isinstance(event, Tokens) for step in event.steps]
        prompts.append(prepared.request.prompt)
        called.append(chat_model.markers.call in tokens)
    assert called == [True, False]
    assert prompts[0] == prompts[1], "the cache has nothing of it"


def test_a_call_without_the_token_is_text_when_calls_are_withheld() -> None:
    with serving(task_repeats=2) as (server, engine):
        agent = asked(ChatCompletions(server))
        agent.work(2)
        engine.say("</think>", "<function=look>\n", "</function>")
        choice = agent.send().json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert not choice["message"].get("tool_calls")


@DIALECTS
def test_nothing_changes_without_limits(dialect: type[Agent], caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (server, engine), caplog.at_level(logging.INFO):
        agent = asked(dialect(server))
        agent.work(3)
        assert len(set(budgets(engine))) == 1
        assert len({request.max_tokens for request in engine.requests}) == 1
    assert "task" not in caplog.text


def test_the_log_says_what_a_task_has_cost(caplog: pytest.LogCaptureFixture) -> None:
    with serving(task_tokens=1000) as (server, _), caplog.at_level(logging.INFO):
        asked(ChatCompletions(server)).work(3)
    totals = re.findall(r"tokens \(task \w{8}: (\d) requests, (\d+) tokens, (\d+) of thinking\)", caplog.text)
    assert totals == [(str(n), str(n * N_CALL), str(n * N_THOUGHT)) for n in (1, 2, 3)]
    assert "outside" not in caplog.text


def test_conversations_do_not_mix() -> None:
    """Of two that are told the same: by their system prompts, by what they said before, by their names."""
    with serving(task_reasoning=N_THOUGHT) as (server, engine):
        for system in ("You lead.", "You search."):
            asked(Messages(server, system)).work(1)
        for name in ("one", "two"):
            asked(Responses(server, fields={"prompt_cache_key": name})).work(1)
            asked(Messages(server, fields={"metadata": {"user_id": f"session {name}"}})).work(1)
        later = asked(ChatCompletions(server), "Good morning")
        later.turns.append({"role": "assistant", "content": "Good morning"})
        asked(later).work(1)
        assert set(budgets(engine)) == {N_THOUGHT}


def test_the_same_request_again_counts_again() -> None:
    with serving(task_tokens=2 * N_CALL) as (server, _):
        agent = asked(ChatCompletions(server))
        assert [agent.send().status_code for _ in range(3)] == [200, 200, 400]


def test_an_answer_whose_reader_has_left_has_cost_what_was_made() -> None:
    with serving("a", "b", "</think>", *["word "] * 10_000, task_tokens=20) as (server, engine):
        agent = asked(ChatCompletions(server, fields={"stream": True}))
        body = {"messages": [{"role": "system", "content": agent.system}, *agent.turns], "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        assert server.idle_within(10)
        assert engine.requests[0].max_tokens == 20
        assert agent.send().status_code == 400


def test_answers_in_the_background_are_counted() -> None:
    with serving(task_tokens=N_CALL) as (server, _):
        agent = asked(Responses(server, fields={"background": True}))
        assert agent.send().status_code == 200
        assert server.idle_within(10)
        assert agent.send().status_code == 400


def test_claude_codes_go_on_is_not_a_users() -> None:
    with serving("a", "b", "c", "d", task_tokens=4) as (server, _):
        agent = asked(Messages(server))
        assert agent.send().json()["stop_reason"] == "end_turn"
        agent.turns.append({"role": "assistant", "content": "cut"})
        agent.user("Output token limit hit. Resume directly — no apology.")
        assert agent.send().status_code == 400


# the ledger by itself -----------------------------------------------------------------------------------------------


def request_of(text: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], Sampling())


def ledger(**options: Any) -> TaskLedger:
    return TaskLedger(ServerConfig(("demo",), task_reasoning=10), Metrics(ScriptedEngine()), **options)


def left(tasks: TaskLedger, text: str) -> int | None:
    return tasks.admit(request_of(text))[0].reasoning_budget


def spend(tasks: TaskLedger, text: str, n: int) -> None:
    _, task = tasks.admit(request_of(text))
    assert task is not None
    task.count(Timings(n_reasoning=n))


def test_the_ledger_is_bounded_and_keeps_what_was_used_last() -> None:
    tasks = ledger(most=2)
    for text in ("one", "two"):
        spend(tasks, text, 3)
    assert left(tasks, "one") == 7
    assert left(tasks, "three") == 10  # "two" had to go
    assert (left(tasks, "one"), left(tasks, "two")) == (7, 10)


def test_the_ledger_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ledger(seconds=60)
    now = 0.0
    # Not time.monotonic itself: the event loops of servers that run in this process would sleep by this clock.
    monkeypatch.setattr("stepgguf.server.tasks.time", SimpleNamespace(monotonic=lambda: now))
    spend(tasks, "one", 3)
    now = 59.0
    assert left(tasks, "one") == 7
    now = 118.0
    assert left(tasks, "one") == 7
    now = 179.0
    assert left(tasks, "one") == 10


def calling(*arguments: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": a}} for a in arguments]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


USER = {"role": "user", "content": "Look."}
REMINDER = {"role": "user", "content": "<system-reminder>Use the list.</system-reminder>"}
CODEX = "Chunk ID: {}\nWall time: {:.4f} seconds\nProcess exited with code 0\nOutput:\nfog"
ROUND = [calling({"a": 1, "b": 2}), result("fog")]


@pytest.mark.parametrize(
    ("messages", "n"),
    [
        ([USER], 0),
        ([USER, *ROUND], 1),
        ([USER, *ROUND, calling({"b": 2, "a": 1}), result("fog")], 2),
        ([USER, *ROUND, *ROUND, calling({"a": 1}), result("fog")], 1),
        ([USER, *ROUND, *ROUND, calling({"a": 1, "b": 2}), result("rain")], 1),
        ([USER, *ROUND, REMINDER, *ROUND, REMINDER], 2),
        ([USER, *ROUND, USER, *ROUND], 1),
        ([USER, calling({}, {}), result("fog"), result("rain"), *ROUND], 1),
        ([USER, *[calling({}), calling({}), result("fog"), result("rain")] * 3], 3),
        ([USER, *ROUND, {"role": "assistant", "content": "Fog."}], 0),
        # as Codex 0.171 writes results
        (
            [USER, calling({}), result(CODEX.format("dca358", 0)), calling({}), result(CODEX.format("84ffff", 0.0256))],
            2,
        ),
    ],
)
def test_rounds_are_compared_by_calls_and_results(messages: Sequence[dict[str, Any]], n: int) -> None:
    assert repeated_calls(normalize_messages(json.loads(json.dumps(messages)))) == n
