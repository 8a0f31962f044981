"""Whoever serves: a llama-server process of our own, which is started again when it dies, or one that others run.

    loading --/health--> ready --exit--> loading (at most RESTARTS times in RESTART_SECONDS) --exit--> given up

The process gets a session of its own, so that Ctrl+C reaches us and not it, and a guard.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from stepgguf.errors import EngineDied, ModelLoadFailed
from stepgguf.runtime.llamaserver.client import LlamaServerClient
from stepgguf.runtime.llamaserver.options import ServerOptions
from stepgguf.runtime.process_guard import ProcessGuard, free_port

RESTARTS = 3
RESTART_SECONDS = 600.0
LOG_LINES = 30
_LOAD_SECONDS = 3600.0  # 200 GB from a slow disk
_STOP_SECONDS = 5.0


class LlamaServer(Protocol):
    """A llama-server as the engine sees it. `n_recoveries`: so many times it was started again."""

    n_recoveries: int

    @property
    def alive(self) -> bool:
        """Whether it serves, or will when it has loaded again."""

    def wait_until_ready(self, seconds: float) -> bool:
        """Wait at most so many seconds for it to take requests. Whether it does; EngineDied if it never will."""

    def lost_connection_error(self) -> EngineDied:
        """Return what a request whose connection broke ends with. Waits a moment, to see whether the server is gone."""

    def close(self) -> None:
        """Let it go: our own process ends, another one goes on."""


class ForeignServer:
    """A server that somebody else started and will stop."""

    n_recoveries = 0

    def __init__(self, client: LlamaServerClient) -> None:
        self._client = client
        self._answers, self._closed = True, False

    @property
    def alive(self) -> bool:
        self._answers = self._answers or self._client.is_healthy()
        return self._answers and not self._closed

    def wait_until_ready(self, seconds: float) -> bool:
        if not self.alive:
            raise self.lost_connection_error()
        return True

    def lost_connection_error(self) -> EngineDied:
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

    def __init__(self, model: Path, options: ServerOptions) -> None:
        """Start it and wait until the model is loaded. ModelLoadFailed has its last lines."""
        program = shutil.which(options.binary or "llama-server")
        if program is None:
            raise ModelLoadFailed(
                f"{options.binary or 'llama-server'}: there is no such program",
                hint="Install llama.cpp, or give its path: --engine llama-server=PATH.",
            )
        port, key = free_port(), secrets.token_hex(16)
        self.client = LlamaServerClient(f"http://127.0.0.1:{port}", key)
        self.n_recoveries = 0
        self._model = model
        address = ["--host", "127.0.0.1", "--port", str(port)]
        self._command = [program, "--model", str(model), *address, *options.arguments()]
        self._environment = {**os.environ, "LLAMA_API_KEY": key}
        self._log_lines: deque[str] = deque(maxlen=LOG_LINES)
        self._exit_times: deque[float] = deque(maxlen=RESTARTS + 1)
        self._changed = threading.Condition()
        self._ready = self._given_up = self._closed = False
        self._exit_report = ""
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
        return not (self._given_up or self._closed)

    def wait_until_ready(self, seconds: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self.alive, seconds)
            if not self.alive:
                raise self._exit_error()
            return self._ready

    def lost_connection_error(self) -> EngineDied:
        with self._changed:  # the connection breaks a moment before the process is gone
            self._changed.wait_for(lambda: self._exited_just_now() or not self.alive, _STOP_SECONDS)
            return self._exit_error()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._signal(signal.SIGTERM)  # llama-server ends by itself and closes what it has open, if it still can
        self._supervisor.join(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._supervisor.join()

    # one process ------------------------------------------------------------------------------------------------

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
        self._guard = ProcessGuard(self._process.pid)
        self._log_lines.clear()
        self._reader = threading.Thread(target=self._keep_log, args=(self._process,), daemon=True)
        self._reader.start()

    def _keep_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            self._log_lines.extend(line.decode(errors="replace").rstrip() for line in lines)

    def _load(self) -> None:
        """Wait until the model is loaded. ModelLoadFailed if the process ends before, or takes for ever."""
        started = time.monotonic()
        while not self.client.is_healthy():
            if self._process.poll() is not None:
                raise ModelLoadFailed(
                    f"{self._model} could not be loaded: {self._describe_exit()}",
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
        """Wait for the process to end and start it again, in a thread of its own."""
        while True:
            self._process.wait()
            self._guard.end()
            exit_report = self._describe_exit()
            with self._changed:
                self._ready, self._exit_report = False, exit_report
                self._exit_times.append(time.monotonic())
                self._given_up = self._exits_too_often() and not self._closed
                self._changed.notify_all()
                if not self.alive:
                    return
                self.n_recoveries += 1
                with contextlib.suppress(ModelLoadFailed):  # the program is gone: the old process counts as ended again
                    self._launch()
            with contextlib.suppress(ModelLoadFailed):
                self._load()

    def _exits_too_often(self) -> bool:
        """Whether the exits that are remembered, which are one more than is forgiven, lie close together."""
        times = self._exit_times
        return len(times) > RESTARTS and times[-1] - times[0] < RESTART_SECONDS

    def _describe_exit(self) -> str:
        """Return how the process ended, and what it wrote last."""
        self._reader.join(_STOP_SECONDS)
        code = self._process.returncode
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return "\n".join([f"llama-server {how}; its last lines:", *self._log_lines])

    def _exit_error(self) -> EngineDied:
        """Return why a request was not served, as far as is known by now."""
        if self._closed:
            return EngineDied("the engine was stopped", recovered=False)
        if self._given_up:
            return EngineDied(self._exit_report, recovered=False, hint="It died too often. A smaller --ctx may help.")
        if self._exited_just_now():
            return EngineDied(self._exit_report, recovered=True, hint="It starts again: send the request again.")
        return EngineDied("llama-server broke the connection", recovered=True, hint="Send the request again.")

    def _exited_just_now(self) -> bool:
        return bool(self._exit_times) and time.monotonic() - self._exit_times[-1] < _STOP_SECONDS

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._guard.end()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
