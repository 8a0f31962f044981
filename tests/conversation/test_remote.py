"""The same conversations with a running server: ours for what should happen, scripted bytes for what should not."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.output import Delta
from stepgguf.conversation.inprocess import InProcessBackend
from stepgguf.conversation.records import AnswerUsage, ChatSettings
from stepgguf.conversation.remote import RemoteBackend
from stepgguf.conversation.session import Session
from stepgguf.errors import EngineBusy, EngineError, RequestError
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.server.config import ServerConfig
from tests.conversation.test_session import WEATHER, deltas
from tests.server.conftest import Server, running

GREEDY = ChatSettings({"temperature": 0.0})
KEY = "secret"


@pytest.fixture(scope="module")
def server(demo_gguf: Path) -> Iterator[Server]:
    with (
        LlamaEngine(demo_gguf, LlamaOptions(n_ctx=1024, threads=1)) as engine,
        running(ChatModel(engine), ServerConfig(("demo",), api_key=KEY)) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def remote(server: Server) -> RemoteBackend:
    return RemoteBackend(server.url, KEY)


@pytest.mark.slow
def test_a_server_answers_as_the_process_does(server: Server, remote: RemoteBackend) -> None:
    here = Session(InProcessBackend(ChatModel(server.engine)), GREEDY)
    there = Session(remote, GREEDY)
    for question in ("What is 347 + 286?", "Hello"):
        list(here.ask(question))
        updates = list(there.ask(question, tick=0.01))
        assert there.messages == here.messages
        usage = updates[-1]
        assert isinstance(usage, AnswerUsage)
        assert (usage.n_prompt, usage.n_reasoning, usage.n_text, usage.n_ctx, usage.finish_reason) == (
            here.usage.n_prompt, here.usage.n_reasoning, here.usage.n_text, 1024, "stop",
        )  # fmt: skip
        assert usage.generation_seconds > 0


@pytest.mark.slow
def test_a_tool_is_called_through_a_server(remote: RemoteBackend) -> None:
    session = Session(remote, ChatSettings({"temperature": 0.0}, tools=(WEATHER,)))
    list(session.ask("What is the weather in Paris?"))
    (call,) = session.open_calls
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    session.give_result(call["id"], json.dumps({"temp_c": 21, "sky": "sunny"}))
    assert deltas(session.answer()) == "It is 21 degrees and sunny in Paris."


def test_settings_reach_the_server(remote: RemoteBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    settings = ChatSettings({"temperature": 0.0, "top_k": 5, "seed": 1}, "Be brief.", 60, 0, json=schema)
    session = Session(remote, settings)
    assert json.loads(deltas(session.ask("What is 2 + 3?"))) in ({"n": 1}, {"n": 2})
    assert session.usage.n_reasoning == 0
    session.change_settings(ChatSettings({"temperature": 0.0}, max_tokens=4))
    list(session.ask("What is 2 + 3?"))
    assert session.usage.finish_reason == "length"


def test_an_interruption_frees_the_server(server: Server, remote: RemoteBackend) -> None:
    session = Session(remote, ChatSettings({"temperature": 0.0}))
    updates = session.ask("How many 'r's are in the word strawberry?")
    assert any(isinstance(update, Delta) for update in updates)  # reads up to the first
    started = time.monotonic()
    updates.close()
    assert time.monotonic() - started < 10
    assert server.idle_within(2)
    assert session.entries[-1].interrupted
    assert session.usage.finish_reason == "cancelled"
    assert deltas(session.ask("What is 12 + 30?")) == "12 + 30 = 42"


def test_it_tells_what_the_server_tells(remote: RemoteBackend, server: Server) -> None:
    assert (remote.origin.model, remote.origin.file, remote.n_ctx) == ("demo", server.url, 1024)
    assert remote.count_tokens("Hello") == len(server.engine.tokenize("Hello"))
    with pytest.raises(RequestError, match=r"temperature: .*2"):
        list(Session(remote, ChatSettings({"temperature": 9.0})).ask("Hello"))
    with pytest.raises(RequestError, match="1024"):
        list(Session(remote, GREEDY).ask("word " * 2000))


@pytest.mark.parametrize("spelling", ["http://{}", "http://{}/", "http://{}/v1", "{}"])
def test_addresses_may_be_written_in_many_ways(server: Server, spelling: str) -> None:
    assert RemoteBackend(spelling.format(server.url.removeprefix("http://")), KEY).origin.file == server.url


def test_what_cannot_be_reached_is_named(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match="Connection refused"):
        RemoteBackend(f"http://127.0.0.1:{port}")
    with pytest.raises(EngineError) as no_tls:
        RemoteBackend(server.url.replace("http:", "https:"))
    assert "http://" in (no_tls.value.hint or "")
    with pytest.raises(EngineError, match="not a server's address"):
        RemoteBackend("ftp://x")
    with pytest.raises(RequestError, match="key") as error:
        RemoteBackend(server.url, "wrong")
    assert "STEPGGUF_API_KEY" in (error.value.hint or "")


# bytes ----------------------------------------------------------------------------------------------------------------

MODELS = b'{"data": [{"id": "other/model", "context_length": 99}]}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def read_request(connection: socket.socket) -> None:
    with connection.makefile("rb") as file:
        file.readline()
        file.read(int(http.client.parse_headers(file).get("Content-Length", 0)))


@contextmanager
def saying(answer: Callable[[socket.socket], None]) -> Iterator[RemoteBackend]:
    """A server that lists its model and then answers a question with these bytes."""

    def serve() -> None:
        for reply in (lambda c: c.sendall(HEAD + MODELS), answer):
            connection, _ = listener.accept()
            with connection:
                read_request(connection)
                reply(connection)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield RemoteBackend(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(timeout=10)
        assert not thread.is_alive()


def events(*chunks: object) -> bytes:
    return HEAD + b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def choice(finish_reason: str | None = None, **delta: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


DONE = b"data: [DONE]\n\n"


def test_other_servers_streams_are_understood() -> None:
    """CRLF, comments, unknown fields, `reasoning` alone, usage that lacks the details."""
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    data = b": ping {\r\n\r\nid: 1\r\nevent: x\r\n" + events(
        choice(role="assistant", content=""), choice(reasoning="Hm"), choice(content="Yes"), choice("stop"), usage
    ).removeprefix(HEAD).replace(b"\n", b"\r\n")
    with saying(lambda connection: connection.sendall(HEAD + data + DONE)) as remote:
        session = Session(remote)
        list(session.ask("?"))
    assert session.messages[1] == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}
    assert (session.usage.n_prompt, session.usage.n_reasoning, session.usage.n_text) == (5, 1, 6)
    assert (remote.origin.model, remote.n_ctx) == ("other/model", 99)


def test_an_answer_without_done_is_whole_once_it_has_a_reason_to_end() -> None:
    answer = events({**choice(content="Yes"), "error": None}, choice("stop"))
    with saying(lambda connection: connection.sendall(answer)) as remote:
        session = Session(remote)
        assert deltas(session.ask("?")) == "Yes"
    assert session.usage.finish_reason == "stop"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (events(choice(content="Half an")), "the server broke the answer off"),
        (events(choice(content="Half an"), {"error": {"message": "out of memory"}}) + DONE, "out of memory"),
        (events(choice(content="Half an")) + b"data: {oops\n\n", "the answer broke off"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error_and_stays_in_part(data: bytes, message: str) -> None:
    with saying(lambda connection: connection.sendall(data)) as remote:
        session = Session(remote)
        with pytest.raises(EngineError, match=message):
            list(session.ask("?"))
    assert session.messages[1]["content"] == "Half an"
    assert session.entries[1].interrupted
    assert session.usage.finish_reason == "error"


def test_a_busy_server_and_one_that_speaks_otherwise() -> None:
    busy = b'HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\n{"error": {"message": "the queue is full"}}'
    with (
        saying(lambda connection: connection.sendall(busy)) as remote,
        pytest.raises(EngineBusy, match="queue is full"),
    ):
        list(Session(remote).ask("?"))
    html = b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>"
    with saying(lambda connection: connection.sendall(html)) as remote, pytest.raises(EngineError, match="status 502"):
        list(Session(remote).ask("?"))


@pytest.mark.parametrize(
    "chunk",
    [
        [],
        7,
        {"choices": 1},
        {"choices": [1]},
        {"choices": [{"delta": []}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"tool_calls": {"a": 1}}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": -1, "function": {"name": "x"}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": 3}]},
        {"choices": [], "usage": [1]},
        {"choices": [], "usage": {"prompt_tokens": "many"}},
        {"error": {"message": 5}},
        {"error": ["no"]},
    ],
    ids=json.dumps,
)
def test_events_of_another_shape_end_the_answer_with_a_sentence(chunk: object) -> None:
    answer = events(choice(content="Yes"), chunk)
    with saying(lambda connection: connection.sendall(answer)) as remote:
        session = Session(remote)
        with pytest.raises(EngineError):
            list(session.ask("?"))
    assert session.entries[-1].message["content"] == "Yes"
    assert session.entries[-1].interrupted


@pytest.mark.parametrize(
    "models", [b"", b"[]", b'{"data": 1}', b'{"data": []}', b'{"data": [1]}', b'{"data": [{"id": 1}]}', b"[" * 10**5]
)
def test_what_is_no_list_of_models_is_said(models: bytes) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            read_request(connection)
            connection.sendall(HEAD + models)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(EngineError, match="/v1/models"):
            RemoteBackend(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(timeout=10)


@pytest.mark.parametrize("url", ["http://x:99999", "http://[::1", "ftp://x", "http://", "http://x:y", "http://a b:1"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(EngineError):
        RemoteBackend(url)


def test_a_key_that_no_header_can_hold_is_said(server: Server) -> None:
    for key in ("secret\n", "sec\0ret", "secrét"):
        with pytest.raises(EngineError, match="API key") as caught:
            RemoteBackend(server.url, key)
        assert "sec" not in str(caught.value)


@pytest.mark.parametrize("head", [HEAD, b""])
def test_silence_can_be_interrupted(head: bytes) -> None:
    def say_nothing(connection: socket.socket) -> None:
        connection.sendall(head)
        connection.recv(1)  # until the other side closes

    with saying(say_nothing) as remote:
        session = Session(remote)
        updates = session.ask("?", tick=0.01)
        assert next(updates) is None
        session.stop_answer()
        assert isinstance([*updates][-1], AnswerUsage)
    assert session.entries == []
