"""Two processes that make the same file, one of them held up or killed at a named place: a program of test_races.py.

    python -m tests.convert.racers SRC FOLDER PAIRS

Processes are forked here, where everything is imported and no thread runs, so that a pair takes a moment. One line of
JSON for each pair: what befell the first and where, exit codes and error texts of both, what lies in the folder then.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
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
    "write": (writer.Writer, "write_unit"),
    "commit": (writer.Writer, "commit"),
    "finish": (writer.Writer, "finish"),
    "manifest": (manifest, "write_manifest"),
    "rename": (Path, "replace"),
    "remove the journal": (journal.Journal, "remove"),
    "let go": (disk, "release"),
}
# Before each place; and after those behind which no other place follows at once.
MOMENTS = [*((place, "before") for place in PLACES)]
MOMENTS += [(place, "after") for place in ("flock", "open", "write", "rename", "remove the journal", "let go")]
# Visits at which a process is killed: renames are those of two manifests and of two files.
KILLED = [(*moment, 1) for moment in MOMENTS]
KILLED += [("write", "before", 5), ("commit", "after", 2), *(("rename", "after", visit) for visit in (2, 3, 4))]
SPLIT = "3M"  # two files
LOGS = ("first", "second")
SECONDS = 60.0


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.001)


def at(place: str, when: str, visit: int, do: Callable[[], None]) -> None:
    """Make this process do something before or after a visit of the place, counted from 1."""
    owner, name = PLACES[place]
    call: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        number = seen
        if when == "before" and number == visit:
            do()
        result = call(*args, **options)
        if when == "after" and number == visit:
            do()
        return result

    setattr(owner, name, watched)


def pause(folder: Path) -> None:
    """Stop until `folder`/go is there; `folder`/at tells of it."""
    (folder / "at").touch()
    wait_for(folder / "go")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


def race(command: list[str], folder: Path) -> list[int]:
    """Two at once."""
    children = [start(command, folder / log, lambda: wait_for(folder / "go")) for log in LOGS]
    (folder / "go").touch()
    return [finished(child) for child in children]


def hold_up(command: list[str], folder: Path, place: str, when: str) -> list[int]:
    """The second runs while the first is held up at its first visit of the place."""
    first = start(command, folder / LOGS[0], lambda: at(place, when, 1, lambda: pause(folder)))
    wait_for(folder / "at")
    second = finished(start(command, folder / LOGS[1], lambda: None))
    (folder / "go").touch()
    return [finished(first), second]


def kill(command: list[str], folder: Path, place: str, when: str, visit: int) -> list[int]:
    """The second runs after the first was killed at the place."""
    return [finished(start(command, folder / LOGS[0], lambda: at(place, when, visit, die))),
            finished(start(command, folder / LOGS[1], lambda: None))]  # fmt: skip


def pair(happening: Callable[..., list[int]], arguments: list[str], folder: Path, *where: str | int) -> dict[str, Any]:
    out = folder / "out"
    out.mkdir(parents=True)
    codes = happening([*arguments, str(out / "x.gguf")], folder, *where)
    return {
        "what": [happening.__name__, *where],
        "codes": codes,
        "errors": [(folder / log).read_text() for log in LOGS],
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())},
    }


if __name__ == "__main__":
    source, target, n_pairs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    convert = ["convert", source, "-t", "BF16", "--name", "x", "-q"]
    split = [*convert, "--split-max-size", SPLIT]
    jobs: list[tuple[Any, ...]] = [
        *((race, convert) for _ in range(n_pairs)),
        *((hold_up, convert, *moment) for moment in MOMENTS),
        *((kill, split, *moment) for moment in KILLED),
    ]
    for number, (happening, arguments, *where) in enumerate(jobs):
        outcome = pair(happening, arguments, target / str(number), *where)
        sys.stdout.write(json.dumps(outcome) + "\n")
