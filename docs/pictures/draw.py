"""Draws the README's pictures from the real programs: a chat in a terminal, and a report in a browser.

    pip install pyte && python docs/pictures/draw.py

A terminal emulator (pyte) reads what `stepgguf chat` writes to a pseudo-terminal, and rich draws its last screen. The
report is photographed by chromium.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from stepgguf.demo import CHECKPOINT

HERE = Path(__file__).parent
COLUMNS, ROWS = 96, 22
QUESTIONS = ("How many 'r's are in the word strawberry?", "What is 347 + 286?")
NAME = "The embedded model"
STEPGGUF = [sys.executable, "-m", "stepgguf"]
WINDOW = "1280,780"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, report = Path(folder, "step.gguf"), Path(folder, "step.html")
        subprocess.run([*STEPGGUF, "convert", CHECKPOINT, model, "--type", "Q4_K_M", "--name", NAME, "-q"], check=True)
        draw_screen(chat(model), HERE / "chat.svg", "stepgguf chat step.gguf --thinking full")
        subprocess.run([*STEPGGUF, "report", model, "-o", report], check=True)
        photograph(report, HERE / "report.png")


def chat(model: Path) -> pyte.Screen:
    """The screen after both questions were answered."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    command = [*STEPGGUF, "chat", str(model), "--thinking", "full"]
    pid, terminal = pty.fork()
    if pid == 0:
        variables = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_DATA_HOME": str(model.parent)}
        os.execve(command[0], command, {**os.environ, **variables})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    for question in QUESTIONS:
        _read_until_quiet(terminal, stream)
        os.write(terminal, f"{question}\r".encode())
    _read_until_quiet(terminal, stream)
    os.close(terminal)
    os.waitpid(pid, 0)
    return screen


def _read_until_quiet(terminal: int, stream: pyte.ByteStream, seconds: float = 6.0) -> None:
    last = time.monotonic()
    while time.monotonic() - last < seconds:
        if select.select([terminal], [], [], 0.1)[0]:
            data = os.read(terminal, 65536)
            stream.feed(data)
            last = time.monotonic()


def draw_screen(screen: pyte.Screen, path: Path, title: str) -> None:
    """Draw a terminal's screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    for row in range(screen.cursor.y):
        line = Text()
        for style, cells in groupby((screen.buffer[row][column] for column in range(COLUMNS)), _style):
            line.append("".join(cell.data for cell in cells), style)
        line.rstrip()
        console.print(line)
    console.save_svg(str(path), title=title)


def _style(cell: pyte.screens.Char) -> Style:
    color = None if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg
    return Style(color=color, bold=cell.bold, italic=cell.italics, dim=cell.italics)


def photograph(page: Path, path: Path) -> None:
    """Save what chromium shows of a page as a PNG."""
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}"]
    subprocess.run(["chromium", *options, f"--screenshot={path}", page.as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
