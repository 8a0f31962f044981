"""Connections that say nothing are let go, those that are served are not."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
import pytest

from stepgguf.server.http import connection
from tests.server.conftest import Serve
from tests.server.test_stream import read_until

pytestmark = pytest.mark.slow

HALF = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\n"
WHOLE = "GET /health HTTP/1.1\nHost: localhost\n\n"


def is_closed(one: socket.socket, seconds: float) -> bool:
    one.settimeout(seconds)
    try:
        return one.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", ["", "P", HALF], ids=["nothing", "one byte", "half a head"])
def test_a_head_has_a_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serve() as server, server.raw(sent) as one:
        assert is_closed(one, 10)


def test_a_head_that_drips_has_the_same_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    with serve() as server, server.raw(HALF) as one, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        started = time.monotonic()
        while time.monotonic() < started + 10:
            one.sendall(b"x")
            time.sleep(0.05)
        pytest.fail("it was read for ten seconds")


def test_the_second_head_of_a_connection_has_a_deadline_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    with serve() as server, server.raw(WHOLE) as one:
        assert read_until(one, b"}").startswith(b"HTTP/1.1 200")
        time.sleep(1)  # idle, which uvicorn bounds: longer than a head may take
        one.sendall(WHOLE.replace("\n", "\r\n").encode())
        assert read_until(one, b"}").startswith(b"HTTP/1.1 200")
        one.sendall(HALF.replace("\n", "\r\n").encode())
        assert is_closed(one, 10)


def test_a_request_may_take_longer_than_a_head(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    head = "POST /tokenize HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 13\n\n"
    with serve() as server, server.raw(head) as one:
        time.sleep(0.8)
        one.sendall(b'{"text": "a"}')
        assert one.recv(65536).startswith(b"HTTP/1.1 200")


def test_too_many_connections_put_out_the_one_that_waits_longest(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 8)
    with serve() as server, contextlib.ExitStack() as stack:
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "ignore_eos": True}
        with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            idle = [stack.enter_context(server.raw(HALF)) for _ in range(20)]
            assert httpx.get(server.url + "/health").status_code == 200
            assert is_closed(idle[0], 5)
            assert not is_closed(idle[-1], 0.1)
            assert "[DONE]" in answer.read().decode()
