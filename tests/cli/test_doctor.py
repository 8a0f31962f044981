"""stepgguf doctor: on this machine for real, and on machines of each kind with the real model's header."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stepgguf.cli.doctor import doctor, examine, lines
from stepgguf.cli.loading import maps
from stepgguf.cli.main import main
from stepgguf.files import folders
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.capacity import Finding, Model, read_model
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.fit.memory import LINUX_RESERVE, Context, need
from stepgguf.runtime.llama_build import Gpu, LlamaBuild
from tests.fit.test_memory import write_real

app = typer.Typer()
app.command("doctor")(doctor)

LINUX = Machine("Linux", "x86_64", "AMD EPYC", 16, 16, frozenset({"avx2"}), 256 * GIB, 250 * GIB, 0)
SPARK = replace(LINUX, cpu="aarch64", ram=127600748 << 10, ram_available=118566368 << 10,
                gpus=(Gpu("NVIDIA GB10", None, None),))  # fmt: skip
MAC = replace(LINUX, system="Darwin", cpu="Apple M1 Ultra", ram=128 * GIB, ram_available=118 * GIB, wired_limit=0)
STRIX = replace(LINUX, cpu="AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", ram=130966528 << 10, ram_available=121 * GIB,
                amd=AmdMemory(GIB // 2, 63968 << 20))  # fmt: skip
CARD = replace(LINUX, gpus=(Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),))

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)

CPU_BUILD = LlamaBuild("0.3.36", frozenset({"AVX2"}), gpu_offload=False, gpus=(), mtp=True, compiler=("GCC", (12, 2)))
CUDA_BUILD = replace(CPU_BUILD, gpu_offload=True, gpus=(Gpu("NVIDIA", 80 * GIB, 79 * GIB),))


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(write_real(tmp_path_factory.mktemp("real")))


@pytest.fixture(scope="module")
def small_gguf(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "small.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "-q"]) == 0
    return path


def findings(
    machine: Machine, build: LlamaBuild | None, model: Model | None = None, n_ctx: int = 32768
) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(machine, build, model, Context(n_ctx))}


def fix(finding: Finding) -> str:
    assert finding.fix is not None
    return finding.fix


# on this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_runs_a_small_model(small_gguf: Path) -> None:
    result = CliRunner().invoke(app, [str(small_gguf)])
    assert result.exit_code == 0, result.output
    assert re.search(rf"^ok    file       {re.escape(str(small_gguf))}: .* MiB, 8 blocks$", result.output, re.MULTILINE)
    assert re.search(r"^ok    memory     .* = .* weights \+ .* KV cache for 4,096 tokens", result.output, re.MULTILINE)


def test_json_says_the_same(small_gguf: Path) -> None:
    result = CliRunner().invoke(app, [str(small_gguf), "--ctx", "1000", "--parallel", "2", "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    assert {"machine", "engine", "file", "memory"} <= {finding["subject"] for finding in report["findings"]}
    # 2 full layers of 1024 cells and 3 sliding ones of 32 x 2 + 512, padded: 768; 2 heads x 64, K and V, F16
    assert report["need"]["kv"] == (2 * 1024 + 3 * 768) * 2 * 2 * 64 * 2
    assert report["machine"]["ram"] > 0


def test_without_a_file_it_looks_at_the_machine_alone() -> None:
    subjects = {finding["subject"] for finding in json.loads(CliRunner().invoke(app, ["--json"]).stdout)["findings"]}
    assert {"machine", "engine"} <= subjects
    assert not {"file", "memory"} & subjects


def test_it_says_where_sessions_and_caches_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "data", lambda: tmp_path / "d" / "stepgguf")
    monkeypatch.setattr(folders, "cache", lambda: tmp_path / "c" / "stepgguf")
    output = CliRunner().invoke(app, []).output
    assert f"sessions and what was typed in {tmp_path}/d/stepgguf; " in output
    assert f"kernels and measured errors in {tmp_path}/c/stepgguf" in output
    assert not list(tmp_path.iterdir()), "it only looks"


@pytest.mark.parametrize("n_bytes", [1000, 100_000])
def test_a_file_that_is_still_being_downloaded_fails(small_gguf: Path, tmp_path: Path, n_bytes: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(small_gguf.read_bytes()[:n_bytes])
    result = CliRunner().invoke(app, [str(tmp_path / "cut.gguf")])
    assert result.exit_code == 1
    assert re.search(r"^fail  file .*\n +(Make or download|The download)", result.output, re.MULTILINE)


def test_a_file_that_is_no_model_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [__file__, "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]


def test_without_llama_cpp_python_it_says_how_to_get_it(small_gguf: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\nimport typer\nfrom stepgguf.cli.doctor import doctor\n"
        "app = typer.Typer(); app.command()(doctor); app()"
    )
    command = [sys.executable, "-c", code, str(small_gguf)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search(
        r"^fail  engine     llama-cpp-python is not installed\n {17}\S.*pip install .*\[run\]'$", result.stdout, re.M
    )
    assert "ok    memory" in result.stdout


def test_a_file_of_mtp_blocks_alone_is_no_model(small: Path, tmp_path: Path) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "F16", "--mtp", "separate", "-q"]) == 0
    trunk, heads = sorted(tmp_path.glob("*.gguf"), key=lambda path: -path.stat().st_size)
    result = CliRunner().invoke(app, [str(heads)])
    assert result.exit_code == 1
    assert "holds no trunk, only MTP blocks" in result.output
    result = CliRunner().invoke(app, [str(trunk)])
    assert result.exit_code == 0
    assert f"8 blocks, those of {heads} included" in result.output
    heads.rename(tmp_path / "elsewhere.gguf")
    result = CliRunner().invoke(app, [str(trunk)])
    assert result.exit_code == 0
    assert "--mtp include" in result.output
    result = CliRunner().invoke(app, [str(trunk), "--mtp-file", str(tmp_path / "elsewhere.gguf")])
    assert "8 blocks, those of" in result.output
    result = CliRunner().invoke(app, [str(trunk), "--mtp-file", str(trunk)])
    assert (result.exit_code, "holds no MTP blocks" in result.output) == (1, True)


# the fixes fix ------------------------------------------------------------------------------------------------------


def test_a_spark_holds_the_model_and_reads_it_without_mmap(flash: Model) -> None:
    found = findings(SPARK, CUDA_BUILD, flash)
    assert found["memory"].level == "ok"
    assert "shared by CPU and GPU" in found["machine"].message
    assert (found["mmap"].level, "read and not mapped" in found["mmap"].message) == ("ok", True)
    assert (maps(SPARK, None), maps(SPARK, True), maps(LINUX, None), maps(LINUX, False)) == (False, True, True, False)
    assert "mmap" not in findings(LINUX, CPU_BUILD, flash)


def test_what_other_programs_hold_is_a_warning(flash: Model) -> None:
    found = findings(replace(SPARK, ram_available=90 * GIB, swap=16 * GIB), CUDA_BUILD, flash)
    assert found["memory"].level == "warn"
    assert "only 90.0 GiB is free now" in found["memory"].message
    assert fix(found["swap"]) == "sudo swapoff -a"


def test_a_macs_wired_limit_is_raised_to_what_the_model_needs(flash: Model) -> None:
    found = findings(MAC, replace(CUDA_BUILD, gpus=(Gpu("Apple M1 Ultra", 96 * GIB, 96 * GIB),)), flash)["memory"]
    assert found.level == "fail"
    limit = int(re.fullmatch(r"sudo sysctl iogpu\.wired_limit_mb=(\d+)  # .*", fix(found))[1])  # type: ignore[index]
    raised = replace(CUDA_BUILD, gpus=(Gpu("Apple M1 Ultra", limit << 20, limit << 20),))
    assert findings(MAC, raised, flash)["memory"].level == "ok"
    assert findings(replace(MAC, wired_limit=limit << 20), CPU_BUILD, flash)["memory"].level == "ok"


def test_strix_halo_gets_kernel_parameters(flash: Model) -> None:
    found = findings(STRIX, CUDA_BUILD, flash)["memory"]
    assert found.level == "fail"
    assert fix(found).endswith("amdgpu.gttsize=126976 ttm.pages_limit=32505856")
    assert findings(replace(STRIX, amd=AmdMemory(GIB // 2, 126976 << 20)), CUDA_BUILD, flash)["memory"].level == "ok"


def test_a_context_that_is_too_long_gets_the_longest_that_fits(flash: Model) -> None:
    found = findings(SPARK, CUDA_BUILD, flash, 262144)["memory"]
    assert found.level == "fail"
    n_ctx = int(fix(found).rsplit(" ", 1)[1])
    assert 32768 < n_ctx < 262144
    assert findings(SPARK, CUDA_BUILD, flash, n_ctx)["memory"].level != "fail"
    assert findings(SPARK, CUDA_BUILD, flash, n_ctx + 1024)["memory"].level == "fail"


def test_a_machine_that_is_too_small_gets_the_largest_type_that_fits(flash: Model) -> None:
    machine = replace(LINUX, ram=96 * GIB, ram_available=94 * GIB)
    found = findings(machine, CPU_BUILD, flash)["memory"]
    assert found.level == "fail"
    assert fix(found) == "stepgguf convert Step-3.5-Flash/ . --type Q3_K_S  # 81.6 GiB"
    weights = replace(flash.footprint, weights=dict(flash.sizes)["Q3_K_S"])
    assert findings(machine, CPU_BUILD, replace(flash, footprint=weights))["memory"].level == "ok"
    weights = replace(flash.footprint, weights=dict(flash.sizes)["Q3_K_M"])
    assert findings(machine, CPU_BUILD, replace(flash, footprint=weights))["memory"].level == "fail"
    tiny = findings(replace(LINUX, ram=32 * GIB), CPU_BUILD, flash)["memory"]
    assert fix(tiny) == "This machine is too small for this model, whatever its type."


def test_a_context_too_short_to_think_in_is_no_fix(flash: Model) -> None:
    machine = replace(LINUX, ram=need(flash.footprint, Context(3072)).total + LINUX_RESERVE)
    assert fix(findings(machine, CPU_BUILD, flash)["memory"]).startswith("stepgguf convert ")
    machine = replace(machine, ram=machine.ram + GIB // 8)
    assert fix(findings(machine, CPU_BUILD, flash)["memory"]).startswith("stepgguf chat ")


def test_what_a_card_cannot_hold_stays_in_ram(flash: Model) -> None:
    found = findings(CARD, CUDA_BUILD, flash)["memory"]
    assert found.level == "warn"
    layers = int(fix(found).rsplit(" ", 1)[1])
    assert fix(found) == f"stepgguf chat {flash.path} --gpu-layers {layers}"
    assert 30 < layers < 48
    assert findings(replace(CARD, ram=24 * GIB), CUDA_BUILD, flash)["memory"].level == "fail"
    two = (Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),) * 2
    assert findings(CARD, replace(CUDA_BUILD, gpus=two), flash)["memory"].level == "ok"


def test_a_container_is_named_as_the_limit(flash: Model) -> None:
    found = findings(replace(LINUX, container_limit=64 * GIB), CPU_BUILD, flash)
    assert found["memory"].level == "fail"
    wanted = int(re.fullmatch(r"docker run --memory=(\d+)g \.\.\.", fix(found["container"]))[1])  # type: ignore[index]
    assert "container" not in findings(replace(LINUX, container_limit=wanted * GIB), CPU_BUILD, flash)
    assert findings(replace(LINUX, container_limit=wanted * GIB), CPU_BUILD, flash)["memory"].level == "ok"


def test_a_context_beyond_the_trained_one_fails(flash: Model) -> None:
    found = findings(LINUX, CPU_BUILD, flash, 300000)["context"]
    assert (found.level, fix(found)) == ("fail", f"stepgguf chat {flash.path} --ctx 262144")


# the engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "backend"), [(SPARK, "CUDA"), (CARD, "CUDA"), (MAC, "METAL"), (STRIX, "VULKAN")])
def test_an_engine_that_leaves_the_gpu_idle_fails(machine: Machine, backend: str) -> None:
    found = findings(machine, CPU_BUILD)["engine"]
    assert found.level == "fail"
    assert shlex.split(fix(found))[:3] == [f"CMAKE_ARGS=-DGGML_{backend}=on", "pip", "install"]
    assert findings(machine, CUDA_BUILD)["engine"].level == "ok"


def test_an_engine_that_finds_no_gpu_fails_otherwise() -> None:
    assert findings(CARD, replace(CUDA_BUILD, gpus=()))["engine"].fix == "Check the GPU's driver."


def test_amx_that_the_compiler_broke_is_a_warning() -> None:
    amx = replace(CPU_BUILD, features=frozenset({"AVX2", "AMX_INT8"}))
    found = findings(LINUX, amx)["amx"]
    assert "AMX is off: this compiler (GCC 12.2)" in found.message
    assert fix(found).startswith("CC=gcc-14 CXX=g++-14 pip install ")
    assert "amx" not in findings(LINUX, replace(amx, compiler=("GCC", (14, 2, 0))))
    assert "amx" not in findings(CARD, replace(amx, gpus=CUDA_BUILD.gpus))


def test_what_the_cpu_has_and_the_engine_does_not_use_is_a_warning() -> None:
    found = findings(replace(LINUX, features=frozenset({"avx2", "fma", "avx512f", "sse"})), CPU_BUILD)["cpu"]
    assert "the CPU has AVX512, FMA, which" in found.message
    assert "cpu" not in findings(LINUX, CPU_BUILD)


def test_mtp_needs_the_blocks_and_the_engine(flash: Model, tmp_path: Path) -> None:
    assert "mtp" not in findings(LINUX, CPU_BUILD, flash)
    assert "lacks what MTP needs" in findings(LINUX, replace(CPU_BUILD, mtp=False), flash)["mtp"].message
    bare = read_model(write_real(tmp_path, mtp="drop"))
    assert (
        findings(LINUX, CPU_BUILD, bare)["mtp"].message == "the file has no MTP blocks, with which answers come faster"
    )


def test_the_file_s_own_troubles(flash: Model) -> None:
    broken = replace(flash, template=None, network="nfs4", path=Path("/a b/x.gguf"))
    found = findings(LINUX, CPU_BUILD, broken)
    assert found["template"].level == "fail"
    assert fix(found["template"]) == "stepgguf template '/a b/x.gguf' Step-3.5-Flash/chat_template.jinja"
    assert (found["disk"].level, fix(found["disk"])) == ("warn", "cp '/a b/x.gguf' /a/local/disk/")


def test_a_template_that_does_not_open_thinking_is_told(flash: Model) -> None:
    assert "template" not in findings(LINUX, CPU_BUILD, flash)
    assert "template" not in findings(LINUX, CPU_BUILD, replace(flash, template=f"{TEMPLATE}<think>\n</think>\n"))
    found = findings(LINUX, CPU_BUILD, replace(flash, template=TEMPLATE))["template"]
    assert (found.level, "does not open <think>" in found.message) == ("warn", True)


def test_a_finding_is_a_line_with_its_fix_below() -> None:
    assert lines(Finding("ok", "engine", "fine")) == "ok    engine     fine\n"
    assert lines(Finding("warn", "swap", "on", "off")) == "warn  swap       on\n                 off\n"
