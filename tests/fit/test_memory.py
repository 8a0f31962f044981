"""Memory arithmetic against llama.cpp's own numbers, for the real model's shapes and for a small model in memory."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from pathlib import Path

import llama_cpp
import pytest
from gguf import GGMLQuantizationType

from stepgguf.cli.main import main
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.footprint import footprint_of
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.fit.memory import (
    ContextParams,
    Footprint,
    LayerFootprint,
    largest_context,
    memory_budget,
    memory_need,
    saved_state_bytes,
)
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.runtime.llama_build import Gpu
from stepgguf.runtime.placement import Attention, CacheType
from tests.cli.test_cli import sparse_checkpoint
from tests.oracle import silence

MIB = 2**20


@dataclass(frozen=True)
class Reported:
    """What llama.cpp logs, in MiB."""

    kv: float
    compute: float


def reported(path: Path, context: ContextParams, *, mtp: bool = False, allocate: bool = False) -> Reported:
    """Make a context as the engine does and read llama.cpp's log. Without `allocate` no memory and no weights."""
    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        params = llama_cpp.llama_model_default_params()
        params.no_alloc, params.load_mode, params.load_mtp = not allocate, llama_cpp.LLAMA_LOAD_MODE_NONE, True
        params.use_extra_bufts = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = context.n_ctx, context.n_parallel
        settings.n_batch = settings.n_ubatch = context.n_ubatch
        settings.n_outputs_max = context.n_parallel * (1 if mtp else 4)
        settings.kv_unified, settings.swa_full, settings.ctx_type = True, False, int(mtp)
        attention = context.attention.of_mtp if mtp else context.attention
        types = (GGMLQuantizationType[t.upper()] for t in (attention.cache_type_k, attention.cache_type_v))
        settings.type_k, settings.type_v = types
        settings.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[attention.flash_attn]
        llama_cpp.llama_free(llama_cpp.llama_init_from_model(model, settings))
        llama_cpp.llama_model_free(model)
    finally:
        silence()
    text = "".join(log)
    kv = re.findall(r"size = +([\d.]+) MiB \( *\d+ cells", text)
    assert len(kv) == 2, text[-2000:]
    return Reported(sum(map(float, kv)), float(re.findall(r"compute buffer size = +([\d.]+)", text)[-1]))


def write_real(folder: Path, mtp: str = "include") -> Path:
    """A Q4_K_S of the real model whose 106 GiB of weights are a hole in the file."""
    with Checkpoint(sparse_checkpoint(folder / "Step-3.5-Flash")) as source:
        file = plan_source(source, folder / "real.gguf", Options(load_recipe("Q4_K_S"), mtp=mtp)).files[0]
    with file.path.open("wb") as out:
        out.write(file.header)
        out.truncate(file.size)
    return file.path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def flash(real: Path) -> Footprint:
    with GGUFSource(real) as source:
        return footprint_of(source)


CONTEXTS = [
    ContextParams(4096),
    ContextParams(5000),
    ContextParams(32768),
    ContextParams(262144),
    ContextParams(65536, n_parallel=2),
    ContextParams(65536, n_parallel=4, n_ubatch=256),
    ContextParams(32768, n_ubatch=1024),
    ContextParams(131072, n_parallel=8),
    ContextParams(700),
    ContextParams(32768, n_ubatch=2048),
    ContextParams(32768, attention=Attention("q8_0", "q8_0")),
    ContextParams(65536, n_parallel=2, attention=Attention("q8_0", "q4_0", "on")),
    ContextParams(32768, attention=Attention("q5_1", "q5_0")),
    ContextParams(32768, attention=Attention("iq4_nl", "q4_1")),
    ContextParams(32768, attention=Attention("bf16", "f16")),
    ContextParams(32768, attention=Attention("f32", "f32")),
    ContextParams(32768, attention=Attention(flash_attn="off")),
    ContextParams(131072, n_parallel=2, n_ubatch=256, attention=Attention("q8_0", flash_attn="off")),
]


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_the_real_models_caches_are_what_llama_cpp_makes(real: Path, flash: Footprint, context: ContextParams) -> None:
    theirs, ours = reported(real, context), memory_need(flash, context)
    assert ours.kv / MIB == pytest.approx(theirs.kv, abs=0.01)
    most = 1.5 if context.attention.cache_type_k == "f32" else 1.1  # what is converted is not there with the experts
    assert theirs.compute <= ours.compute / MIB <= most * theirs.compute


@pytest.mark.slow
@pytest.mark.parametrize(
    "context",
    [
        ContextParams(32768),
        ContextParams(262144),
        ContextParams(65536, n_parallel=2),
        ContextParams(32768, n_ubatch=2048, attention=Attention("q8_0", "q8_0")),
    ],
    ids=str,
)
def test_mtp_is_a_context_of_its_own(real: Path, flash: Footprint, context: ContextParams) -> None:
    theirs = reported(real, context, mtp=True)
    assert (
        theirs.kv + theirs.compute
        <= memory_need(flash, context).mtp / MIB + 0.02
        <= 1.05 * (theirs.kv + theirs.compute)
    )
    assert memory_need(flash, replace(context, mtp=False)).mtp == 0


def test_the_real_models_weights_and_layers(flash: Footprint) -> None:
    assert flash.weights / GIB == pytest.approx(106.24, abs=0.01)
    assert [sum(y.is_sliding for y in flash.layers), len(flash.layers)] == [36, 48]
    assert [i for i, layer in enumerate(flash.layers) if layer.is_mtp] == [45, 46, 47]
    assert (flash.sliding_window, flash.n_vocab, flash.n_ctx_train) == (512, 128896, 262144)
    assert memory_need(flash, ContextParams(262144)).kv == 12 * 262144 * 4096 + 33 * 1024 * 4096


