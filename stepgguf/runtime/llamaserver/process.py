"""Whoever serves: a llama-server process of our own, which is started again when it dies, or one that others run.

    loading --/health--> ready --exit--> loading (at most RESTARTS times in RESTART_SECONDS) --exit--> dead

The process gets a session of its own, so that Ctrl+C reaches us and not it. A shell waits on a pipe that only we hold
open: when it closes, because we ended or were killed, the shell kills the process. So 100 GB are never left behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from stepgguf.errors import EngineDied, ModelLoadFailed
from stepgguf.runtime.llamaserver.client import Client

RESTARTS = 3
RESTART_SECONDS = 600.0
TAIL_LINES = 30
_LOAD_SECONDS = 3600.0  # 200 GB from a slow disk
_STOP_SECONDS = 5.0
_GUARD = 'read -r _; kill -KILL -"$0"'  # "$0" is the process group


class Server(Protocol):
    n_recoveries: int

    @property
    def alive(self) -> bool:
        """Whether it serves, or will when it has loaded again."""

    def is_ready(self, timeout: float) -> bool:
        """Wait so many seconds for it to take requests. EngineDied if it never will."""

    def death(self) -> EngineDied:
        """What to tell a request whose connection broke."""

    def close(self) -> None: ...


class ForeignServer:
    """A server that somebody else started and will stop."""

    n_recoveries = 0

    def __init__(self, client: Client) -> None:
        self._client = client
        self._answers, self._closed = True, False

    @property
    def alive(self) -> bool:
        self._answers = self._answers or self._client.is_healthy()
        return self._answers and not self._closed

    def is_ready(self, timeout: float) -> bool:
        if not self.alive:
            raise self.death()
        return True

    def death(self) -> EngineDied:
        if self._closed:
            return EngineDied("the engine was stopped", recovered=False)
        self._answers = self._client.is_healthy()
        return EngineDied(
            f"llama-server at {self._client.url} broke the connection",
            recovered=self._answers,
            hint="Send the request again." if self._answers else "Start that server again.",
        )

    def close(self) -> None:
        self._closed = True


class LlamaProcess:
    """A llama-server on a free port of this machine, with a key that only we know."""

    def __init__(self, model: Path, binary: str | None, arguments: Sequence[str]) -> None:
        """Start it and wait until the model is loaded. ModelLoadFailed has its last lines."""
        program = shutil.which(binary or "llama-server")
        if program is None:
            raise ModelLoadFailed(
                f"{binary or 'llama-server'}: there is no such program",
                hint="Install llama.cpp, or give its path: --engine llama-server=PATH.",
            )
        port, key = _free_port(), secrets.token_hex(16)
        self.client = Client(f"http://127.0.0.1:{port}", key)
        self.n_recoveries = 0
        self._model = model
        self._command = [program, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
        self._environment = {**os.environ, "LLAMA_API_KEY": key}
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._deaths: deque[float] = deque(maxlen=RESTARTS + 1)
        self._changed = threading.Condition()
        self._ready = self._dead = self._closed = False
        self._last_words = ""
        self._launch()
        try:
            self._load()
        except BaseException:  # also Ctrl+C during a long load
            self._closed = True
            self._kill()
            raise
        self._supervisor = threading.Thread(target=self._supervise, name="llama-server", daemon=True)
        self._supervisor.start()

    @property
    def alive(self) -> bool:
        return not (self._dead or self._closed)

    def is_ready(self, timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self.alive, timeout)
            if not self.alive:
                raise self._obituary()
            return self._ready

    def death(self) -> EngineDied:
        with self._changed:  # the connection breaks a moment before the process is gone
            self._changed.wait_for(lambda: self._died_just_now() or not self.alive, _STOP_SECONDS)
            return self._obituary()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._signal(signal.SIGTERM)
        self._supervisor.join(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._supervisor.join()

    # one life ---------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelLoadFailed(
                f"{self._command[0]}: {error.strerror}", hint="Give the path of the program llama-server."
            ) from error
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._tail.clear()
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            self._tail.extend(line.decode(errors="replace").rstrip() for line in lines)

    def _load(self) -> None:
        started = time.monotonic()
        while not self.client.is_healthy():
            if self._process.poll() is not None:
                raise ModelLoadFailed(
                    f"{self._model} could not be loaded: {self._end_of_life()}",
                    hint="Read llama-server's lines above; `stepgguf verify` checks the file.",
                )
            if time.monotonic() - started > _LOAD_SECONDS:
                self._signal(signal.SIGKILL)
                raise ModelLoadFailed(f"{self._model} was not loaded after {_LOAD_SECONDS:.0f} s")
            time.sleep(0.1)
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def _supervise(self) -> None:
        while True:
            self._process.wait()
            self._end_guard()
            last_words = self._end_of_life()
            with self._changed:
                self._ready, self._last_words = False, last_words
                self._deaths.append(time.monotonic())
                many = len(self._deaths) > RESTARTS and self._deaths[-1] - self._deaths[0] < RESTART_SECONDS
                self._dead = many and not self._closed
                self._changed.notify_all()
                if not self.alive:
                    return
                self.n_recoveries += 1
                with contextlib.suppress(ModelLoadFailed):  # the program is gone: that is another death
                    self._launch()
            with contextlib.suppress(ModelLoadFailed):
                self._load()

    def _end_of_life(self) -> str:
        self._reader.join(_STOP_SECONDS)
        code = self._process.returncode
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return "\n".join([f"llama-server {how}; its last lines:", *self._tail])

    def _obituary(self) -> EngineDied:
        if self._closed:
            return EngineDied("the engine was stopped", recovered=False)
        if self._dead:
            return EngineDied(self._last_words, recovered=False, hint="It died too often. A smaller --ctx may help.")
        if self._died_just_now():
            return EngineDied(self._last_words, recovered=True, hint="It starts again: send the request again.")
        return EngineDied("llama-server broke the connection", recovered=True, hint="Send the request again.")

    def _died_just_now(self) -> bool:
        return bool(self._deaths) and time.monotonic() - self._deaths[-1] < _STOP_SECONDS

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._end_guard()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _end_guard(self) -> None:
        assert self._guard.stdin is not None
        self._guard.kill()
        self._guard.wait()
        self._guard.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
