"""Every command, and every option that takes a path, with every wrong kind of path: one sentence that names it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from stepgguf.cli import output
from stepgguf.cli.main import main
from stepgguf.demo import CHECKPOINT

pytestmark = pytest.mark.slow

SECONDS = 20  # one that waits for a pipe would wait for ever


def write(path: Path, architecture: str, *, tensors: bool, **keys: int) -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in keys.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    if tensors:
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


KINDS: dict[str, Callable[[Path, Path], object]] = {  # each makes the path, given a good file
    "missing": lambda path, good: None,
    "folder": lambda path, good: path.mkdir(),
    "empty": lambda path, good: path.touch(),
    "binary": lambda path, good: path.write_bytes(bytes(range(256)) * 40),
    "text": lambda path, good: path.write_text("hello\n" * 10),
    "zeros": lambda path, good: path.write_bytes(bytes(4096)),
    "utf-16": lambda path, good: path.write_text('default = "Q8_0"\n', encoding="utf-16"),
    "huge": lambda path, good: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
    "pipe": lambda path, good: os.mkfifo(path),
    "device": lambda path, good: path.symlink_to("/dev/zero"),
    "socket": lambda path, good: bind(path),
    "loop": lambda path, good: path.symlink_to(path.name),
    "dangling": lambda path, good: path.symlink_to("nowhere"),
    "cut": lambda path, good: path.write_bytes(good.read_bytes()[:200_000]),
    "other": lambda path, good: write(path, "llama", tensors=True, block_count=1),
    "bare": lambda path, good: write(path, "step35", tensors=False, block_count=1),
    "hollow": lambda path, good: write(path, "step35", tensors=True, block_count=1),
}
NAMES = {"long": "n" * 300 + ".gguf", "split": "x-00003-of-00002.gguf"}

READING: dict[str, list[str]] = {  # @ is the path, GOOD a GGUF, SOURCE a checkpoint, NEW a name that is free
    "convert": ["convert", "@", "NEW", "-t", "F16"],
    "convert --imatrix": ["convert", "SOURCE", "NEW", "-t", "Q4_K_M", "--imatrix", "@"],
    "convert --chat-template": ["convert", "SOURCE", "NEW", "-t", "F16", "--chat-template", "@"],
    "convert --type": ["convert", "SOURCE", "NEW", "--type", "@.toml"],
    "quantize": ["quantize", "@", "NEW", "-t", "Q8_0"],
    "quantize --imatrix": ["quantize", "GOOD", "NEW", "-t", "Q8_0", "--imatrix", "@"],
    "plan": ["plan", "@"],
    "plan --imatrix": ["plan", "SOURCE", "--measure", "--imatrix", "@"],
    "inspect": ["inspect", "@"],
    "verify": ["verify", "@"],
    "verify --against": ["verify", "GOOD", "--against", "@"],
    "report": ["report", "@"],
    "template": ["template", "@"],
    "template NEW": ["template", "GOOD", "@"],
    "chat": ["chat", "@", "-p", "Hello"],
    "chat --mtp-file": ["chat", "GOOD", "-p", "Hello", "--mtp-file", "@"],
    "serve": ["serve", "@", "--port", "0"],
    "serve --mtp-file": ["serve", "GOOD", "--port", "0", "--mtp-file", "@"],
    "doctor": ["doctor", "@"],
    "doctor --mtp-file": ["doctor", "GOOD", "--mtp-file", "@"],
    "bench": ["bench", "@"],
    "bench --mtp-file": ["bench", "GOOD", "--mtp-file", "@"],
}
WRITING: dict[str, list[str]] = {
    "convert": ["convert", "SOURCE", "@", "-t", "F16"],
    "quantize": ["quantize", "GOOD", "@", "-t", "Q8_0"],
    "chat --cache-folder": ["chat", "GOOD", "-p", "Hello", "--cache-folder", "@"],
    "serve --cache-folder": ["serve", "GOOD", "--port", "0", "--cache-folder", "@"],
    "demo --keep": ["demo", "--type", "BF16", "--keep", "@"],
}
SHOWS = {("inspect", "other"), *((command, kind) for command in ("inspect", "report") for kind in ("bare", "hollow"))}


@contextmanager
def no_waiting() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], demo_gguf: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs a command line with a path in it. Exit code and all that it printed, as one line."""
    monkeypatch.setattr(output.stderr, "_width", 500)
    monkeypatch.setenv("COLUMNS", "500")

    def run(command: list[str], path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        good = tmp_path / "good.gguf"
        if "template" in command and not good.exists():
            shutil.copyfile(demo_gguf, good)  # it would be changed
        words = {"GOOD": str(good if good.exists() else demo_gguf), "SOURCE": str(CHECKPOINT)}
        words |= {"NEW": str(tmp_path / "new.gguf"), "@": str(path), "@.toml": str(path.with_suffix(".toml"))}
        with no_waiting():
            code = main([words.get(word, word) for word in command])
        captured = capfd.readouterr()
        return code, " ".join((captured.err + captured.out).split())

    return run


def is_named(path: Path, text: str) -> bool:
    """Boxes of wrong usage break long names in the middle."""
    text = text.replace(" ", "").replace("│", "")
    return str(path) in text or (len(str(path)) > 80 and str(path.with_suffix(""))[:70] in text)  # long ones are cut


def made(kind: str, tmp_path: Path, good: Path, suffix: str = ".gguf") -> Path:
    if kind in NAMES:
        return (tmp_path / NAMES[kind]).with_suffix(suffix)
    path = tmp_path / f"{kind}{suffix}"
    KINDS[kind](path, good)
    return path


@pytest.mark.parametrize("kind", [*KINDS, *NAMES])
@pytest.mark.parametrize("command", READING)
def test_a_path_that_cannot_be_read_is_named_in_one_sentence(
    run: Callable[[list[str], Path], tuple[int, str]], command: str, kind: str, tmp_path: Path, demo_gguf: Path
) -> None:
    path = made(kind, tmp_path, demo_gguf, ".toml" if command == "convert --type" else ".gguf")
    before = sorted(tmp_path.iterdir())
    code, text = run(READING[command], path)
    if (command, kind) in SHOWS:
        assert code == 0
        return
    assert code in (1, 2)
    assert is_named(path, text), text
    left = set(tmp_path.iterdir()) - {*before, tmp_path / "good.gguf"}
    assert not left, "nothing is left behind"


@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "long", "below"])
@pytest.mark.parametrize("command", WRITING)
def test_a_path_that_cannot_be_written_is_named_in_one_sentence(
    run: Callable[[list[str], Path], tuple[int, str]], command: str, kind: str, tmp_path: Path, demo_gguf: Path
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.gguf" if kind == "below" else made(kind, tmp_path, demo_gguf)
    before = sorted(tmp_path.iterdir())
    code, text = run(WRITING[command], path)
    assert code in (1, 2)
    assert is_named(path, text) or is_named(path.parent, text), text
    assert sorted(tmp_path.iterdir()) == before
    assert not any(p.is_file() for p in before if p.name != "file"), "nothing is put in their place"
