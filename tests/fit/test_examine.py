"""doctor's rules, on machines of each kind with the real model's header: what each fix does is tried too."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.cli.doctor import find_prompt_end
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.capacity import Finding, check_memory
from stepgguf.fit.examine import examine
from stepgguf.fit.machine import AmdMemory, Machine, use_mmap
from stepgguf.fit.memory import LINUX_RESERVE, ContextParams, memory_need
from stepgguf.fit.model_file import ModelFile, read_model_file
from stepgguf.runtime.llama_build import Gpu, LlamaBuild
from stepgguf.runtime.placement import Attention
from tests.fit.machines import CARD, CPU_BUILD, CUDA_BUILD, LINUX, MAC, SPARK, STRIX
from tests.fit.test_memory import write_real

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return read_model_file(write_real(tmp_path_factory.mktemp("real")))


def findings(
    machine: Machine, build: LlamaBuild | None, model: ModelFile | None = None, n_ctx: int = 32768
) -> dict[str, Finding]:
    prompt_end = find_prompt_end(model.template) if model is not None else None
    found = examine(machine, build, model, ContextParams(n_ctx), prompt_end)
    return {finding.subject: finding for finding in found}


def fix(finding: Finding) -> str:
    assert finding.fix is not None
    return finding.fix


# the fixes fix ------------------------------------------------------------------------------------------------------


def test_a_spark_holds_the_model_and_reads_it_without_mmap(flash: ModelFile) -> None:
    found = findings(SPARK, CUDA_BUILD, flash)
    assert found["memory"].level == "ok"
    assert "shared by CPU and GPU" in found["machine"].message
    assert (found["mmap"].level, "read and not mapped" in found["mmap"].message) == ("ok", True)
    assert (use_mmap(SPARK, None), use_mmap(SPARK, True), use_mmap(LINUX, None), use_mmap(LINUX, False)) == (
        False,
        True,
        True,
        False,
    )
    assert "mmap" not in findings(LINUX, CPU_BUILD, flash)


def test_what_other_programs_hold_is_a_warning(flash: ModelFile) -> None:
    found = findings(replace(SPARK, ram_available=90 * GIB, swap=16 * GIB), CUDA_BUILD, flash)
    assert found["memory"].level == "warn"
    assert "only 90.0 GiB is free now" in found["memory"].message
    assert fix(found["swap"]) == "sudo swapoff -a"


def test_a_macs_wired_limit_is_raised_to_what_the_model_needs(flash: ModelFile) -> None:
    found = findings(MAC, replace(CUDA_BUILD, gpus=(Gpu("Apple M1 Ultra", 96 * GIB, 96 * GIB),)), flash)["memory"]
    assert found.level == "fail"
    limit = int(re.fullmatch(r"sudo sysctl iogpu\.wired_limit_mb=(\d+)  # .*", fix(found))[1])  # type: ignore[index]
    raised = replace(CUDA_BUILD, gpus=(Gpu("Apple M1 Ultra", limit << 20, limit << 20),))
    assert findings(MAC, raised, flash)["memory"].level == "ok"
    assert findings(replace(MAC, wired_limit=limit << 20), CPU_BUILD, flash)["memory"].level == "ok"


def test_strix_halo_gets_kernel_parameters(flash: ModelFile) -> None:
    found = findings(STRIX, CUDA_BUILD, flash)["memory"]
    assert found.level == "fail"
    assert fix(found).endswith("amdgpu.gttsize=126976 ttm.pages_limit=32505856")
    assert findings(replace(STRIX, amd=AmdMemory(GIB // 2, 126976 << 20)), CUDA_BUILD, flash)["memory"].level == "ok"


@pytest.mark.slow
def test_a_context_that_is_too_long_gets_the_longest_that_fits(flash: ModelFile) -> None:
    found = findings(SPARK, CUDA_BUILD, flash, 262144)["memory"]
    assert found.level == "fail"
    n_ctx = int(fix(found).split("--ctx ")[1].split()[0])
    assert 32768 < n_ctx < 262144
    assert findings(SPARK, CUDA_BUILD, flash, n_ctx)["memory"].level != "fail"
    assert findings(SPARK, CUDA_BUILD, flash, n_ctx + 1024)["memory"].level == "fail"


@pytest.mark.slow
def test_a_machine_that_is_too_small_gets_the_largest_type_that_fits(flash: ModelFile) -> None:
    machine = replace(LINUX, ram=96 * GIB, ram_available=94 * GIB)
    found = findings(machine, CPU_BUILD, flash)["memory"]
    assert found.level == "fail"
    assert fix(found) == "stepgguf convert Step-3.5-Flash/ . --type Q3_K_S  # 81.6 GiB"
    weights = replace(flash.footprint, weights=dict(flash.sizes_by_type)["Q3_K_S"])
    assert findings(machine, CPU_BUILD, replace(flash, footprint=weights))["memory"].level == "ok"
    weights = replace(flash.footprint, weights=dict(flash.sizes_by_type)["Q3_K_M"])
    assert findings(machine, CPU_BUILD, replace(flash, footprint=weights))["memory"].level == "fail"
    tiny = findings(replace(LINUX, ram=32 * GIB), CPU_BUILD, flash)["memory"]
    assert fix(tiny) == "This machine is too small for this model, whatever its type."


@pytest.mark.slow
def test_a_context_too_short_to_think_in_is_no_fix(flash: ModelFile) -> None:
    small = Attention("q8_0", "q8_0")
    needed = memory_need(flash.footprint, ContextParams(3072, attention=small)).total
    machine = replace(LINUX, ram=needed + LINUX_RESERVE)
    found = check_memory(machine, CPU_BUILD, flash, ContextParams(32768, attention=small))
    assert fix(found).startswith("stepgguf convert ")
    machine = replace(LINUX, ram=memory_need(flash.footprint, ContextParams(3072)).total + LINUX_RESERVE)
    eight_bits = fix(findings(machine, CPU_BUILD, flash)["memory"])
    assert re.search(r"^stepgguf chat \S+ --ctx \d{4} --cache-type-k q8_0 --cache-type-v q8_0$", eight_bits)
    machine = replace(machine, ram=machine.ram + GIB // 8)
    assert fix(findings(machine, CPU_BUILD, flash)["memory"]).startswith(f"stepgguf chat {flash.path} --ctx 5120 ")


@pytest.mark.slow
def test_what_a_card_cannot_hold_stays_in_ram(flash: ModelFile) -> None:
    found = findings(CARD, CUDA_BUILD, flash)["memory"]
    assert found.level == "ok"
    assert re.search(r": experts of \d+ of 45 layers in RAM, all layers on the card$", found.message)
    assert findings(replace(CARD, ram=24 * GIB), CUDA_BUILD, flash)["memory"].level == "fail"
    two = (Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),) * 2
    found = findings(CARD, replace(CUDA_BUILD, gpus=two), flash)["memory"]
    assert found.level == "ok"
    assert re.search(r"in RAM: \d+/\d+ layers on the 2 cards$", found.message)


@pytest.mark.slow
def test_a_container_is_named_as_the_limit(flash: ModelFile) -> None:
    found = findings(replace(LINUX, container_limit=64 * GIB), CPU_BUILD, flash)
    assert found["memory"].level == "fail"
    wanted = int(re.fullmatch(r"docker run --memory=(\d+)g \.\.\.", fix(found["container"]))[1])  # type: ignore[index]
    assert "container" not in findings(replace(LINUX, container_limit=wanted * GIB), CPU_BUILD, flash)
    assert findings(replace(LINUX, container_limit=wanted * GIB), CPU_BUILD, flash)["memory"].level == "ok"


def test_a_context_beyond_the_trained_one_fails(flash: ModelFile) -> None:
    found = findings(LINUX, CPU_BUILD, flash, 300000)["context"]
    assert (found.level, fix(found)) == ("fail", f"stepgguf chat {flash.path} --ctx 262144")


# the engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "backend"), [(SPARK, "CUDA"), (CARD, "CUDA"), (MAC, "Metal"), (STRIX, "Vulkan")])
def test_an_engine_that_leaves_the_gpu_idle_fails(machine: Machine, backend: str) -> None:
    found = findings(machine, CPU_BUILD)["engine"]
    assert found.level == "fail"
    assert (f"is built without {backend} " in found.message, fix(found)) == (True, "stepgguf setup")
    assert findings(machine, CUDA_BUILD)["engine"].level == "ok"


def test_an_engine_that_finds_no_gpu_fails_otherwise() -> None:
    assert findings(CARD, replace(CUDA_BUILD, gpus=()))["engine"].fix == "Check the GPU's driver."


def test_amx_that_the_compiler_broke_is_a_warning() -> None:
    amx = replace(CPU_BUILD, features=frozenset({"AVX2", "AMX_INT8"}))
    found = findings(LINUX, amx)["amx"]
    assert "AMX is off: this compiler (GCC 12.2)" in found.message
    assert fix(found).startswith("CC=gcc-14 CXX=g++-14 stepgguf setup ")
    assert "amx" not in findings(LINUX, replace(amx, compiler=("GCC", (14, 2, 0))))
    assert "amx" not in findings(CARD, replace(amx, gpus=CUDA_BUILD.gpus))


def test_what_the_cpu_has_and_the_engine_does_not_use_is_a_warning() -> None:
    found = findings(replace(LINUX, features=frozenset({"avx2", "fma", "avx512f", "sse"})), CPU_BUILD)["cpu"]
    assert "the CPU has AVX512, FMA, which" in found.message
    assert "cpu" not in findings(LINUX, CPU_BUILD)


@pytest.mark.slow
def test_mtp_needs_the_blocks_and_the_engine(flash: ModelFile, tmp_path: Path) -> None:
    assert "mtp" not in findings(LINUX, CPU_BUILD, flash)
    assert "lacks what MTP needs" in findings(LINUX, replace(CPU_BUILD, mtp=False), flash)["mtp"].message
    bare = read_model_file(write_real(tmp_path, mtp="drop"))
    assert (
        findings(LINUX, CPU_BUILD, bare)["mtp"].message == "the file has no MTP blocks, with which answers come faster"
    )


def test_the_file_s_own_troubles(flash: ModelFile) -> None:
    broken = replace(flash, template=None, network="nfs4", path=Path("/a b/x.gguf"))
    found = findings(LINUX, CPU_BUILD, broken)
    assert found["template"].level == "fail"
    assert fix(found["template"]) == "stepgguf template '/a b/x.gguf' Step-3.5-Flash/chat_template.jinja"
    assert (found["disk"].level, fix(found["disk"])) == ("warn", "cp '/a b/x.gguf' /a/local/disk/")


def test_a_template_that_does_not_open_thinking_is_told(flash: ModelFile) -> None:
    assert "template" not in findings(LINUX, CPU_BUILD, flash)
    assert "template" not in findings(LINUX, CPU_BUILD, replace(flash, template=f"{TEMPLATE}<think>\n</think>\n"))
    found = findings(LINUX, CPU_BUILD, replace(flash, template=TEMPLATE))["template"]
    assert (found.level, "does not open <think>" in found.message) == ("warn", True)
