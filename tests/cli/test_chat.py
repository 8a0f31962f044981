"""stepgguf chat as a user meets it: on a pseudo-terminal, and in pipes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.main import main
from stepgguf.conversation.transcript import SavedSession, list_sessions, read_session
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import probe_machine
from stepgguf.runtime.llama_build import Gpu, probe_build
from tests.conftest import INTERRUPTIBLE
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

SECONDS = 20.0
PROMPT = r"\n>[ \x08]*$"
UP, CTRL_C, CTRL_D, CTRL_T, ALT_ENTER = "\x1b[A", "\x03", "\x04", "\x14", "\x1b\r"


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights. With so many tokens it rarely says one that ends something."""
    folder = tmp_path_factory.mktemp("babbler")
    write_checkpoint(folder / "babbler", Shape(n_layer=5, hidden=512, dense=2048, vocab=20000))
    assert main(["convert", str(folder / "babbler"), str(folder / "babbler.gguf"), "-t", "BF16", "-q"]) == 0
    return folder / "babbler.gguf"


class Terminal:
    """stepgguf chat on a pseudo-terminal of 100 columns."""

    def __init__(self, home: Path, *arguments: object, **environment: str) -> None:
        self.home = home
        self.fd, self.other = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.mode = termios.tcgetattr(self.other)
        self.process = subprocess.Popen(
            [*INTERRUPTIBLE, "chat", *map(str, arguments), "--threads", "1"],
            stdin=self.other,
            stdout=self.other,
            stderr=self.other,
            env={
                **os.environ,
                "TERM": "xterm",
                "XDG_DATA_HOME": str(home),
                "PROMPT_TOOLKIT_NO_CPR": "1",
                **environment,
            },
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.raw = ""
        self.seen = 0  # characters that patterns have matched

    def until(self, pattern: str) -> str:
        """Read until the pattern is shown; returns what was shown since the last one, without escapes."""
        deadline = time.monotonic() + SECONDS
        while (match := re.compile(pattern).search(plain(self.raw), self.seen)) is None:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {plain(self.raw)[self.seen :]!r}"
            self.raw += os.read(self.fd, 65536).decode(errors="replace")
        start, self.seen = self.seen, match.end()
        return plain(self.raw)[start : match.end()]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ask(self, text: str) -> None:
        self.until(PROMPT)
        self.type(text + "\r")

    def wait(self) -> int:
        """The exit code. The terminal must be as it was."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, plain(self.raw)
            if select.select([self.fd], [], [], 0.05)[0]:
                self.raw += os.read(self.fd, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.other) == self.mode
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)
        os.close(self.other)

    @property
    def saved(self) -> SavedSession:
        return read_session(list_sessions(self.home / "stepgguf" / "sessions")[0])


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]", "", text).replace("\r", "")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation(demo_gguf: Path, terminal: Any) -> None:
    """Folded thinking, the answer, the footer; then what was folded; commands; Ctrl+D."""
    chat = terminal(demo_gguf, "--temperature", "0")
    chat.ask("What is 347 + 286?")
    shown = chat.until(r"ctx 114/4,096 \(3%\)")
    assert re.search(r"∴ thought for [\d.]+s, 66 tokens \(/t shows it\)\n\n[^∴]*347 \+ 286 = 633\n\n66 think", shown)
    assert re.search(r"66 think \+ 14 answer · [\d.]+ t/s · prefill 34 @ [\d,]+ t/s · ctx", shown)
    chat.until("MTP [0-9.]+ tok/step")
    chat.ask("/t")
    assert "│ Ones: 7+6=13, write 3, carry 1.\n│ Tens" in chat.until("The sum is 633")
    chat.ask("Hello")
    assert "│ The user greets me." in chat.until("How can I help you")  # /t unfolds the next one too
    chat.ask("/hlep")
    chat.until("unknown command /hlep\n.*Did you mean /help")
    chat.ask("/sessions")
    chat.until("unknown command /sessions\n.*Did you mean /list")
    chat.ask("/set")
    chat.until("seed random\nmax_tokens no limit")
    chat.ask("/think none")
    chat.until("thinking: off")
    chat.ask("/think 5")
    chat.until("at most 5 tokens")
    chat.ask("/undo")
    chat.until("taken back: Hello")
    chat.ask("/stats")
    chat.until("1 answer,")
    chat.until(PROMPT)
    chat.type(CTRL_D)
    assert chat.wait() == 0
    assert [entry.message["role"] for entry in chat.saved.entries] == ["user", "assistant"]
    assert chat.saved.settings.reasoning_budget == 5


def test_several_lines_and_files(demo_gguf: Path, terminal: Any, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("Hello")
    chat = terminal(demo_gguf, "--temperature", "0", "--reasoning-budget", "0", "--max-tokens", "5")
    chat.ask(f'one{ALT_ENTER}two\\\rthree """\rfour """')
    chat.until("ctx")
    chat.ask("\x1b[200~five\nsix\x1b[201~")
    chat.until("ctx")
    chat.ask('"""\rseven\r"""')
    chat.until("ctx")
    chat.until(PROMPT)
    chat.type(f"//eight @{tmp_path}/no\t")
    chat.until("note.txt")
    chat.type("\r")
    chat.until(r"note.txt: \d+ tokens")
    chat.until("ctx")
    chat.until(PROMPT)
    chat.type(CTRL_D)
    assert chat.wait() == 0
    questions = [entry.message["content"] for entry in chat.saved.entries if entry.message["role"] == "user"]
    assert questions == [
        'one\ntwo\nthree """\nfour """',
        "five\nsix",
        "seven",
        f"/eight @{tmp_path}/note.txt\n\n{tmp_path}/note.txt:\n```txt\nHello\n```",
    ]


def test_enter_ends_the_thinking_and_ctrl_c_the_answer(babbler: Path, terminal: Any) -> None:
    chat = terminal(babbler, "--seed", "1", "--no-save")
    chat.ask("babble")
    chat.until("thinking .* Enter: answer now")
    chat.type("\r")
    chat.until(r"∴ thought for .*s, \d+ tokens")
    chat.type("typed ahead" + CTRL_C)
    shown = chat.until(r"think \+ (\d+) answer")
    assert "[interrupted]" in shown
    chat.until("> typed ahead")
    chat.type(CTRL_C + "qq")
    chat.until("qq")
    chat.type("\x15" + UP)  # Ctrl+U
    chat.until("typed ahead")
    time.sleep(1.1)  # so that the next is not the second in a second
    chat.type(CTRL_C + CTRL_C)
    chat.until("or Ctrl\\+D, leaves")
    time.sleep(1.1)  # what it promised holds however slow the machine or the reader is
    chat.type(CTRL_C)
    assert chat.wait() in (0, 130)  # 130 if it comes between two lines
    assert list_sessions(chat.home / "stepgguf" / "sessions") == []


def test_two_ctrl_c_within_a_second_leave_and_keep_what_came(babbler: Path, terminal: Any) -> None:
    chat = terminal(babbler, "--seed", "1", "--thinking", "full")
    chat.ask("babble")
    chat.until("│ .*")
    chat.type(CTRL_C)
    time.sleep(0.1)
    chat.type(CTRL_C)
    assert chat.wait() == 0
    assert chat.saved.entries[-1].interrupted
    assert chat.saved.entries[-1].message["reasoning_content"]


@pytest.mark.parametrize("busy", [True, False])
def test_a_termination_restores_the_terminal(babbler: Path, terminal: Any, busy: bool) -> None:
    chat = terminal(babbler, "--seed", "1")
    if busy:
        chat.ask("babble")
        chat.until("thinking")
    else:
        chat.until(PROMPT)  # which is still being drawn: the worst moment
    chat.process.send_signal(signal.SIGTERM)
    assert chat.wait() == 128 + signal.SIGTERM
    if busy:
        assert chat.saved.entries[-1].interrupted


def test_thinking_is_folded_and_unfolded_while_it_comes(babbler: Path, terminal: Any) -> None:
    chat = terminal(babbler, "--seed", "1", "--no-save")
    chat.ask("babble")
    chat.until("∴ thinking")
    chat.type(CTRL_T)
    chat.until("│ ")
    chat.type(CTRL_T)
    chat.until("∴ thinking")
    chat.type(CTRL_C)
    chat.until("interrupted")


def test_a_limit_is_named(demo_gguf: Path, terminal: Any) -> None:
    chat = terminal(demo_gguf, "--temperature", "0", "--max-tokens", "9")
    chat.ask("What is 347 + 286?")
    chat.until(r"cut off by max_tokens \(9\); it had not stopped thinking")


def test_a_question_that_does_not_fit_can_be_changed_and_sent_again(demo_gguf: Path, terminal: Any) -> None:
    chat = terminal(demo_gguf, "--ctx", "256")
    chat.ask("word " * 300)
    chat.until(r"error: the prompt has \d+ tokens, the context 256\n.*hint: ")
    chat.until("> word word")
    chat.type(CTRL_D)


def test_a_tool_call_is_shown_and_its_result_asked_for(demo_gguf: Path, terminal: Any, tmp_path: Path) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "get_weather", "description": "Get the weather", "parameters": city}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    chat = terminal(demo_gguf, "--temperature", "0")
    chat.ask(f"/tools {tmp_path}/tools.json")
    chat.until("tools: get_weather")
    chat.ask("What is the weather in Paris?")
    chat.until(r'→ get_weather \{"city":"Paris"\}')
    chat.until("result of get_weather:")
    chat.type('{"temp_c": 21, "sky": "sunny"}\r')
    chat.until("It is 21 degrees and sunny in Paris.")


def test_a_session_is_continued(demo_gguf: Path, terminal: Any) -> None:
    chat = terminal(demo_gguf, "--temperature", "0", "--system", "Be brief.")
    chat.ask("Hello")
    chat.until("How can I help you")
    chat.ask("/save greeting")
    chat.until(r"\n?".join(map(re.escape, "greeting.jsonl")))  # the path may be wider than the terminal
    chat.ask("/exit")
    assert chat.wait() == 0
    chat = terminal(demo_gguf, "-c")
    shown = chat.until(PROMPT)
    assert "2 messages; the last:\n> Hello\n\nHello! How can I help you?" in shown
    chat.type("/system\r")
    chat.until("system: Be brief.")
    chat.ask("/list")
    chat.until("greeting  2 messages  Hello")
    chat.ask("/new")
    chat.until("a new chat")
    chat.ask("/load 1")
    chat.until("2 messages")
    chat.ask("/exit")
    assert chat.wait() == 0


# pipes ----------------------------------------------------------------------------------------------------------------


def piped(*arguments: object, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepgguf", "chat", *map(str, arguments), "--threads", "1"]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("thinking", ["full", None])
def test_the_answer_alone_goes_to_stdout(demo_gguf: Path, thinking: str | None) -> None:
    options = ["--thinking", thinking] if thinking else []
    result = piped(demo_gguf, "--temperature", "0", *options, text="What is 2 + 3?")
    assert (result.returncode, result.stdout) == (0, "2 + 3 = 5\n")
    assert ("2+3=5" in result.stderr) == (thinking == "full")
    assert "\x1b" not in result.stderr
    assert re.search(r"\d+ think \+ \d+ answer · [\d.]+ t/s · .* · ctx \d+/4,096", result.stderr)


def test_a_gpu_that_stays_idle_is_said_once(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = replace(probe_machine(), system="Linux", gpus=(Gpu("NVIDIA GeForce RTX 3090", 24 * GIB, 23 * GIB),))
    monkeypatch.setattr("stepgguf.fit.machine.probe_machine", lambda: machine)
    build = replace(probe_build(), gpu_offload=False, gpus=())
    monkeypatch.setattr("stepgguf.runtime.llama_build.probe_build", lambda: build)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    ask = ["chat", str(demo_gguf), "-p", "How many e in cheese?", "--threads", "1"]
    for options, times in (([], 1), (["--gpu-layers", "0"], 0), (["-q"], 0)):
        capfd.readouterr()
        assert main([*ask, *options]) == 0
        said = " ".join(capfd.readouterr().err.split())
        assert said.count("is built without CUDA and leaves the GPU idle; to mend it: stepgguf setup") == times


def test_quiet_is_silent(demo_gguf: Path) -> None:
    result = piped(demo_gguf, "--temperature", "0", "-q", "-p", "What is 2 + 3?")
    assert (result.stdout, result.stderr) == ("2 + 3 = 5\n", "")


def test_an_answer_as_json(demo_gguf: Path) -> None:
    result = piped(demo_gguf, "--temperature", "0", "--json", "-p", "What is 2 + 3?")
    answer = json.loads(result.stdout)
    assert answer["content"] == "2 + 3 = 5"
    assert "2+3=5" in answer["reasoning"]
    assert answer["usage"]["finish_reason"] == "stop"
    assert result.stderr == ""


def test_a_prompt_and_what_is_piped_are_one_question(demo_gguf: Path, tmp_path: Path) -> None:
    """... and -c puts them into the last session."""
    home = str(tmp_path)
    result = piped(demo_gguf, "-c", "-p", "Hello", XDG_DATA_HOME=home)
    assert result.returncode == 2
    assert "there is no session" in result.stderr
    folder = tmp_path / "stepgguf" / "sessions"
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text('{"type": "session", "version": 1, "origin": {"model": "y", "file": "z"}}\n')
    result = piped(demo_gguf, "-c", "--temperature", "0", "-p", "What is", text="2 + 3?", XDG_DATA_HOME=home)
    assert "warning: x was made with y (z)" in result.stderr
    assert read_session(folder / "x.jsonl").entries[0].message["content"] == "What is\n\n2 + 3?"


def test_a_context_that_is_too_long_says_what_to_do(demo_gguf: Path) -> None:
    result = piped(demo_gguf, "--ctx", "256", "-p", "word " * 400)
    assert result.returncode == 1
    assert re.search(r"error: the prompt has \d+ tokens, the context 256", result.stderr)
    assert "hint: Start with a larger --ctx (the model knows up to 4096)" in result.stderr


def test_ctrl_c_in_a_pipe_keeps_what_came_and_exits_130(babbler: Path) -> None:
    command = [
        *INTERRUPTIBLE,
        "chat",
        str(babbler),
        "--seed",
        "1",
        "-p",
        "babble",
        "--reasoning-budget",
        "0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"answer" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["x.gguf", "-p", ""], "there is nothing to answer"),
        (["x.gguf", "--json"], "there is nothing to answer"),
        (["x.gguf", "-p", "a", "--thinking", "loud"], "'loud' is not one of 'full', 'fold', 'hide'"),
        (["-p", "a"], "give either a GGUF file or --url"),
        (["x.gguf", "--url", "http://x", "-p", "a"], "give either a GGUF file or --url"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], text: str) -> None:
    result = piped(*arguments)
    assert result.returncode == 2
    assert text in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_no_server_is_one_line_and_a_hint() -> None:
    result = piped("--url", "http://127.0.0.1:9", "-p", "Hello")
    assert result.returncode == 1
    assert re.fullmatch(r"error: http://127.0.0.1:9: .*\nhint: Start a server: .*\n", result.stderr)


def test_a_history_that_cannot_be_kept_ends_nothing(demo_gguf: Path, terminal: Any) -> None:
    chat = terminal(demo_gguf, "--temperature", "0")
    chat.until(PROMPT)
    history = chat.home / "stepgguf" / "history"
    history.unlink()
    history.mkdir()
    chat.type("Hello\r")
    chat.until(r"Hello! How can I help you\?")
    chat.until(PROMPT)
    chat.type(CTRL_D)
    assert chat.wait() == 0
