"""stdin, stdout and stderr as shells hand them over: full, closed, broken, or of another encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPGGUF = f"{sys.executable} -m stepgguf"
ANSWER = "--temperature 0 --threads 1"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


COMMANDS = ["--help", "inspect {0}", "plan {0}", "template {0}", "doctor --json", "chat {0} -p Hello " + ANSWER]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_stdout_is_one_sentence(demo_gguf: Path, command: str) -> None:
    result = shell(f"{STEPGGUF} {command.format(demo_gguf)} > /dev/full")
    assert result.returncode == 1
    assert b"No space left on device" in result.stderr
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_leaves_early_is_no_error(demo_gguf: Path, command: str) -> None:
    result = shell(f"{STEPGGUF} {command.format(demo_gguf)} | true")
    assert b"error" not in result.stderr
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(demo_gguf: Path, closed: str) -> None:
    result = shell(f"{STEPGGUF} chat {demo_gguf} -p Hello {ANSWER} {closed}")
    assert result.returncode == 0, result.stderr
    assert (b"Hello! How can I help you?" in result.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_with_nothing_to_ask_and_no_keyboard_it_says_so(demo_gguf: Path) -> None:
    result = shell(f"{STEPGGUF} chat {demo_gguf} <&-")
    assert result.returncode == 2
    assert b"there is nothing to answer" in result.stderr


def test_an_ascii_terminal_gets_what_it_can_show(demo_gguf: Path) -> None:
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb", "NO_COLOR": "1"}
    for command in (*COMMANDS, f"chat {demo_gguf} -p Hello {ANSWER} --thinking full", "convert --help"):
        result = shell(f"{STEPGGUF} {command.format(demo_gguf)}", **plain)
        assert result.returncode == 0, result.stderr
        assert result.stdout.isascii()
        assert result.stderr.isascii()
        assert b"\x1b" not in result.stdout + result.stderr


def test_bytes_that_are_no_text_are_answered_as_far_as_they_are(demo_gguf: Path) -> None:
    result = shell(rf"printf '\xff What is 1 + 1?' | {STEPGGUF} chat {demo_gguf} {ANSWER} --max-tokens 5")
    assert result.returncode == 0, result.stderr
    result = shell(rf"{STEPGGUF} chat {demo_gguf} {ANSWER} --max-tokens 5 -p $'\xff Hello' --json")
    assert result.returncode == 0, result.stderr
