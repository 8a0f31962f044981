"""Interrupted in every way, a conversion ends byte-identical to an uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.convert import pipeline
from stepgguf.convert.journal import RECORD_BYTES
from stepgguf.convert.pipeline import UnitProgress
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.writer import Writer
from stepgguf.errors import CorruptTensor, OutputError, QuantError
from stepgguf.quants.recipe_files import load_recipe
from tests.conftest import INTERRUPTIBLE
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

# Commits are seconds apart in earnest; here they must be frequent for a kill to fall between two of them.
FAST_COMMITS = "import stepgguf.convert.pipeline as p; p.COMMIT_SECONDS = 0.02\n"
COMMAND = FAST_COMMITS + "import sys; from stepgguf.cli.main import main; sys.exit(main(sys.argv[1:]))"


def plan_for(checkpoint: Checkpoint, dest: Path, **options: object) -> Plan:
    return plan_source(checkpoint, dest, Options(load_recipe("Q4_K_M"), name="x", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q4_K_M", "--name", "x", "-q"]) == 0
    return path.read_bytes()


def interrupt_after(n: int) -> pipeline.Progress:
    seen = 0

    def progress(done: UnitProgress) -> None:
        nonlocal seen
        seen += 1
        if seen > n:
            raise KeyboardInterrupt

    return progress


def interrupted(checkpoint: Checkpoint, dest: Path, n: int, **options: object) -> None:
    writer = Writer(plan_for(checkpoint, dest, **options), checkpoint.identity())
    with pytest.raises(KeyboardInterrupt):
        pipeline.make_files(checkpoint, writer, progress=interrupt_after(n))
    writer.close()


@pytest.mark.parametrize("n", [0, 1, 20, 100])
def test_ctrl_c_loses_nothing_that_was_done(small: Path, tmp_path: Path, whole: bytes, n: int) -> None:
    dest = tmp_path / "out.gguf"
    with Checkpoint(small) as checkpoint:
        interrupted(checkpoint, dest, n)
        assert not dest.exists()
        writer = Writer(plan_for(checkpoint, dest), checkpoint.identity())
        assert len(writer.finished) > n
        seen: list[UnitProgress] = []
        pipeline.make_files(checkpoint, writer, progress=seen.append)
    assert sum(done.resumed for done in seen) > n
    assert dest.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "out.gguf.manifest.json"]


@pytest.mark.parametrize("seed", range(25))
def test_a_torn_journal_and_half_written_units_are_redone(small: Path, tmp_path: Path, whole: bytes, seed: int) -> None:
    """What a crash leaves: a journal cut anywhere, and garbage wherever the journal does not vouch for the bytes."""
    rng = random.Random(seed)
    dest, journal, part = (tmp_path / f"out.gguf{suffix}" for suffix in ("", ".journal", ".part"))
    with Checkpoint(small) as checkpoint:
        interrupted(checkpoint, dest, rng.randrange(1, 140))
        content = journal.read_bytes()
        first = content.index(b"\n") + 1
        content = content[: rng.randrange(first - 2, len(content) + 1)]
        records = content[first:]  # the truth: whatever else a damaged journal says is a lie
        n_bytes = len(records) // RECORD_BYTES * RECORD_BYTES
        written = {int.from_bytes(records[i : i + 4], "little") for i in range(0, n_bytes, RECORD_BYTES)}
        if rng.random() < 0.5 and len(content) > first:  # and a flipped bit in what is left
            at = rng.randrange(first, len(content))
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        journal.write_bytes(content)
        plan = plan_for(checkpoint, dest)
        scribble(part, plan, written, rng)
        pipeline.make_files(checkpoint, Writer(plan, checkpoint.identity()))
    assert dest.read_bytes() == whole
    assert main(["verify", str(dest), "-q"]) == 0  # the digests of earlier runs are right too


def scribble(part: Path, plan: Plan, keep: set[int], rng: random.Random) -> None:
    data = np.memmap(part, np.uint8, "r+")
    for number, unit in enumerate(plan.units()):
        file = plan.files[unit.file]
        row_bytes = file.tensors[unit.tensor].row_bytes
        start = len(file.header) + file.offsets[unit.tensor] + unit.start * row_bytes
        if number not in keep:
            data[start : start + min(64, (unit.stop - unit.start) * row_bytes)] = rng.randrange(256)
    data.flush()


def journaled(folder: Path) -> int:
    """Finished units according to the journal in a folder; 0 without one."""
    for journal in folder.glob("*.journal"):
        return len(journal.read_bytes().partition(b"\n")[2]) // RECORD_BYTES
    return 0


def kill_after(command: list[str], folder: Path, units: int, delay: float) -> int:
    """Run a command and SIGKILL it when it has journaled so many more units and a moment has passed."""
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *command], stderr=subprocess.DEVNULL)
    goal = journaled(folder) + units
    while process.poll() is None and journaled(folder) < goal:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.parametrize("split", [[], ["--split-max-size", "30M"]], ids=["whole", "split"])
def test_kill_minus_9_at_random_moments(tmp_path: Path, split: list[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", Shape(n_layer=5, n_dense=3, n_expert=288, n_used=8))
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    command = ["convert", str(checkpoint), "-t", "Q2_K", "-q", "--kernel", "ggml", *split]  # ours is done too soon
    assert main([*command, str(plain / "out.gguf")]) == 0
    rng = random.Random(7)
    command.append(str(killed / "out.gguf"))
    for _ in range(8):  # of about 1,770 units
        before, units = journaled(killed), rng.randrange(1, 200)
        assert kill_after(command, killed, units, rng.uniform(0, 0.05)) == -signal.SIGKILL
        assert journaled(killed) >= before + units  # what was done before the last kill still counts
    assert main(command) == 0
    files = sorted(p.name for p in plain.iterdir())
    assert sorted(p.name for p in killed.iterdir()) == files
    for name in files:
        assert (killed / name).read_bytes() == (plain / name).read_bytes(), name


def test_ctrl_c_in_the_terminal_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", Shape(n_layer=5, n_dense=3, n_expert=288, n_used=8))
    command = [*INTERRUPTIBLE, "convert", str(checkpoint), str(tmp_path / "out.gguf"), "-t", "Q2_K", "--kernel", "ggml"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "out.gguf.journal", time.monotonic() + 60
    while (not journal.exists() or journal.stat().st_size < 4096) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "repeat the command to go on from there" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out.gguf").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming: " in done.stderr
    assert main(["verify", str(tmp_path / "out.gguf"), "-q"]) == 0


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    """It comes while the first module of the command line is imported: the place of a hand that is quick."""
    code = (
        "import builtins, runpy, signal, sys\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest, **named):\n"
        "    if name == 'typer': signal.raise_signal(signal.SIGINT)\n"
        "    return real(name, *rest, **named)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "builtins.__import__ = slow\n"
        "sys.argv = ['stepgguf', '--version']\n"
        "runpy.run_module('stepgguf.__main__', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


CHANGES = {
    "type": (["-t", "Q5_K_M"], "type: Q4_K_M then, Q5_K_M now"),
    "mtp": (["-t", "Q4_K_M", "--mtp", "drop"], "mtp: include then, drop now"),
    "name": (["-t", "Q4_K_M", "--name", "other"], "version, name, chat template or other metadata"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_command_does_not_continue_an_interrupted_one(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: str
) -> None:
    options, text = CHANGES[change]
    dest = tmp_path / "out.gguf"
    with Checkpoint(small) as checkpoint:
        interrupted(checkpoint, dest, 5)
    command = ["convert", str(small), str(dest), "--name", "x", "-q", *options]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(command) == 1
    err = capfd.readouterr().err
    assert text in err
    assert "--restart" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert main([*command, "--restart"]) == 0
    assert dest.exists()


def test_a_changed_source_is_refused(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    dest = tmp_path / "out.gguf"
    with Checkpoint(copy) as checkpoint:
        interrupted(checkpoint, dest, 5)
    with (copy / "model-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with Checkpoint(copy) as checkpoint, pytest.raises(OutputError, match=r"source: model-00002\.safetensors changed"):
        Writer(plan_for(checkpoint, dest), checkpoint.identity())


def test_two_processes_do_not_write_one_file(small: Path, tmp_path: Path) -> None:
    with Checkpoint(small) as checkpoint:
        plan = plan_for(checkpoint, tmp_path / "out.gguf")
        with Writer(plan, checkpoint.identity()) as writer:
            for restart in (False, True):
                with pytest.raises(OutputError, match="another stepgguf is writing it"):
                    Writer(plan, checkpoint.identity(), restart=restart)
            pipeline.make_files(checkpoint, writer)


def test_an_existing_file_is_not_replaced_unasked(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "out.gguf"
    dest.write_text("precious")
    assert main(["convert", str(small), str(dest), "-q"]) == 1
    assert "--overwrite" in capfd.readouterr().err
    assert dest.read_text() == "precious"


def test_too_little_space_is_found_before_the_start(small: Path, tiny_disk: Path) -> None:
    with (tiny_disk / "filler").open("wb") as filler:
        filler.write(bytes(8 * 2**20))
    with Checkpoint(small) as checkpoint:
        plan = plan_for(checkpoint, tiny_disk / "out.gguf")
        with pytest.raises(OutputError, match=r"has 4\.00 MiB free, the output needs 7\.\d\d MiB"):
            Writer(plan, checkpoint.identity())
    assert [p.name for p in tiny_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_on_the_way_can_be_resumed(small: Path, tiny_disk: Path, whole: bytes) -> None:
    dest, filler = tiny_disk / "out.gguf", tiny_disk / "filler"

    def fill(done: UnitProgress) -> None:
        if not filler.exists():
            with filler.open("wb") as file:
                try:
                    while file.write(bytes(65536)):
                        file.flush()
                except OSError:
                    pass

    with Checkpoint(small) as checkpoint:
        writer = Writer(plan_for(checkpoint, dest), checkpoint.identity())
        with pytest.raises(OutputError, match="the disk is full") as caught:
            pipeline.make_files(checkpoint, writer, progress=fill)
        assert "repeat the command; it resumes" in (caught.value.hint or "")
        writer.close()
        assert not dest.exists()
        filler.unlink()
        pipeline.make_files(checkpoint, Writer(plan_for(checkpoint, dest), checkpoint.identity()))
    assert dest.read_bytes() == whole


NOT_FINITE = {
    "nan in an expert": ("blk.3.ffn_up_exps.weight", (4, 200, 17), float("nan"), "expert 4, row 200, column 17 is nan"),
    "inf in a norm": ("blk.1.attn_norm.weight", (9,), float("inf"), "index 9 is inf"),
    "-inf in a matrix": ("blk.0.attn_q.weight", (3, 5), float("-inf"), "row 3, column 5 is -inf"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("type_name", ["Q4_K_M", "BF16"])
def test_values_that_are_not_finite_are_named(small: Path, tmp_path: Path, case: str, type_name: str) -> None:
    name, index, value, text = NOT_FINITE[case]
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    source = change(copy, name, index, value)
    with Checkpoint(copy) as checkpoint:
        writer = Writer(
            plan_source(checkpoint, tmp_path / "o.gguf", Options(load_recipe(type_name))), checkpoint.identity()
        )
        with pytest.raises(CorruptTensor, match=f"{source}: {text}"):
            pipeline.make_files(checkpoint, writer)
        writer.close()
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("kernel", ["lanes", "ggml"])
def test_a_value_that_the_type_cannot_hold_names_its_expert(small: Path, tmp_path: Path, kernel: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    change(copy, "blk.3.ffn_up_exps.weight", (4, 200, 17), 1e30)
    with Checkpoint(copy) as checkpoint:
        options = Options(load_recipe("Q4_K_M"), kernel=kernel)
        writer = Writer(plan_source(checkpoint, tmp_path / "o.gguf", options), checkpoint.identity())
        with pytest.raises(QuantError, match=r"blk\.3\.ffn_up_exps\.weight, expert 4: ") as caught:
            pipeline.make_files(checkpoint, writer)
        assert "recipe" in (caught.value.hint or "")
        writer.close()


def change(checkpoint: Path, name: str, index: tuple[int, ...], value: float) -> str:
    """Set one value of a tensor that is called `name` in GGUFs; returns what the checkpoint calls it."""
    from safetensors.torch import load_file, save_file

    with Checkpoint(checkpoint) as opened:
        source = next(spec.source for spec in opened.specs if spec.name == name)
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if source in tensors:
            tensors[source][index] = value
            save_file(tensors, shard)
    return source
