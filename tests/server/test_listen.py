"""Signals: none is lost, whenever it comes."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

import pytest
import uvicorn

from stepgguf.chat.exchange import ChatModel
from stepgguf.server.app import create_app
from stepgguf.server.config import ServerConfig
from stepgguf.server.http import listen


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_the_server_looks_for_it_ends_it(
    sign: signal.Signals, chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture_signals = uvicorn.Server.capture_signals

    @contextlib.contextmanager
    def capture_too_late(server: uvicorn.Server) -> Iterator[None]:
        signal.raise_signal(sign)
        with capture_signals(server):
            yield

    monkeypatch.setattr(uvicorn.Server, "capture_signals", capture_too_late)
    app = create_app(chat_model, ServerConfig(("demo",)))
    before = signal.getsignal(sign)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen.serve(app, listener, chat_model.engine, host="127.0.0.1")
    assert signal.getsignal(sign) == before
