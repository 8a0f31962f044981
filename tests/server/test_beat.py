"""One body cannot stop everybody: the event loop has little to do with the worst of each kind."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.server.conftest import Server

pytestmark = pytest.mark.slow

MOST_SECONDS = 0.05  # of processor time that the event loop may spend without a pause
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASK = [{"role": "user", "content": "x"}]
CALL = {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}
BLOCK = {"type": "text", "text": "x"}
WRONG = [{"role": "nobody"}]  # at the end, so that all before it is read and nothing is tokenized
TOOLS = [{"type": "function", "function": {"name": f"f{i % 19_999}"}} for i in range(20_000)]
BODIES: dict[str, tuple[str, Any]] = {
    "no messages": (CHAT, {"messages": [1] * 290_000}),
    "messages": (CHAT, {"messages": ASK * 60_000 + WRONG}),
    "calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL]}] * 20_000 + WRONG}),
    "tools": (CHAT, {"messages": ASK, "tools": TOOLS}),
    "unknown fields": (CHAT, {"messages": ASK, **{f"x{i}": "y" * 10 for i in range(250_000)}}),
    "keys": (CHAT, {"messages": WRONG, "metadata": {f"x{i}": i for i in range(290_000)}}),
    "bias": (CHAT, {"messages": ASK, "logit_bias": {str(i): "x" for i in range(290_000)}}),
    "brackets": (CHAT, {"messages": [[[[[[[]]]]]]] * 280_000}),
    "fewer brackets": (CHAT, {"messages": [[[[[[[]]]]]]] * 40_000}),
    "commas": (CHAT, {"messages": ASK, "stop": [1] * 2_000_000}),
    "one long text": (CHAT, {"messages": [{"role": "user", "content": "A" * 7_900_000}, *WRONG]}),
    "half characters": (CHAT, {"messages": [{"role": "user", "content": "\ud83d" * 1_300_000}, *WRONG]}),
    "not a text": (CHAT, {"messages": [{"role": "user", "content": {"x": "A" * 7_900_000}}]}),
    "ids": ("/v1/completions", {"prompt": [1] * 290_000, "echo": True}),
    "texts": ("/v1/completions", {"prompt": ["a"] * 290_000}),
    "blocks": (MESSAGES, {"max_tokens": 1, "messages": [{"role": "user", "content": [BLOCK] * 60_000}, *WRONG]}),
    "counted": (MESSAGES + "/count_tokens", {"messages": ASK * 60_000 + WRONG}),
    "items": ("/v1/responses", {"input": ASK * 60_000 + WRONG}),
    "no items": ("/v1/responses", {"input": [1] * 290_000}),
    "detokenize": ("/detokenize", {"tokens": [999_999] * 290_000}),
}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of processor time of each callback that an event loop runs."""
    found: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        started = time.thread_time()
        run(handle)
        found.append(time.thread_time() - started)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return found


@pytest.mark.parametrize("name", BODIES)
def test_a_body_stops_nobody(server: Server, pauses: list[float], name: str) -> None:
    path, body = BODIES[name]
    data = json.dumps(body).encode()
    response = server.client.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert max(pauses) < MOST_SECONDS


def test_a_long_list_of_tokens_stops_nobody(server: Server, pauses: list[float]) -> None:
    response = server.client.post("/tokenize", json={"text": "é" * 400_000})
    assert response.status_code == 200
    assert max(pauses) < MOST_SECONDS


def test_half_a_character_becomes_a_replacement(server: Server) -> None:
    body = rb'{"text": "a \ud83d b \\ud83d c \ud83d\ude00 d \ude00\ud83d \u00e9"}'
    response = server.client.post("/tokenize", content=body, headers={"content-type": "application/json"})
    text = server.client.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["text"]
    assert text.endswith("a \ufffd b \\ud83d c \U0001f600 d \ufffd\ufffd \u00e9")
