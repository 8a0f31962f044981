"""Progress: rate and time left are those of this run, whatever an earlier one did and however long a compiler took."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from rich.console import Console

from stepgguf.cli import output, progress, stream_progress
from stepgguf.cli.progress import ProgressMeter
from stepgguf.cli.stream_progress import StreamMeter
from stepgguf.reference.stream import LayerProgress

MB = 10**6


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    # Not time.monotonic itself: the event loops of servers that run in this process would sleep by this clock.
    for module in (progress, stream_progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 1.0)
    return clock  # type: ignore[return-value]


def at(clock: Clock, now: float, meter: ProgressMeter, n_bytes: int, *, earlier: bool = False) -> None:
    clock.now = 100.0 + now
    meter.add_bytes(n_bytes, earlier=earlier)


def test_what_an_earlier_run_did_and_the_compiler_count_for_nothing(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with ProgressMeter("x", 10_000 * MB) as meter:
        at(clock, 0.0, meter, 5_000 * MB, earlier=True)
        clock.now = 101.0
        meter.note_compiling("Q4_K")
        clock.now = 110.0
        meter.note_compiling("Q6_K")
        at(clock, 30.0, meter, 100 * MB)  # the first of this run: the clock starts
        at(clock, 32.0, meter, 100 * MB)
        at(clock, 34.0, meter, 100 * MB)
    lines = [line for line in capfd.readouterr().err.splitlines() if "left" in line]
    assert [re.sub(r"^x: | of .*?,", "", line) for line in lines] == [
        "52% 50 MB/s, 1:36 left",
        "53% 50 MB/s, 1:34 left",
    ]
    assert (meter.bytes_resumed, meter.compile_seconds) == (5_000 * MB, 29.0)


def test_a_kernel_that_is_compiled_on_the_way_stops_the_clock(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressMeter("x", 1_000 * MB) as meter:
        at(clock, 0.0, meter, 100 * MB)
        at(clock, 1.0, meter, 100 * MB)
        clock.now = 101.0
        meter.note_compiling("Q4_K")
        at(clock, 60.0, meter, 100 * MB)
        at(clock, 61.0, meter, 100 * MB)
    assert {line.split(", ")[1] for line in capfd.readouterr().err.splitlines() if "left" in line} == {"100 MB/s"}


def test_what_is_counted_has_a_share_and_a_time_left(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.CountMeter("x.gguf", 4_000, "predictions") as meter:
        for now in (100.5, 110.0, 110.5, 130.0):
            clock.now = now
            meter.add(500)
    assert capfd.readouterr().err.splitlines() == [
        "x.gguf: 25% of 4,000 predictions, 0:30 left",
        "x.gguf: 50% of 4,000 predictions, 0:30 left",
    ]
    with progress.CountMeter("x.gguf", 10, "predictions", quiet=True) as meter:
        clock.now = 200.0
        meter.add(5)
    assert capfd.readouterr().err == ""


def test_the_live_line_has_no_rate_before_this_run_made_something(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "stderr", Console(file=io.StringIO(), force_terminal=True))
    with ProgressMeter("x", 1_000 * MB) as meter:
        at(clock, 0.0, meter, 500 * MB, earlier=True)
        assert meter.live is not None
        [task] = meter.live.tasks
        assert (task.completed, task.speed, task.time_remaining) == (500 * MB, None, None)
        at(clock, 1.0, meter, 100 * MB)
        assert (task.completed, task.time_remaining) == (600 * MB, None)


def test_a_streams_time_left_is_by_what_this_run_did(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with StreamMeter("x") as meter:
        meter.show(LayerProgress(2, 4_000, 10_000, 4_000))  # layers 0 to 2 were done before
        for seconds, layer, done in ((10, 3, 5_000), (12, 3, 5_100), (20, None, 6_000)):  # the second is too soon
            clock.now = 100.0 + seconds
            meter.show(LayerProgress(layer, done, 10_000, 4_000))
        meter.restart()
        clock.now = 3800.0
        meter.show(LayerProgress(0, 5_000, 10_000, 0))
    assert capfd.readouterr().err.splitlines() == [
        "x: layer 3, 50%, 0:50 left",
        "x: head, 60%, 0:40 left",
        "x: layer 0, 50%, 1:01:20 left",
    ]
