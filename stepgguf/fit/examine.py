"""doctor's rules: what can be wrong with a machine, an engine and a file, each finding with what fixes it.

    probes (machine, build, the file's header, where its prompts end)  ->  examine()  ->  findings

The probes are taken once; everything here is a function of what they say.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import Literal

from stepgguf.errors import StepggufError
from stepgguf.files import folders
from stepgguf.files.byte_sizes import GIB, readable_size
from stepgguf.fit.backends import BACKENDS, BackendName, wanted_backend
from stepgguf.fit.capacity import Finding, check_context_length, check_memory
from stepgguf.fit.machine import SHARED_MEMORY, Machine
from stepgguf.fit.memory import ContextParams, MemoryNeed, memory_need
from stepgguf.fit.model_file import ModelFile
from stepgguf.runtime.llama_build import LlamaBuild

# Where the prompts of a chat template end (chat/template.py finds out), or what is wrong with the template.
PromptEnd = Literal["reasoning", "answer", "start"] | StepggufError

_REBUILD = "stepgguf setup --rebuild"
_FEATURES = {  # as the kernel names them -> as llama.cpp does; those that its matrix products use
    "avx2": "AVX2", "fma": "FMA", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "amx_int8": "AMX_INT8",
    "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE",
}  # fmt: skip


def examine(
    machine: Machine,
    build: LlamaBuild | None,
    model: ModelFile | None,
    context: ContextParams | None,
    prompt_end: PromptEnd | None = None,
) -> Iterator[Finding]:
    """All findings on a machine, an engine and a model in a context; None stands for what there is not."""
    yield _machine_finding(machine)
    if build is not None:
        yield from engine_findings(machine, build)
    if build is None or not build.gpus:
        yield from _processor_findings(machine, build)
    if model is not None and context is not None:
        yield from _file_findings(model, build, prompt_end)
        yield check_context_length(model, context.n_ctx)
        yield check_memory(machine, build, model, context)
        yield from _system_findings(machine, memory_need(model.footprint, context))


def examine_folders() -> Finding:
    """Whether stepgguf may write to its folders for data and caches. No folder is made."""
    own, made = folders.data(), folders.cache()
    kept = f"sessions, also of agents, and what was typed in {own}; kernels and measured errors in {made}"
    for folder in (own, made):
        there = next(f for f in (folder, *folder.parents) if f.exists())
        if not os.access(there, os.W_OK):
            message = f"{folder} cannot be written to ({kept})"
            return Finding("warn", "folders", message, f"Make {there} yours, or set XDG_DATA_HOME and XDG_CACHE_HOME.")
    return Finding("ok", "folders", kept)


def _machine_finding(machine: Machine) -> Finding:
    parts = [SHARED_MEMORY[machine.kind]] if machine.kind in SHARED_MEMORY else []
    memory = "shared by CPU and GPU" if parts else "RAM"
    parts += [machine.cpu, f"{machine.cores} cores"]
    parts.append(f"{readable_size(machine.ram)} {memory}, {readable_size(machine.ram_available)} of it available")
    parts += [f"{gpu.name} ({readable_size(gpu.total)})" if gpu.total else gpu.name for gpu in machine.gpus]
    return Finding("ok", "machine", ", ".join(parts))


def engine_findings(machine: Machine, build: LlamaBuild, asked: BackendName | None = None) -> Iterator[Finding]:
    """Whether llama-cpp-python uses the GPU, and whether it can draft.

    asked: the backend that it should use the GPU through; by default the one for this machine.
    """
    name, backend = f"llama-cpp-python {build.version}", asked or wanted_backend(machine)
    title = BACKENDS[backend].title
    if build.gpus and (asked is None or asked in build.backends):
        gpus = ", ".join(gpu.name for gpu in build.gpus)
        yield Finding("ok", "engine", f"{name} uses {gpus}: layers can be offloaded")
    elif backend == "none":
        yield Finding("ok", "engine", f"{name} for the CPU")
    elif backend in build.backends:
        message = f"{name} is built for GPUs ({title}) but finds none"
        yield Finding("fail", "engine", message, "Check the GPU's driver.")
    else:
        yield Finding("fail", "engine", f"{name} is built without {title} and leaves the GPU idle", "stepgguf setup")
    if not build.mtp:
        yield Finding("warn", "mtp", f"{name} lacks what MTP needs: tokens come one at a time", _REBUILD)


def _processor_findings(machine: Machine, build: LlamaBuild | None) -> Iterator[Finding]:
    """What slows down a CPU that computes: AMX that must stay off, instructions that the engine was built without."""
    if build is not None and build.amx_is_broken:
        compiler = f"{build.compiler[0]} {'.'.join(map(str, build.compiler[1]))}" if build.compiler else "unknown"
        message = f"AMX is off: this compiler ({compiler}) miscompiles ggml's AMX code, GCC from 14.2 on does not"
        yield Finding("warn", "amx", message, f"CC=gcc-14 CXX=g++-14 {_REBUILD}")
    lacking = [] if build is None else sorted(
        name for flag, name in _FEATURES.items() if flag in machine.features and name not in build.features
    )  # fmt: skip
    if lacking:
        message = f"the CPU has {', '.join(lacking)}, which llama-cpp-python is built without"
        yield Finding("warn", "cpu", message, _REBUILD)


def _file_findings(model: ModelFile, build: LlamaBuild | None, prompt_end: PromptEnd | None) -> Iterator[Finding]:
    """What the file holds, whether it can chat and draft, and where it lies."""
    path = shlex.quote(str(model.path))
    mtp = f", those of {model.mtp_file} included" if model.mtp_file else ""
    blocks = f"{readable_size(model.footprint.weights)}, {len(model.footprint.layers)} blocks{mtp}"
    yield Finding("ok", "file", f"{model.path}: {blocks}")
    yield from _template_findings(prompt_end, f"stepgguf template {path} Step-3.5-Flash/chat_template.jinja")
    if not model.footprint.has_mtp and (build is None or build.mtp):
        fix = f"stepgguf convert Step-3.5-Flash/ {path} --mtp include --overwrite"
        yield Finding("warn", "mtp", "the file has no MTP blocks, with which answers come faster", fix)
    if model.network:
        message = f"the file is on a network file system ({model.network}): loading takes as long as a download"
        yield Finding("warn", "disk", message, f"cp {path} /a/local/disk/")


def _template_findings(prompt_end: PromptEnd | None, fix: str) -> Iterator[Finding]:
    if isinstance(prompt_end, StepggufError):
        yield Finding("fail", "template", prompt_end.message, fix)
    elif prompt_end == "start":
        message = "the chat template does not open <think>: reasoning is split off only where the model opens it"
        yield Finding("warn", "template", message, fix)


def _system_findings(machine: Machine, needed: MemoryNeed) -> Iterator[Finding]:
    """What the system may do to a model that fits: reading instead of mapping, a container's limit, swapping."""
    if machine.kind == "spark":
        message = "files are read and not mapped here: others measured 22 s to load this model, and 224 s through mmap"
        yield Finding("ok", "mmap", message)
    if machine.kind != "gpu" and machine.container_limit and needed.total > machine.container_limit:
        message = f"this container may use {readable_size(machine.container_limit)} of memory"
        yield Finding("fail", "container", message, f"docker run --memory={-(-needed.total // GIB) + 4}g ...")
    if machine.kind != "gpu" and machine.swap and needed.total > machine.ram_available:
        swap = readable_size(machine.swap)
        message = f"{swap} of swap: a model that does not fit makes the machine stand still, not fail"
        yield Finding("warn", "swap", message, "sudo swapoff -a")
