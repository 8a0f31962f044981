"""curl as the documentation shows it: a body from a heredoc, a terminal for the output, and no -N."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from tests.clients.conftest import COUNTED, LETTERS, THINKING, user
from tests.server.conftest import Server
from tests.server.test_stream import endless


def script(server: Server, body: str, *options: str) -> str:
    return f"""curl -s {" ".join(options)} {server.url}/v1/chat/completions \\
  -H "Content-Type: application/json" -H "Authorization: Bearer none" -d @- <<'END'
{body}
END
"""


@contextmanager
def terminal(command: str) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[str]]]:
    """A shell that writes to a terminal, and the lines that appear there."""
    ours, theirs = os.openpty()
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=theirs) as process:
        os.close(theirs)
        with closing(_lines(ours)) as lines:
            try:
                yield process, lines
            finally:
                process.terminate()


def _lines(descriptor: int) -> Generator[str, None, None]:
    with open(descriptor, encoding="utf-8", newline="") as screen:
        try:
            for line in screen:
                yield line.removesuffix("\n").removesuffix("\r")
        except OSError:  # how Linux says that the other end is closed
            return


def events(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def test_a_body_is_read_whatever_curl_says_of_it(server: Server) -> None:
    """By itself it says that it is a form, and with an empty header nothing."""
    body = json.dumps({"messages": [user("Hello")], "temperature": 0})
    for header in ((), ("-H", "content-type:")):
        told = subprocess.run(
            ["curl", "-s", f"{server.url}/v1/chat/completions", *header, "-d", body], capture_output=True, check=True
        )
        assert json.loads(told.stdout)["choices"][0]["message"]["content"] == "Hello! How can I help you?"


def test_a_stream_appears_as_it_is_made(server: Server) -> None:
    body = endless(server, stream=True).decode()
    with terminal(f"exec {script(server, body)}") as (curl, lines):
        arrived = [json.loads(next(events(lines))) for _ in range(5)]
        assert server.engine.stats().n_running == 1, "the answer has no end, and its start is here"
        assert curl.poll() is None
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in arrived)
    assert server.idle_within(2)


def test_a_stream_is_thinking_then_text(server: Server) -> None:
    body = json.dumps({"model": "step-3.5-flash", "messages": [user(LETTERS)], "temperature": 0, "stream": True})
    with terminal(script(server, body)) as (_, lines):
        *chunks, last = events(lines)
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert last == "[DONE]"
    assert "".join(delta["reasoning_content"] or "" for delta in deltas) == THINKING
    assert "".join(delta["content"] or "" for delta in deltas) == COUNTED


def test_the_head_says_what_it_is_and_that_nothing_may_hold_it_back(server: Server) -> None:
    body = json.dumps({"messages": [user("Hello")], "temperature": 0, "stream": True})
    done = subprocess.run(["sh", "-c", script(server, body, "-i")], capture_output=True, text=True, check=True)
    status, *head = done.stdout.split("\n\n")[0].splitlines()
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
    assert status.startswith("HTTP/1.1 200")
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["transfer-encoding"] == "chunked"
    assert headers["x-request-id"]
    assert "content-encoding" not in headers
