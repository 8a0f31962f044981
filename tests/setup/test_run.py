"""Running the steps: the log, what a failure says, and what is left when a run is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepgguf.errors import SetupError
from stepgguf.setup.plan import Step
from stepgguf.setup.run import run_step


def shell(script: str, **environment: str) -> Step:
    return Step("building it", ("sh", "-c", script), environment)


def test_all_output_is_shown_and_logged_and_temporary_files_are_removed(tmp_path: Path) -> None:
    log, shown = tmp_path / "new" / "log", list[str]()
    run_step(
        shell('echo $CMAKE_ARGS; echo oops >&2; touch "$TMPDIR/x"; echo $TMPDIR', CMAKE_ARGS="-DA=b"), log, shown.append
    )
    run_step(shell("echo again"), log, shown.append)
    assert shown[:2] + shown[3:] == ["-DA=b\n", "oops\n", "again\n"]
    assert not Path(shown[2].strip()).exists()
    text = log.read_text()
    assert [line for line in text.splitlines(keepends=True) if not line.startswith("$ ")] == shown
    assert text.startswith("$ CMAKE_ARGS=-DA=b sh -c ")


def test_a_failure_shows_the_cause_of_this_step_and_where_the_rest_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_step(shell("echo 'x.c:1: error: of a step before'"), log, lambda line: None)
    with pytest.raises(SetupError) as caught:
        run_step(shell("echo '  x.c:2:3: error: unknown type'; echo rest; exit 1"), log, lambda line: None)
    assert caught.value.message == "building it failed:\n  x.c:2:3: error: unknown type"
    assert str(log) in (caught.value.hint or "")


TREE = """
import sys
from pathlib import Path
from stepgguf.setup.plan import Step
from stepgguf.setup.run import run_step
step = Step("", ("sh", "-c", "echo $$; sleep 600 & echo $!; wait"))
run_step(step, Path(sys.argv[1]), lambda line: print(line, end="", flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_that_is_ended_ends_what_it_started(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TREE, str(tmp_path / "log")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:  # fmt: skip
        assert run.stdout is not None
        started = [int(run.stdout.readline()) for _ in range(2)]
        run.send_signal(number)
        assert run.wait(15) == code
    deadline = time.monotonic() + 5
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, started))
    assert os.listdir(tmp_path) == ["log"]


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and is not waited for."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(shown.strip()) and not shown.startswith("Z")
