"""What does not fit is refused before anything of it is loaded, by every command that runs a model."""

from __future__ import annotations

import io
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.errors import DoesNotFit
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.capacity import Finding, check_context_length, check_memory, refuse_to_load
from stepgguf.fit.machine import Machine
from stepgguf.fit.memory import ContextParams, memory_need
from stepgguf.fit.model_file import ModelFile, find_mtp_file, read_model_file
from stepgguf.runtime.llama_build import Gpu
from stepgguf.runtime.placement import ALL_LAYERS, Attention, Placement
from tests.fit.machines import CARD, CPU_BUILD, CUDA_BUILD, LINUX
from tests.fit.test_memory import write_real

RUNNING = (["chat", "-p", "Hello"], ["serve", "--port", "0"], ["bench"])


@pytest.fixture(autouse=True)
def _nothing_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return read_model_file(write_real(tmp_path_factory.mktemp("real")))


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNING, ids=lambda command: command[0])
def test_a_model_that_is_larger_than_the_machine_is_refused_at_once(
    flash: ModelFile, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert main([*command, str(flash.path)]) == 1
    assert time.monotonic() - started < 20, "106 GiB of holes: reading them takes minutes"
    err = capfd.readouterr().err
    assert f"error: {flash.path}: " in err
    assert "106.2 GiB weights" in err
    assert "; there is " in err
    assert "--force" in err


@pytest.mark.parametrize("command", RUNNING[:2], ids=lambda command: command[0])
def test_a_context_beyond_the_models_own_is_refused_with_its_maximum(
    demo_gguf: Path, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(demo_gguf), "--ctx", "5000"]) == 1
    err = capfd.readouterr().err
    assert "a context of 5,000 tokens is longer than the 4,096 that the model was trained for" in err
    assert f"stepgguf {command[0]} {demo_gguf} --ctx 4096" in err


