"""What `stepgguf launch` starts and stops: a server in a session of its own, and a program in the user's terminal.

signal          before the program runs     while it runs
Ctrl+C          ends us                     is the program's: it gets it from the terminal, and we go on
TERM, HUP       end us                      end the program, then us
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from stepgguf.agents.agent import Agent, AgentSettings
from stepgguf.agents.model_server import ModelServer, find_server
from stepgguf.cli import output
from stepgguf.cli.memory_options import LONGEST
from stepgguf.errors import EngineError, StepggufError
from stepgguf.files import disk
from stepgguf.runtime.process_guard import ProcessGuard, free_port

_POLL_SECONDS = 0.2
_STOP_SECONDS = 10.0  # a server ends its answers and writes its conversations down


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of a server that is started. None is its own default."""

    ctx: int | None
    parallel: int
    gpu_layers: int | None
    threads: int | None

    def arguments(self) -> list[str]:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given |= {"ctx": "auto"} if self.ctx == LONGEST else {}
        return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def find_program(agent: Agent) -> str:
    """Return the path of an agent's program. StepggufError: it is not installed."""
    path = shutil.which(agent.command)
    if path is None:
        raise StepggufError(f"{agent.command} is not installed", hint=f"Install it: {agent.install}")
    return path


def prepare_folder(folder: Path, settings: AgentSettings) -> None:
    """Make an agent's folder, readable by its owner only, and write the files that its settings name."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in settings.first_files.items():
        if not (folder / name).exists():
            disk.replace(folder / name, text.encode())
    for name, text in settings.files.items():
        disk.replace(folder / name, text.encode())


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by SystemExit, so that what was started in it is stopped."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def opened_server(url: str, model: Path | None, options: ServerOptions) -> Iterator[ModelServer]:
    """Give the server at the URL; with a model's file only if that is what it serves, and else one that is started for
    it and stopped at the end. EngineError: there is no server, and no file to serve."""
    key = os.environ.get("STEPGGUF_API_KEY")
    if model is None:
        yield find_server(url, key)
        return
    with contextlib.suppress(EngineError):
        found = find_server(url, key)
        if found.model == model.stem:
            output.note(f"{model.name} is served already")
            yield found
            return
    with _started_server(model, options, key) as started:
        yield started


@contextlib.contextmanager
def _started_server(model: Path, options: ServerOptions, key: str | None) -> Iterator[ModelServer]:
    """Start a server of this file on a free port of this machine and wait until it answers. typer.Exit: it has said on
    the terminal why it cannot."""
    port = free_port()
    log, log_path = tempfile.mkstemp(prefix="stepgguf-serve-", suffix=".log")
    os.close(log)
    place = ["--host", "127.0.0.1", "--port", str(port), "--log", log_path]
    command = [sys.executable, "-m", "stepgguf", "serve", str(model), *place, *options.arguments()]
    output.note(f"starting a server for {model.name}; its log: {log_path}")
    # A session of its own: Ctrl+C in the terminal does not reach it. The terminal's stderr: its bar is seen.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    guard = ProcessGuard(process.pid)
    try:
        yield _wait_for_server(process, f"http://127.0.0.1:{port}", key)
    finally:
        _stop(process, _STOP_SECONDS)
        guard.end()


def _wait_for_server(process: subprocess.Popen[bytes], url: str, key: str | None) -> ModelServer:
    while process.poll() is None:
        with contextlib.suppress(EngineError):
            return find_server(url, key)
        time.sleep(_POLL_SECONDS)
    raise typer.Exit(process.returncode if process.returncode > 0 else 1)


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program with this terminal and return its exit code, as a shell has it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler and not SIG_IGN, which the program would inherit
    try:
        process = subprocess.Popen(command, env=environment)
        try:
            code = process.wait()
        finally:
            _stop(process, _STOP_SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Have a process end, and kill it if it has not after so many seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
