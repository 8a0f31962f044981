"""Streams as a network sees them: pings, clients that leave, clients that do not read."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time

import httpx
import pytest

from stepgguf.chat.exchange import ChatModel, PreparedRequest
from stepgguf.errors import EngineDied, RequestError
from stepgguf.runtime.engine import Request
from stepgguf.server.config import ServerConfig
from stepgguf.server.generation import Generation
from stepgguf.server.metrics import Metrics
from tests.scripted_engine import ScriptedEngine
from tests.server.conftest import Serve, Server, running

ENDS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")


def endless(server: Server, *, never: tuple[str, ...] = (), **fields: object) -> bytes:
    """A request whose answer comes to no end but that of the context."""
    ids = [server.engine.token_id(text) for text in (*ENDS, *never)]
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "reasoning_effort": "none",
        "logit_bias": {str(token): -100 for token in ids if token is not None},
        **fields,
    }
    return json.dumps(body).encode()


def post(server: Server, body: bytes) -> socket.socket:
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    return server.raw(f"{head}Content-Length: {len(body)}\n\n", body)


def read_until(connection: socket.socket, wanted: bytes, n: int = 1) -> bytes:
    data = b""
    while data.count(wanted) < n:
        received = connection.recv(65536)
        assert received, data
        data += received
    return data


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: Server, stream: bool) -> None:
    connection = post(server, endless(server, stream=stream))
    if stream:
        read_until(connection, b"data: ", 3)
    else:
        time.sleep(0.5)
    assert server.engine.stats().n_running == 1
    connection.close()
    assert server.idle_within(2)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_at_once_frees_its_slot(server: Server, stream: bool) -> None:
    """Before a byte of the answer, at whatever point that finds the server."""
    for milliseconds in range(0, 30, 3):
        connection = post(server, endless(server, stream=stream))
        time.sleep(milliseconds / 1000)
        connection.close()
    time.sleep(0.2)
    assert server.idle_within(2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_ends_what_would_go_on(server: Server, stream: bool) -> None:
    fields: dict[str, object] = {"stop": "help", "temperature": 0}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    with post(server, endless(server, stream=stream, **fields)) as connection:
        data = read_until(connection, b'"cached_tokens":', 2)
    assert b'"finish_reason":"stop"' in data
    assert int(re.findall(rb'"completion_tokens":(\d+)', data)[0]) < 500
    assert b"".join(re.findall(rb'"content":"([^"]*)"', data)) == b"Hello! How can I "
    assert server.idle_within(2)


@pytest.mark.slow
def test_pings_come_while_a_request_waits_and_leaving_ends_the_wait(serve: Serve) -> None:
    with serve(keep_alive_seconds=0.2) as server:
        running = [post(server, endless(server, stream=True)) for _ in range(2)]
        for connection in running:
            read_until(connection, b"data: ", 3)
        waiting = post(server, endless(server, stream=True))
        data = read_until(waiting, b": keep-alive\n\n", 3)
        assert data.startswith(b"HTTP/1.1 200")
        assert server.engine.stats().n_queued == 1
        waiting.close()
        deadline = time.monotonic() + 2
        while server.engine.stats().n_queued and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.engine.stats().n_queued == 0
        assert server.engine.stats().n_running == 2
        for connection in running:
            connection.close()
        assert server.idle_within(2)


@pytest.mark.slow
def test_thinking_that_is_not_shown_does_not_silence_the_pings(serve: Serve) -> None:
    with serve(keep_alive_seconds=0.1) as server:
        hidden = {"include_reasoning": False, "reasoning_effort": None, "temperature": 2, "top_k": 0}
        connection = post(server, endless(server, never=("</think>",), stream=True, **hidden))
        assert read_until(connection, b": keep-alive\n\n", 2).count(b'"content"') == 1  # the opener
        connection.close()
        assert server.idle_within(2)


def test_a_full_queue_is_429_with_the_time_to_wait(server: Server) -> None:
    """Two run, four wait: the queue of this server."""
    connections = [post(server, endless(server, stream=True)) for _ in range(6)]
    for connection in connections:
        read_until(connection, b"data: ")
    refused = server.chat(stream=True)
    for connection in connections:
        connection.close()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.idle_within(3)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with (
        serve(slow_client_seconds=0.5) as server,
        socket.socket() as connection,
        caplog.at_level(logging.WARNING),
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = endless(server, stream=True, logprobs=True, top_logprobs=20)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 50
        while "has read nothing" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "has read nothing for 0.5 s" in caplog.text
        assert server.idle_within(2)


def test_a_reader_that_lags_too_far_is_given_up(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded, and the request ends without being read."""
    monkeypatch.setattr("stepgguf.server.generation.MOST_WAITING", 20)
    engine = chat_model.engine
    request = Request(prompt=tuple(engine.tokenize("Hello")), ignore_end=True)
    prepared = PreparedRequest(request, chat_model.markers, in_reasoning=False, tools=(), stops=())

    n_read = 0

    async def lag() -> None:
        nonlocal n_read
        generation = await Generation.start(engine, [prepared], Metrics(engine))
        while engine.stats().n_running + engine.stats().n_queued:
            await asyncio.sleep(0.01)
        async for part in generation.parts():
            n_read += sum(len(delta.steps) for delta in part.deltas)

    with pytest.raises(RequestError, match="lags"):
        asyncio.run(lag())
    assert 0 < n_read < 200  # of 4,073 that fit; a token that completes no character is in none


def test_models_and_health_answer_while_tokens_are_made(server: Server) -> None:
    connection = post(server, endless(server, stream=True))
    read_until(connection, b"data: ", 3)
    started = time.monotonic()
    assert server.client.get("/v1/models").status_code == 200
    assert server.client.get("/health").json()["running"] == 1
    assert time.monotonic() - started < 5
    connection.close()
    assert server.idle_within(2)


def test_two_streams_run_side_by_side(server: Server) -> None:
    texts: list[str] = []

    def read() -> None:
        texts.append(server.chat("How many 'r's are in the word strawberry?", stream=True).text)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text.count("[DONE]") for text in texts] == [1, 1]
    assert texts[0].count('"finish_reason":"stop"') == texts[1].count('"finish_reason":"stop"') == 1


def test_an_engine_that_dies_in_a_stream_is_an_error_and_an_end(dying: Server) -> None:
    text = dying.chat(stream=True).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[1])["choices"][0]["delta"]["reasoning"] == "Well", "what came before the error"
    error, end = json.loads(events[-3]), json.loads(events[-2])
    assert error["error"]["message"].startswith("it broke")
    assert error["error"]["object"] == "error"
    assert end["choices"][0]["finish_reason"] == "length"
    assert sum('"finish_reason":null' not in e for e in events if "choices" in e) == 1
    whole = dying.chat()
    assert whole.status_code == 503
    assert whole.headers["retry-after"] == "1"


@pytest.mark.slow
def test_an_engine_that_stays_dead_is_not_asked_again() -> None:
    engine = ScriptedEngine("Well", EngineDied("it broke", recovered=False))
    with running(ChatModel(engine), ServerConfig(model_ids=("demo",))) as server:
        whole = server.chat()
    assert whole.status_code == 500
    assert whole.headers["x-should-retry"] == "false"


def test_chunks_arrive_as_they_are_made(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            n_pieces = sum(1 for _ in response.iter_raw())
    assert n_pieces > 3