def test_force_loads_it_all_the_same(demo_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["chat", str(demo_gguf), "-p", "What is 1 + 1?", "--ctx", "5000", "--force", "--threads", "1"]
    assert main([*command, "--temperature", "0", "-q"]) == 0
    assert capfd.readouterr().out.strip()


def test_what_is_refused_is_what_doctor_would_say(flash: ModelFile) -> None:
    machine = replace(LINUX, ram=120 * GIB, ram_available=119 * GIB)
    finding = check_memory(machine, CPU_BUILD, flash, ContextParams(262144))
    with pytest.raises(DoesNotFit) as caught:
        refuse_to_load(flash, [finding])
    assert caught.value.message == f"{flash.path}: {finding.message}"
    assert caught.value.hint is not None
    n_ctx = int(caught.value.hint.split("--ctx ")[1].split()[0])
    assert check_memory(machine, CPU_BUILD, flash, ContextParams(n_ctx)).level == "ok"
    assert check_context_length(flash, n_ctx).level == "ok"
    refuse_to_load(flash, [])


def test_a_conversation_cache_that_is_too_large_is_what_has_to_be_smaller(flash: ModelFile) -> None:
    machine = replace(LINUX, ram=128 * GIB, ram_available=127 * GIB)
    finding = check_memory(machine, CPU_BUILD, flash, ContextParams(32768, cache_ram=64 * GIB))
    assert finding.level == "fail"
    n = int(str(finding.fix).split("--ctx 32768 --cache-ram ")[1].removesuffix("MiB"))
    assert check_memory(machine, CPU_BUILD, flash, ContextParams(32768, cache_ram=n * 2**20)).level == "ok"


def test_what_is_free_now_counts_and_a_context_that_fits_into_it_is_named(flash: ModelFile) -> None:
    needed = memory_need(flash.footprint, ContextParams(65536))
    machine = replace(LINUX, ram_available=needed.device)
    assert check_memory(machine, CPU_BUILD, flash, ContextParams(65536)).level == "ok"
    finding = check_memory(machine, CPU_BUILD, flash, ContextParams(131072))
    assert finding.level == "warn"
    assert finding.fix == f"Close other programs, or: stepgguf chat {flash.path} --ctx 65536"


def fix(finding: Finding) -> str:
    assert finding.fix is not None
    return finding.fix


def test_what_a_card_cannot_hold_is_placed_beside_it_and_what_is_set_is_kept(flash: ModelFile) -> None:
    finding = check_memory(CARD, CUDA_BUILD, flash, ContextParams(32768))
    assert finding.level == "ok"
    said = re.search(r"experts of (\d+) of 45 layers in RAM, all layers on the card$", finding.message)
    assert said is not None
    fewest = int(said[1])
    for n, level in ((fewest, "ok"), (fewest - 1, "fail"), (45, "ok")):
        placement = Placement(gpu_layers=ALL_LAYERS, n_cpu_moe=n)
        found = check_memory(CARD, CUDA_BUILD, flash, ContextParams(32768, placement=placement))
        assert found.level == level
        assert level == "ok" or fix(found) == f"stepgguf chat {flash.path} --n-cpu-moe {fewest}"
    assert check_memory(CARD, CPU_BUILD, flash, ContextParams(32768)).level == "ok", (
        "an engine without CUDA runs it in RAM"
    )


def test_layers_go_into_ram_where_a_card_cannot_even_hold_what_is_beside_the_experts(flash: ModelFile) -> None:
    build = replace(CUDA_BUILD, gpus=(Gpu("GPU", 6 * GIB, 6 * GIB),))
    finding = check_memory(CARD, build, flash, ContextParams(32768))
    said = re.search(r"experts of 45 of 45 layers in RAM, (\d+) whole layers in RAM$", finding.message)
    assert finding.level == "ok"
    assert said is not None
    assert 5 < int(said[1]) < 45


def test_of_a_card_that_others_use_only_what_is_free_counts(flash: ModelFile) -> None:
    build = replace(CUDA_BUILD, gpus=(Gpu("GPU", 80 * GIB, 40 * GIB),))
    all_free = check_memory(CARD, CUDA_BUILD, flash, ContextParams(32768)).message
    half_free = check_memory(CARD, build, flash, ContextParams(32768)).message
    experts = [int(text.split("experts of ")[1].split()[0]) for text in (all_free, half_free)]
    assert experts[0] < experts[1]
    placement = Placement(gpu_layers=ALL_LAYERS, n_cpu_moe=experts[0])
    finding = check_memory(CARD, build, flash, ContextParams(32768, placement=placement))
    assert finding.level == "warn"
    assert fix(finding) == f"Close other programs, or: stepgguf chat {flash.path} --n-cpu-moe {experts[1]}"


def test_a_cache_in_eight_bits_is_named_where_it_makes_room_for_more(flash: ModelFile) -> None:
    machine = replace(LINUX, ram=120 * GIB, ram_available=119 * GIB)
    finding = check_memory(machine, CPU_BUILD, flash, ContextParams(262144))
    small = Attention("q8_0", "q8_0")
    said = re.search(r"  # or --ctx (\d+) --cache-type-k q8_0 --cache-type-v q8_0$", fix(finding))
    assert said is not None
    assert int(said[1]) > int(fix(finding).split("--ctx ")[1].split()[0])
    assert check_memory(machine, CPU_BUILD, flash, ContextParams(int(said[1]), attention=small)).level == "ok"
    assert check_memory(machine, CPU_BUILD, flash, ContextParams(int(said[1]))).level == "fail"
    no_flash = ContextParams(262144, attention=Attention(flash_attn="off"))
    assert "q8_0" not in fix(check_memory(machine, CPU_BUILD, flash, no_flash))
    assert "q8_0" not in fix(
        check_memory(replace(machine, ram=114 * GIB), CPU_BUILD, flash, ContextParams(262144, attention=small))
    ), "it has that already"


def test_a_small_machine_keeps_an_eighth_for_its_system() -> None:
    from stepgguf.fit.memory import memory_budget

    small: Machine = replace(LINUX, ram=4 * GIB, ram_available=3 * GIB)
    assert (memory_budget(small).ceiling, memory_budget(small).free) == (3584 * 2**20, 3 * GIB)


def test_a_system_that_does_not_tell_its_memory_refuses_nothing(flash: ModelFile) -> None:
    assert check_memory(replace(LINUX, ram=0, ram_available=0), CPU_BUILD, flash, ContextParams(32768)).level == "ok"
    assert check_memory(replace(LINUX, ram_available=0), CPU_BUILD, flash, ContextParams(32768)).level == "ok"


def test_the_mtp_file_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "mtp-a.gguf", "b-00001-of-00002.gguf", "mtp-b.gguf", "c[1].gguf", "d.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "mtp-c[1]-00001-of-00002.gguf").touch()
    beside = {path.name: find_mtp_file(path) for path in tmp_path.glob("[a-d]*.gguf")}
    assert {name: path and path.name for name, path in beside.items()} == {
        "a.gguf": "mtp-a.gguf",
        "b-00001-of-00002.gguf": "mtp-b.gguf",
        "c[1].gguf": "mtp-c[1]-00001-of-00002.gguf",
        "d.gguf": None,
    }


def test_chat_drafts_with_the_file_beside_the_model(separate_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["chat", str(separate_gguf), "-p", "What is 347 + 286?", "--temperature", "0", "--threads", "1"]
    assert main([*command, "--draft", "3"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "347 + 286 = 633\n"
    assert "MTP 3." in captured.err
    assert main([*command, "--mtp-file", str(separate_gguf)]) == 1
    assert "holds no MTP blocks" in capfd.readouterr().err
