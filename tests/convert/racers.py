"""Two processes that make the same file, one of them held up at a named place: run as a program by test_races.py.

    python -m tests.convert.racers SRC FOLDER PAIRS

Processes are forked here, where everything is imported and no thread runs, so that a pair takes a moment. One line of
JSON for each pair: the place, exit codes and error texts of both, and what lies in the folder then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepgguf.cli.main import main
from stepgguf.convert import journal, manifest, pipeline, writer
from stepgguf.files import disk

# Where a process can be held up: before the call, or after it.
PLACES: dict[str, tuple[Any, str]] = {
    "hold": (writer.Writer, "_hold"),
    "flock": (disk.fcntl, "flock"),
    "same file": (disk, "is_at"),
    "resume": (writer.Writer, "_resume"),
    "refuse": (writer.Writer, "_refuse_existing"),
    "space": (writer.Writer, "_check_space"),
    "clear": (writer.Writer, "_clear"),
    "open": (writer.Writer, "_open"),
    "write": (writer.Writer, "write"),
    "commit": (writer.Writer, "commit"),
    "finish": (writer.Writer, "finish"),
    "manifest": (manifest, "write_manifest"),
    "rename": (Path, "replace"),
    "remove the journal": (journal.Journal, "remove"),
    "let go": (writer, "_let_go"),
}
SECONDS = 60.0


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.001)


def pause(place: str, when: str, folder: Path) -> None:
    """Make this process stop at its first visit of the place until `folder`/go is there; `folder`/at tells of it."""
    owner, name = PLACES[place]
    call: Callable[..., Any] = getattr(owner, name)

    def stop() -> None:
        setattr(owner, name, call)
        (folder / "at").touch()
        wait_for(folder / "go")

    def paused(*args: Any, **options: Any) -> Any:
        if when == "before":
            stop()
        result = call(*args, **options)
        if when == "after":
            stop()
        return result

    setattr(owner, name, paused)


def start(arguments: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """A process that runs a command; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        pipeline.COMMIT_SECONDS = 0.0
        prepare()
        code = main(arguments)
    finally:
        os._exit(code)


def finished(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pair(arguments: list[str], folder: Path, place: tuple[str, str] | None) -> dict[str, Any]:
    """One process held up at the place while another runs; or, without a place, two at once."""
    out = folder / "out"
    out.mkdir(parents=True)
    command = [*arguments, str(out / "x.gguf")]
    logs = [folder / "a", folder / "b"]
    if place is None:
        children = [start(command, log, lambda: wait_for(folder / "go")) for log in logs]
        (folder / "go").touch()
        codes = [finished(child) for child in children]
    else:
        first = start(command, logs[0], lambda: pause(*place, folder))
        wait_for(folder / "at")
        second = finished(start(command, logs[1], lambda: None))
        (folder / "go").touch()
        codes = [finished(first), second]
    return {
        "place": place,
        "codes": codes,
        "errors": [log.read_text() for log in logs],
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())},
    }


if __name__ == "__main__":
    source, target, n_pairs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    convert = ["convert", source, "-t", "BF16", "--name", "x", "-q"]
    everywhere = [(place, when) for place in PLACES for when in ("before", "after")]
    for number, where in enumerate([*everywhere, *[None] * n_pairs]):
        print(json.dumps(pair(convert, target / str(number), where)), flush=True)
