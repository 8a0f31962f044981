"""stepgguf launch: stand-ins for the agents' programs, on a real server and the embedded model.

The programs themselves are tried by `python -m tests.clients.agents.launch`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from stepgguf.agents.catalogue import AGENTS
from stepgguf.cli.main import main
from tests.conftest import INTERRUPTIBLE
from tests.server.conftest import Serve, Server
from tests.server.conftest import chat_model as chat_model
from tests.server.conftest import serve as serve
from tests.server.conftest import server as server

STUB = Path(__file__).with_name("agent_stub.py")
ANSWER = "There are 3 'r's."
NOWHERE = "http://127.0.0.1:9"
KEY = "s3cret-of-this-server"
STOLEN = "s3cret-of-a-cloud"
CLOUD_VARIABLES = (
    "ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN ANTHROPIC_BASE_URL CLAUDE_CODE_USE_BEDROCK CLAUDE_CODE_OAUTH_TOKEN "
    "OPENAI_API_KEY OPENAI_BASE_URL OPENROUTER_API_KEY GEMINI_API_KEY AWS_BEARER_TOKEN_BEDROCK"
).split()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a configuration of the user's for each agent, and nothing of them on the PATH yet."""
    home = tmp_path / "home"
    for name in (".claude/settings.json", ".codex/config.toml", ".qwen/settings.json", ".pi/agent/models.json"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("the user's own")
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "STEPGGUF_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in CLOUD_VARIABLES:
        monkeypatch.setenv(name, STOLEN)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return home


@pytest.fixture
def programs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stubs(home / "bin")
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")


def write_stubs(folder: Path) -> None:
    """Make a folder with a stand-in for each agent's program."""
    folder.mkdir()
    for name in AGENTS:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" {name} "$@"\n')
        (folder / name).chmod(0o755)


def saw(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[0])
    return found


def files(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_finds_the_server_in_its_settings(
    name: str, home: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPGGUF_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "spark.lan")
    before = files(home)
    with serve(api_key=KEY) as server:
        words = ["-p", "a b", "--", "--model", "--debug", "exit-7"]
        assert main(["launch", name, "--url", server.url + "/v1", "--", *words]) == 7
    out, err = capfd.readouterr()
    found = saw(out)
    assert found["answer"] == ANSWER
    assert found["n_ctx"] == 4096
    assert found["args"] == words
    assert found["cwd"] == str(Path.cwd())
    assert f"{name} uses demo at {server.url}: 4,096 tokens of context" in err
    # No cloud's key reaches it, ours is in no file and not shown, and the user's own configuration is as it was.
    assert STOLEN not in found["env"].values()
    assert found["env"]["NO_PROXY"] == "spark.lan,127.0.0.1"
    after = files(home)
    assert after.items() >= before.items()
    assert not any(KEY in text or STOLEN in text for text in after.values())
    assert KEY not in err
    if found["folder"] is not None:
        folder = Path(found["folder"])
        assert folder == home / ".local/share/stepgguf/agents" / name or sys.platform == "darwin"
        assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("programs")
def test_what_it_does_not_know_is_the_agents(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "-p", "hi", "--resume", "x", "--url", server.url, "--effort=high"]) == 0
    assert saw(capfd.readouterr().out)["args"] == ["-p", "hi", "--resume", "x", "--effort=high"]


@pytest.mark.usefixtures("programs")
def test_claude_codes_own_state_is_left_to_it(home: Path, server: Server) -> None:
    state = home / ".local/share/stepgguf/agents/claude/.claude.json"
    assert main(["launch", "claude", "--url", server.url]) == 0
    assert json.loads(state.read_text()) == {"hasCompletedOnboarding": True}
    state.write_text("{}")
    assert main(["launch", "claude", "--url", server.url]) == 0
    assert state.read_text() == "{}"


@pytest.mark.usefixtures("programs")
def test_a_server_that_has_the_file_already_is_used(
    demo_gguf: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pi", "--url", server.url, "--model", str(demo_gguf)]) == 0
    out, err = capfd.readouterr()
    assert saw(out)["answer"] == ANSWER
    assert "demo.gguf is served already" in err


# what it starts and stops -------------------------------------------------------------------------------------------


@pytest.fixture
def launched(programs: None) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the program too, if it is left
        process.communicate()


def launch(processes: list[subprocess.Popen[str]], *arguments: str) -> subprocess.Popen[str]:
    """The command in a session of its own, as a shell gives it."""
    process = subprocess.Popen(
        [*INTERRUPTIBLE, "launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    processes.append(process)
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def gone(url: str) -> bool:
    """Whether nobody listens there any more, after a moment."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(url + "/health")
        except httpx.TransportError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(None, 3), (signal.SIGTERM, 128 + 15), (signal.SIGKILL, -9)])
def test_a_server_that_it_starts_ends_with_it(
    demo_gguf: Path, launched: list[subprocess.Popen[str]], sign: signal.Signals | None, code: int
) -> None:
    last = "exit-3" if sign is None else "wait"
    options = ["--url", NOWHERE, "--model", str(demo_gguf), "--ctx", "2048", "--parallel", "1", "--threads", "1"]
    process = launch(launched, "claude", *options, "--", last)
    found = saw(line(process))
    url = found["env"]["ANTHROPIC_BASE_URL"]
    assert (found["answer"], found["n_ctx"]) == (ANSWER, 2048)
    if sign is not None:
        assert json.loads(line(process)) == "waiting"
        process.send_signal(sign)
    if sign == signal.SIGTERM:
        assert json.loads(line(process)) == {"signal": signal.SIGTERM}
    assert process.wait(30) == code
    assert gone(url)
    assert process.stderr is not None
    if sign is None:
        err = process.stderr.read()
        log = re.search(r"starting a server for demo.gguf; its log: (\S+)", err)
        assert log
        assert "POST '/v1/messages' 200" in Path(log[1]).read_text()
        assert "POST" not in err
        Path(log[1]).unlink()


@pytest.mark.slow
def test_ctrl_c_is_the_agents(server: Server, launched: list[subprocess.Popen[str]]) -> None:
    process = launch(launched, "claude", "--url", server.url, "--", "wait")
    line(process)
    assert json.loads(line(process)) == "waiting"
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    assert json.loads(line(process)) == {"signal": signal.SIGINT}
    assert process.wait(20) == 5


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path, launched: list[subprocess.Popen[str]]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF")
    process = launch(launched, "claude", "--url", NOWHERE, "--model", str(broken))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert "error: " in err
    assert "broken.gguf" in err
    assert "Traceback" not in err


# what is wrong ------------------------------------------------------------------------------------------------------


class OtherServer(BaseHTTPRequestHandler):
    """As llama-server answers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status":"ok"}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.usefixtures("home")
def test_a_program_that_is_not_installed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "codex"]) == 1
    expected = "error: codex is not installed\nhint: Install it: npm install -g @openai/codex\n"
    assert capfd.readouterr().err == expected


@pytest.mark.usefixtures("programs")
def test_no_server(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "--url", NOWHERE]) == 1
    err = capfd.readouterr().err
    assert f"there is no server at {NOWHERE}: Connection refused" in err
    assert "stepgguf serve FILE.gguf" in err


@pytest.mark.usefixtures("programs")
def test_somebody_elses_server(capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert main(["launch", "claude", "--url", url]) == 1
        other.shutdown()
    assert f"{url} is not a server of stepgguf" in capfd.readouterr().err


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("key", "text"), [(None, "wants a key"), ("wrong", "does not take the key")])
def test_a_key_that_is_missing_or_wrong(
    key: str | None,
    text: str,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if key is not None:
        monkeypatch.setenv("STEPGGUF_API_KEY", key)
    with serve(api_key=KEY) as server:
        assert main(["launch", "claude", "--url", server.url]) == 1
    err = capfd.readouterr().err
    assert text in err
    assert "STEPGGUF_API_KEY" in err
    assert "wrong" not in err


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vim"], "'vim' is none of claude, codex, opencode, qwen, pi"),
        (["claude", "--model", "opus"], "opus: there is no such file; what is meant for claude stands after --"),
        (["claude", "--url", "ftp://x"], "not a server's address"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *arguments]) in (1, 2)
    assert text in " ".join(re.sub("[│╭╮╰╯─]", "", capfd.readouterr().err).split())
