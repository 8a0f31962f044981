"""A real server on the embedded model, once for all tests here; `serve` starts more of them with other settings."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from stepgguf.chat.exchange import ChatModel
from stepgguf.errors import EngineDied
from stepgguf.runtime.engine import Engine
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions
from stepgguf.server.app import create_app
from stepgguf.server.config import ServerConfig
from stepgguf.server.http.listen import uvicorn_config
from tests.scripted_engine import ScriptedEngine

MODEL_ID = "demo"


@dataclass(frozen=True)
class Server:
    url: str
    engine: Engine
    client: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def chat(self, content: str = "Hello", **fields: Any) -> httpx.Response:
        """A question at temperature 0, not streamed."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return connection

    def idle_within(self, seconds: float) -> bool:
        """Whether nothing runs any more, after at most so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if stats.n_running == stats.n_queued == 0:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session")
def chat_model(demo_gguf: Path) -> Iterator[ChatModel]:
    with LlamaEngine(demo_gguf, LlamaOptions(n_ctx=4096, n_parallel=2, queue_limit=4, threads=1)) as engine:
        yield ChatModel(engine)


@contextlib.contextmanager
def running(chat: ChatModel, config: ServerConfig) -> Iterator[Server]:
    app = create_app(chat, config)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn_config(app, host="127.0.0.1", port=port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Server(url, chat.engine, client)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        assert not thread.is_alive(), stack_of(thread)


def stack_of(thread: threading.Thread) -> str:
    """Where a thread is that does not end."""
    return "".join(traceback.format_stack(sys._current_frames()[thread.ident or 0]))


Serve = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def serve(chat_model: ChatModel) -> Serve:
    """A server with settings of one's own, on the same model."""
    return lambda **settings: running(chat_model, ServerConfig(model_ids=(MODEL_ID,), **settings))


@pytest.fixture(scope="session")
def server(serve: Serve) -> Iterator[Server]:
    with serve() as running_server:
        yield running_server


@pytest.fixture
def dying() -> Iterator[Server]:
    """A server whose engine fails under every request after its first token."""
    engine = ScriptedEngine("Well", EngineDied("it broke", recovered=True))
    with running(ChatModel(engine), ServerConfig(model_ids=(MODEL_ID,))) as server:
        yield server
