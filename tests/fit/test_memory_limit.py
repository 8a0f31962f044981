"""The promise kept under a real limit of the kernel's: at the planned limit a load runs, below it nothing is loaded.

A memory cgroup is made for it, which takes root, or a part of the tree that was left to this user.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.fit.capacity import check_memory
from stepgguf.fit.machine import probe_machine
from stepgguf.fit.memory import ContextParams, memory_budget, memory_need
from stepgguf.fit.model_file import ModelFile, read_model_file
from stepgguf.runtime.llama_build import probe_build
from tests.generate import Shape, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Linux has cgroups")]

# What bench makes of these options: no kept conversations, and a context for depth, prompt and answers.
BENCH = ["bench", "--no-mmap", "--depths", "0", "--batches", "1", "-n", "8", "-r", "1", "--threads", "1"]
CONTEXT = ContextParams(512 + 2 * 8 + 64, cache_ram=0)


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup of v1 or v2. Files: the limit, and a text with the number of processes that it has killed."""

    folder: Path
    limit: str
    events: str

    def set_limit(self, n_bytes: int) -> None:
        (self.folder / self.limit).write_text(str(n_bytes))

    @property
    def n_killed(self) -> int:
        found = re.search(r"^oom_kill (\d+)$", (self.folder / self.events).read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


@dataclass(frozen=True)
class Ended:
    """How a command ended. peak: its largest resident size, in bytes."""

    code: int
    error: str
    peak: int


def make_cgroup(name: str) -> Cgroup | None:
    """A group below this process's own, or at the top; None where it cannot be had."""
    for tree, pattern, files in (
        ("memory", r"^\d+:memory:/(.*)$", ("memory.limit_in_bytes", "memory.oom_control")),
        ("", r"^0::/(.*)$", ("memory.max", "memory.events")),
    ):
        own = re.search(pattern, Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        for parent in (own[1], "") if own else ():
            folder = Path("/sys/fs/cgroup", tree, parent, name)
            with suppress(OSError):
                folder.mkdir()
                if all((folder / file).exists() for file in files):
                    return Cgroup(folder, *files)
                folder.rmdir()
    return None


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    group = make_cgroup(f"stepgguf-test-{os.getpid()}")
    if group is None:
        pytest.skip("no memory cgroup can be made here: that takes root, or a delegated one")
    yield group
    group.folder.rmdir()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """288 experts in each of two layers: 0.22 GiB in BF16."""
    folder = tmp_path_factory.mktemp("limit")
    checkpoint = write_checkpoint(folder / "checkpoint", Shape(n_layer=4, n_mtp=3, n_expert=288, n_used=8))
    assert main(["convert", str(checkpoint), str(folder / "bf16.gguf"), "-t", "BF16", "-q"]) == 0
    return read_model_file(folder / "bf16.gguf", command="bench")


# Runs a command and prints the largest resident size of it in kB. A process of its own, because a child begins with
# its parent's figure, and that of the tests is large.
_MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_inside(group: Cgroup, arguments: list[str]) -> Ended:
    """Run stepgguf in a cgroup."""
    enter = f'echo $$ > "{group.folder}/cgroup.procs" && exec "$0" "$@"'
    measured = [sys.executable, "-c", _MEASURE, sys.executable, "-m", "stepgguf", *arguments]
    result = subprocess.run(["/bin/sh", "-c", enter, *measured], capture_output=True, text=True, check=False)
    return Ended(result.returncode, result.stderr, int(result.stdout) * 1024)


def planned_limit(model: ModelFile) -> int:
    """The least memory of a container in which doctor says that the model fits."""
    machine, needed = probe_machine(), memory_need(model.footprint, CONTEXT).total
    page = os.sysconf("SC_PAGE_SIZE")
    for limit in range(needed // page * page, 2 * needed + 2**30, 256 * page):
        if memory_budget(replace(machine, container_limit=limit)).ceiling >= needed:
            return limit
    raise AssertionError("no limit is large enough")


def test_at_the_planned_limit_it_runs_and_below_it_is_refused_with_nothing_loaded(
    cgroup: Cgroup, model: ModelFile
) -> None:
    limit, weights = planned_limit(model), model.footprint.weights
    cgroup.set_limit(limit)
    ran = run_inside(cgroup, [*BENCH, str(model.path)])
    assert (ran.code, cgroup.n_killed) == (0, 0), ran.error
    assert weights < ran.peak <= limit, "the weights were read into memory"

    less = int(0.9 * limit) // 4096 * 4096
    cgroup.set_limit(less)
    refused = run_inside(cgroup, [*BENCH, str(model.path)])
    finding = check_memory(replace(probe_machine(), container_limit=less), probe_build(), model, CONTEXT)
    assert finding.level == "fail"
    assert (refused.code, cgroup.n_killed) == (1, 0)
    assert f"error: {model.path}: {finding.message}" in refused.error
    assert refused.peak < weights / 2
