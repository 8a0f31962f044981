"""Odd files with other endings than test_wrong_paths.py gives them, and where the program keeps its own: journal, part,
manifest. None hangs, takes the memory or shows a traceback.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KINDS = ("folder", "fifo", "device", "binary", "nul", "utf-16", "loop", "unreadable", "huge")


def make(kind: str, folder: Path, suffix: str) -> Path:
    path = folder / f"x{suffix}"
    makers: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "binary": lambda: path.write_bytes(bytes(range(256)) * 40),
        "nul": lambda: path.write_bytes(bytes(4096)),
        "utf-16": lambda: path.write_text('default = "Q8_0"\n', encoding="utf-16"),
        "loop": lambda: path.symlink_to(path),
        "unreadable": lambda: (path.write_text('default = "Q8_0"\n'), path.chmod(0)),
        "huge": lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
    }
    makers[kind]()
    return path


COMMANDS = {
    "convert --imatrix .dat": ("convert {small} {out} -t Q4_K_M --imatrix {odd}", ".dat"),
    "convert --type": ("convert {small} {out} -t {odd}", ".toml"),
    "convert --chat-template": ("convert {small} {out} -t Q8_0 --chat-template {odd}", ".jinja"),
    "plan --types": ("plan {small} -m spark --types {odd}", ".toml"),
    "quantize SRC": ("quantize {odd} {out} -t Q8_0", ".gguf"),
    "verify, manifest": ("verify {copy}", ".gguf.manifest.json"),
    "convert, journal": ("convert {small} {folder}/x.gguf -t Q8_0", ".gguf.journal"),
    "convert, part": ("convert {small} {folder}/x.gguf -t Q8_0", ".gguf.part"),
}


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stepgguf.cli.main import main

    path = tmp_path_factory.mktemp("odd") / "whole.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "-q"]) == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_kind_of_file_gets_an_answer(command: str, small: Path, whole: Path, tmp_path: Path) -> None:
    """All kinds in one process, since starting one takes longer than an answer."""
    line, suffix = COMMANDS[command]
    calls = []
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        odd = make(kind, folder, suffix)
        copy = folder / "x.gguf"
        if "{copy}" in line:
            shutil.copy(whole, copy)
        calls.append(line.format(small=small, out=folder / "o.gguf", odd=odd, whole=whole, copy=copy, folder=folder))
    code = (
        "import sys\nfrom stepgguf.cli.main import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    words = line.split()\n"
        "    code = main(words if words[0] == 'plan' else [*words, '-q'])\n"
        "    print('CODE', code, line, file=sys.stderr, flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(calls), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    codes = [line for line in result.stderr.splitlines() if line.startswith("CODE")]
    assert len(codes) == len(KINDS), result.stderr[-3000:]
    expected = ("CODE 0 ", "CODE 1 ") if command in ("convert, journal", "convert, part") else ("CODE 1 ", "CODE 2 ")
    readable = os.getuid() == 0  # root reads what nobody may
    for kind, found in zip(KINDS, codes, strict=True):
        if kind == "unreadable" and readable:
            continue
        assert found.startswith(expected), f"{kind}: {result.stderr[-3000:]}"