@pytest.fixture(scope="module")
def small_gguf(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "f32.gguf"
    assert main(["convert", str(small), str(path), "-t", "F32", "-q"]) == 0
    return path


@pytest.mark.parametrize(
    "context",
    [
        ContextParams(2048),
        ContextParams(1500, n_parallel=3),
        ContextParams(512, n_ubatch=64),
        ContextParams(2048, attention=Attention("q8_0", "q4_0")),
    ],
    ids=str,
)
def test_a_small_models_caches_when_they_are_really_allocated(small_gguf: Path, context: ContextParams) -> None:
    with GGUFSource(small_gguf) as source:
        ours = memory_need(footprint_of(source), context)
    assert ours.kv / MIB == pytest.approx(reported(small_gguf, context, allocate=True).kv, abs=0.02)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_a_checkpoint_is_the_window_of_the_sliding_layers(small_gguf: Path, cache_type: CacheType) -> None:
    """llama.cpp adds a few bytes per cell and per layer to what the cells hold."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(small_gguf).encode(), params)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.swa_full = 1024, False
    settings.type_k = settings.type_v = GGMLQuantizationType[cache_type.upper()]
    context = llama_cpp.llama_init_from_model(model, settings)
    tokens = (llama_cpp.llama_token * 200)(*range(3, 203))
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 200)) == 0
    size = llama_cpp.llama_state_seq_get_size_ext(context, 0, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    with GGUFSource(small_gguf) as source:
        ours = saved_state_bytes(footprint_of(source), Attention(cache_type, cache_type))
    assert ours <= size <= 1.05 * ours


MODEL = Footprint(
    weights=100 * GIB,
    layers=tuple(LayerFootprint(96 if i % 4 else 64, 8, i % 4 != 0) for i in range(45)),
    key_length=128,
    value_length=128,
    sliding_window=512,
    n_embd=4096,
    n_ff=11264,
    n_vocab=128896,
    n_expert_used=8,
    expert_size=1280,
    n_ctx_train=262144,
)


@pytest.mark.parametrize("gib", [104, 106, 110])
def test_the_largest_context_fits_and_the_next_one_does_not(gib: int) -> None:
    n_ctx = largest_context(MODEL, ContextParams(1), gib * GIB)
    assert n_ctx is not None
    assert (
        memory_need(MODEL, ContextParams(n_ctx)).total
        <= gib * GIB
        < memory_need(MODEL, ContextParams(n_ctx + 1024)).total
    )


def test_no_context_is_small_enough_for_weights_that_do_not_fit() -> None:
    assert largest_context(MODEL, ContextParams(1), 99 * GIB) is None
    assert largest_context(MODEL, ContextParams(1), 400 * GIB) == MODEL.n_ctx_train


def machine(ram: int, available: int, **more: object) -> Machine:
    return replace(Machine("Linux", "x86_64", "cpu", 8, 16, frozenset(), ram * GIB, available * GIB, 0), **more)  # type: ignore[arg-type]


def test_a_machine_without_a_gpu_has_its_memory_less_the_systems() -> None:
    have = memory_budget(machine(64, 50))
    assert (have.limit, have.ceiling, have.free) == (60 * GIB, 60 * GIB, 50 * GIB)
    assert memory_budget(machine(64, 50, container_limit=32 * GIB)).limit == 28 * GIB


def test_a_gpu_of_its_own_has_its_memory_and_the_ceiling_adds_ram() -> None:
    cards = (Gpu("NVIDIA H100", 80 * GIB, 79 * GIB), Gpu("NVIDIA H100", 80 * GIB, 70 * GIB))
    have = memory_budget(machine(128, 100, gpus=cards))
    assert (have.limit, have.ceiling, have.free) == (158 * GIB, (158 + 124) * GIB, 147 * GIB)


def test_what_the_engine_sees_counts_more_than_what_the_driver_lists() -> None:
    seen = (Gpu("NVIDIA H100", 40 * GIB, 40 * GIB),)
    assert memory_budget(machine(128, 100, gpus=(Gpu("NVIDIA H100", 80 * GIB, 80 * GIB),)), seen).limit == 39 * GIB


def test_the_memory_of_a_spark_is_the_systems_whatever_cuda_says() -> None:
    spark = machine(121, 113, gpus=(Gpu("NVIDIA GB10", None, None),))
    assert memory_budget(spark, (Gpu("NVIDIA GB10", 119 * GIB, 3 * GIB),)).limit == 117 * GIB


@pytest.mark.parametrize(
    ("wired", "seen", "limit"), [(None, None, 96), (0, None, 96), (112, None, 112), (0, 107, 107), (127, 127, 120)]
)
def test_a_mac_gives_its_gpu_what_metal_says_or_sysctl_or_three_quarters(
    wired: int | None, seen: int | None, limit: int
) -> None:
    mac = machine(128, 120, system="Darwin", wired_limit=None if wired is None else wired * GIB)
    gpus = (Gpu("Apple M1 Ultra", seen * GIB, seen * GIB),) if seen else ()
    have = memory_budget(mac, gpus)
    assert (have.limit, have.ceiling) == (limit * GIB, 120 * GIB)


def test_strix_halo_may_map_what_the_kernel_allows() -> None:
    halo = machine(124, 115, cpu="AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", amd=AmdMemory(GIB // 2, 62 * GIB))
    have = memory_budget(halo)
    assert (have.limit, have.ceiling) == (62 * GIB + GIB // 2, 120 * GIB + GIB // 2)
