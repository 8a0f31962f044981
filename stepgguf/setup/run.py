"""Running a command of pip's or uv's: every line of its output goes into a log, and to whoever shows progress.

The command gets a process group of its own. When it is not to go on (Ctrl+C, a terminal that is closed) the whole group
is asked to end, then made to: pip, CMake, ninja and compilers. What they write that is temporary goes into one folder,
which is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from stepgguf.errors import SetupError
from stepgguf.setup.output import find_causes
from stepgguf.setup.plan import Step

_GRACE_SECONDS = 10.0  # for pip to remove what it has unpacked


def run_step(step: Step, log: Path, on_line: Callable[[str], None]) -> None:
    """Run a step and append to the log. SetupError shows what its output says of why it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8", buffering=1) as file, TemporaryDirectory(prefix="stepgguf-setup-") as folder:
        file.write(f"$ {step}\n")
        begin = file.tell()
        code = _run(step, {**os.environ, **step.environment, "TMPDIR": folder}, file.write, on_line)
        if code == 0:
            return
        file.seek(begin)
        causes = "".join(f"\n  {line}" for line in find_causes(file))
    raise SetupError(f"{step.title} failed:{causes}", hint=f"All of its output is in {log}.")


def _run(
    step: Step, environment: dict[str, str], write: Callable[[str], object], on_line: Callable[[str], None]
) -> int:
    """Run the command to its end, and return its exit code."""
    child = subprocess.Popen(
        step.command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    with child, _ended_by_signals():
        try:
            for line in child.stdout or ():
                write(line)
                on_line(line)
        except BaseException:
            _end(child)
            raise
    return child.returncode


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, a signal that would end this process is an exception, as Ctrl+C is, so that its children end too."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    numbers = (n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN)  # nohup
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[str]) -> None:
    """End the group of processes, and wait until none of them is left."""
    try:
        os.killpg(child.pid, signal.SIGINT)
        child.wait(_GRACE_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
