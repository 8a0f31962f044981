"""stepgguf doctor: can this machine run this model well? Each finding comes with what fixes it.

    probes (machine, llama_build, the file's header)  ->  examine()  ->  findings  ->  lines or JSON

The probes are taken once; everything after them is a function of what they say.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepgguf.cli import arguments, loading
from stepgguf.errors import BadMetadata, StepggufError
from stepgguf.files import folders
from stepgguf.fit import machine as machines
from stepgguf.fit.capacity import SHARED, Finding, Model, context_length, memory, read_model
from stepgguf.fit.machine import Machine
from stepgguf.fit.memory import DEFAULT_CTX, GIB, Context, Need, budget, need
from stepgguf.runtime import llama_build
from stepgguf.runtime.llama_build import LlamaBuild

if TYPE_CHECKING:
    from stepgguf.chat.template import PromptEnding

_UPGRADE = "pip install --upgrade 'llama-cpp-python>=0.3.36'"
_REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_BACKENDS = {"spark": "CUDA", "gpu": "CUDA", "mac": "METAL", "strix": "VULKAN"}  # GGML_<this>=on
_FEATURES = {  # as the kernel names them -> as llama.cpp does; those that its matrix products use
    "avx2": "AVX2", "fma": "FMA", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "amx_int8": "AMX_INT8",
    "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE",
}  # fmt: skip


def doctor(
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE.gguf", help="The model to run; of a split one, any of its files.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(min=64, metavar="TOKENS", help="Context. Default: the model's, at most 32768.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at the same time.")] = 1,
    mtp_file: loading.MtpFile = None,
    json: arguments.Json = False,
) -> None:
    """Say whether this machine can run a model well, and how to fix what is in the way.

    The exit code is 0 unless something fails.

    Examples:

    - `stepgguf doctor`
    - `stepgguf doctor step-q4_k_s.gguf`
    - `stepgguf doctor step-q4_k_s.gguf --ctx 131072 --parallel 2`
    """
    from stepgguf.cli import output

    findings, build, model, context = [], None, None, None
    here = machines.probe()
    try:
        build = llama_build.probe()
    except StepggufError as error:
        findings.append(Finding("fail", "engine", error.message, error.hint))
    if path is not None:
        try:
            model = read_model(path, mtp_file)
        except StepggufError as error:
            findings.append(Finding("fail", "file", error.message, error.hint))
        else:
            n_ctx = ctx or min(model.footprint.n_ctx_train, DEFAULT_CTX)
            context = Context(n_ctx, parallel, mtp=build is None or build.mtp)
    findings = [*examine(here, build, model, context), _folders(), *findings]
    if json:
        output.data(report(here, build, model, context, findings))
    else:
        sys.stdout.write("".join(map(lines, findings)))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def lines(finding: Finding) -> str:
    """The finding in one line, and its fix below."""
    text = f"{finding.level:<4}  {finding.subject:<9}  {finding.message}\n"
    return text + f"{'':17}{finding.fix}\n" if finding.fix else text


def report(
    machine: Machine, build: LlamaBuild | None, model: Model | None, context: Context | None, findings: list[Finding]
) -> dict[str, Any]:
    """The same as data; sizes in bytes."""
    result: dict[str, Any] = {
        "ok": all(finding.level != "fail" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "machine": {**asdict(machine), "kind": machine.kind, "features": sorted(machine.features)},
        "engine": build and {**asdict(build), "features": sorted(build.features)},
        "budget": asdict(budget(machine, build.gpus if build else ())),
    }
    if model is not None and context is not None:
        needed = need(model.footprint, context)
        result["need"] = {"n_ctx": context.n_ctx, "n_parallel": context.n_parallel, **asdict(needed)}
        result["need"]["total"] = needed.total
    return result


# findings -----------------------------------------------------------------------------------------------------------


def examine(
    machine: Machine, build: LlamaBuild | None, model: Model | None, context: Context | None
) -> Iterator[Finding]:
    """All findings on a machine, an engine and a model, each of the last two if there is one."""
    yield _machine(machine)
    if build is not None:
        yield from _engine(machine, build)
    if build is None or not build.gpus:
        yield from _processor(machine, build)
    if model is not None and context is not None:
        yield from _file(model, build)
        yield context_length(model, context.n_ctx)
        yield memory(machine, build, model, context)
        yield from _limits(machine, need(model.footprint, context))


def _folders() -> Finding:
    """Where this program keeps what is its own."""
    kept = f"sessions and what was typed in {folders.data()}; kernels and measured errors in {folders.cache()}"
    for folder in (folders.data(), folders.cache()):
        there = next(f for f in (folder, *folder.parents) if f.exists())
        if not os.access(there, os.W_OK):
            message = f"{folder} cannot be written to ({kept})"
            return Finding("warn", "folders", message, f"Make {there} yours, or set XDG_DATA_HOME and XDG_CACHE_HOME.")
    return Finding("ok", "folders", kept)


def _machine(machine: Machine) -> Finding:
    from stepgguf.cli.output import size

    parts = [SHARED[machine.kind]] if machine.kind in SHARED else []
    memory = "shared by CPU and GPU" if parts else "RAM"
    parts += [machine.cpu, f"{machine.cores} cores"]
    parts.append(f"{size(machine.ram)} {memory}, {size(machine.ram_available)} of it available")
    parts += [f"{gpu.name} ({size(gpu.total)})" if gpu.total else gpu.name for gpu in machine.gpus]
    return Finding("ok", "machine", ", ".join(parts))


def _engine(machine: Machine, build: LlamaBuild) -> Iterator[Finding]:
    name, backend = f"llama-cpp-python {build.version}", _BACKENDS.get(machine.kind)
    if build.gpus:
        yield Finding("ok", "engine", f"{name} uses {', '.join(gpu.name for gpu in build.gpus)}")
    elif backend is None:
        yield Finding("ok", "engine", f"{name} for the CPU")
    elif build.gpu_offload:
        yield Finding("fail", "engine", f"{name} can use GPUs but finds none", "Check the GPU's driver.")
    else:
        fix = f'CMAKE_ARGS="-DGGML_{backend}=on" {_REBUILD}'
        yield Finding("fail", "engine", f"{name} is built without {backend} and leaves the GPU idle", fix)
    if not build.mtp:
        yield Finding("warn", "mtp", f"{name} lacks what MTP needs: tokens come one at a time", _UPGRADE)


def _processor(machine: Machine, build: LlamaBuild | None) -> Iterator[Finding]:
    """What matters only where the CPU computes."""
    if build is not None and build.amx_is_broken:
        compiler = f"{build.compiler[0]} {'.'.join(map(str, build.compiler[1]))}" if build.compiler else "unknown"
        message = f"AMX is off: this compiler ({compiler}) miscompiles ggml's AMX code, GCC from 14.2 on does not"
        yield Finding("warn", "amx", message, f"CC=gcc-14 CXX=g++-14 {_REBUILD}")
    lacking = [] if build is None else sorted(
        name for flag, name in _FEATURES.items() if flag in machine.features and name not in build.features
    )  # fmt: skip
    if lacking:
        message = f"the CPU has {', '.join(lacking)}, which llama-cpp-python is built without"
        yield Finding("warn", "cpu", message, f'CMAKE_ARGS="-DGGML_NATIVE=on" {_REBUILD}')


def _file(model: Model, build: LlamaBuild | None) -> Iterator[Finding]:
    from stepgguf.cli.output import size

    path = shlex.quote(str(model.path))
    mtp = f", those of {model.mtp_file} included" if model.mtp_file else ""
    blocks = f"{size(model.footprint.weights)}, {len(model.footprint.layers)} blocks{mtp}"
    yield Finding("ok", "file", f"{model.path}: {blocks}")
    yield from _template(model.template, f"stepgguf template {path} Step-3.5-Flash/chat_template.jinja")
    if not model.footprint.has_mtp and (build is None or build.mtp):
        fix = f"stepgguf convert Step-3.5-Flash/ {path} --mtp include --overwrite"
        yield Finding("warn", "mtp", "the file has no MTP blocks, with which answers come faster", fix)
    if model.network:
        message = f"the file is on a network file system ({model.network}): loading takes as long as a download"
        yield Finding("warn", "disk", message, f"cp {path} /a/local/disk/")


def _template(template: str | None, fix: str) -> Iterator[Finding]:
    place = _place(template)
    if isinstance(place, StepggufError):
        yield Finding("fail", "template", place.message, fix)
    elif place == "start":
        message = "the chat template does not open <think>: reasoning is split off only where the model opens it"
        yield Finding("warn", "template", message, fix)


@functools.cache
def _place(template: str | None) -> PromptEnding | StepggufError:
    """Where the prompts of a chat template end, or what is wrong with it."""
    from stepgguf.chat.template import ChatTemplate, prompt_ending

    if template is None:
        return BadMetadata("the file has no chat template, so it cannot chat")
    try:
        return prompt_ending(ChatTemplate(template).probe())
    except StepggufError as error:
        return error


def _limits(machine: Machine, needed: Need) -> Iterator[Finding]:
    """What the system does to a model that fits by its numbers."""
    from stepgguf.cli.output import size

    if machine.kind == "spark":
        message = "files are read and not mapped here: others measured 22 s to load this model, and 224 s through mmap"
        yield Finding("ok", "mmap", message)
    if machine.kind != "gpu" and machine.container_limit and needed.total > machine.container_limit:
        message = f"this container may use {size(machine.container_limit)} of memory"
        yield Finding("fail", "container", message, f"docker run --memory={-(-needed.total // GIB) + 4}g ...")
    if machine.kind != "gpu" and machine.swap and needed.total > machine.ram_available:
        message = f"{size(machine.swap)} of swap: a model that does not fit makes the machine stand still, not fail"
        yield Finding("warn", "swap", message, "sudo swapoff -a")
