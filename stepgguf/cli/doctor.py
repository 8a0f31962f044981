"""stepgguf doctor: can this machine run this model well? Each finding comes with what fixes it.

    probes (machine, llama_build, the file's header)  ->  examine()  ->  findings  ->  lines or JSON

The probes are taken once; everything after them is a function of what they say.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stepgguf.cli import arguments
from stepgguf.cli.footprint import footprint
from stepgguf.errors import BadMetadata, StepggufError
from stepgguf.runtime import llama_build
from stepgguf.runtime import machine as machines
from stepgguf.runtime.llama_build import LlamaBuild
from stepgguf.runtime.machine import Machine
from stepgguf.runtime.memory import (
    GIB,
    GPU_RESERVE,
    LINUX_RESERVE,
    Budget,
    Context,
    Footprint,
    Need,
    budget,
    checkpoint,
    gpu_layers,
    largest_context,
    need,
)  # fmt: skip

if TYPE_CHECKING:
    from stepgguf.chat.template import Place
    from stepgguf.convert.ggufsource import GGUFSource

_UPGRADE = "pip install --upgrade 'llama-cpp-python>=0.3.36'"
_REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_SHARED = {"spark": "DGX Spark", "mac": "Mac", "strix": "Strix Halo"}  # CPU and GPU have one memory
_BACKENDS = {"spark": "CUDA", "gpu": "CUDA", "mac": "METAL", "strix": "VULKAN"}  # GGML_<this>=on
_FEATURES = {  # as the kernel names them -> as llama.cpp does; those that its matrix products use
    "avx2": "AVX2", "fma": "FMA", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "amx_int8": "AMX_INT8",
    "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE",
}  # fmt: skip
_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")  # large to small
_SHORT = 4096  # a context below this is no help: thinking alone takes more


@dataclass(frozen=True, slots=True)
class Finding:
    """fix: a command, or what else to do."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a file says of itself. place: where its chat template's prompts end, or else what is wrong with it.
    sizes: the bytes that it would have as other types, large to small."""

    path: Path
    footprint: Footprint
    place: Place | StepggufError
    network: str | None
    sizes: tuple[tuple[str, int], ...]

    def command(self, options: str) -> str:
        return f"stepgguf chat {shlex.quote(str(self.path))} {options}"


def doctor(
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE.gguf", help="The model to run; of a split one, any of its files.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(min=64, help="Context in tokens. Default: the model's, at most 32768.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 1,
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
            model = read_model(path)
        except StepggufError as error:
            findings.append(Finding("fail", "file", error.message, error.hint))
        else:
            n_ctx = ctx or min(model.footprint.n_ctx_train, 32768)
            context = Context(n_ctx, parallel, mtp=build is None or build.mtp)
    findings = [*examine(here, build, model, context), *findings]
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


def read_model(path: Path) -> Model:
    """Read the header of a file, or of all files of a split one. Raises what is wrong with it."""
    from stepgguf.convert.ggufsource import GGUFSource
    from stepgguf.convert.metadata import CHAT_TEMPLATE

    with GGUFSource(path) as source:
        return Model(
            path,
            footprint(source),
            _place(source.keys[CHAT_TEMPLATE].value if CHAT_TEMPLATE in source.keys else None),
            machines.network_filesystem(path),
            tuple(_sizes(source)),
        )


def _place(template: object) -> Place | StepggufError:
    from stepgguf.chat.template import ChatTemplate, place_of

    if not isinstance(template, str):
        return BadMetadata("the file has no chat template, so it cannot chat")
    try:
        return place_of(ChatTemplate(template).probe())
    except StepggufError as error:
        return error


def _sizes(source: GGUFSource) -> Iterator[tuple[str, int]]:
    from stepgguf.convert import sizes

    inventory = sizes.inventory(source)
    return ((name, inventory.sizes(name).total) for name in _TYPES)


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
        needed = need(model.footprint, context)
        have = budget(machine, build.gpus if build else ())
        if context.n_ctx > model.footprint.n_ctx_train:
            message = f"{context.n_ctx:,} tokens are more than the {model.footprint.n_ctx_train:,} it was trained for"
            yield Finding("warn", "context", message, model.command(f"--ctx {model.footprint.n_ctx_train}"))
        yield _memory(machine, model, context, needed, have)
        yield from _limits(machine, model, needed)


def _machine(machine: Machine) -> Finding:
    from stepgguf.cli.output import size

    parts = [_SHARED[machine.kind]] if machine.kind in _SHARED else []
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
    yield Finding("ok", "file", f"{model.path}: {size(model.footprint.weights)}, {len(model.footprint.layers)} blocks")
    fix = f"stepgguf template {path} Step-3.5-Flash/chat_template.jinja"
    if isinstance(model.place, StepggufError):
        yield Finding("fail", "template", model.place.message, fix)
    elif model.place == "start":
        message = "the chat template does not open <think>: reasoning is split off only where the model opens it"
        yield Finding("warn", "template", message, fix)
    if not model.footprint.has_mtp and (build is None or build.mtp):
        fix = f"stepgguf convert Step-3.5-Flash/ {path} --mtp include --overwrite"
        yield Finding("warn", "mtp", "the file has no MTP blocks, with which answers come faster", fix)
    if model.network:
        message = f"the file is on a network file system ({model.network}): loading takes as long as a download"
        yield Finding("warn", "disk", message, f"cp {path} /a/local/disk/")


def _memory(machine: Machine, model: Model, context: Context, needed: Need, have: Budget) -> Finding:
    from stepgguf.cli.output import size

    parts = [f"{size(needed.weights)} weights", f"{size(needed.kv)} KV cache for {context.n_ctx:,} tokens"]
    parts += [f"{size(needed.mtp)} MTP"] if needed.mtp else []
    parts.append(f"{size(needed.compute)} buffers (estimate)")
    parts.append(f"{size(needed.cache)} conversation cache ({size(checkpoint(model.footprint))} a checkpoint)")
    message = f"{size(needed.total)} = {' + '.join(parts)}"
    kept = f"{size(have.reserve)} is left to the system"
    if needed.total > have.ceiling:
        return Finding(
            "fail",
            "memory",
            f"{message}; there is {size(have.ceiling)} ({kept})",
            _smaller(model, context, needed, have),
        )
    if needed.device > have.limit:
        level: Literal["warn", "fail"] = "fail" if machine.kind in _SHARED else "warn"
        message += f"; the GPU may have {size(have.limit)}"
        return Finding(level, "memory", message, _raise_limit(machine, model, needed, have))
    if needed.device > have.free:
        message += f"; of {size(have.limit)} only {size(have.free)} is free now"
        return Finding("warn", "memory", message, "Close other programs.")
    return Finding("ok", "memory", f"{message}; there is {size(have.limit)} ({kept})")


def _smaller(model: Model, context: Context, needed: Need, have: Budget) -> str:
    """A shorter context if that is enough, else the largest type that is."""
    from stepgguf.cli.output import size

    n_ctx = largest_context(model.footprint, context, have.ceiling)
    if n_ctx is not None and n_ctx >= _SHORT:
        return model.command(f"--ctx {n_ctx}")
    for name, n_bytes in model.sizes:
        if needed.total - needed.weights + n_bytes <= have.ceiling:
            return f"stepgguf convert Step-3.5-Flash/ . --type {name}  # {size(n_bytes)}"
    return "This machine is too small for this model, whatever its type."


def _raise_limit(machine: Machine, model: Model, needed: Need, have: Budget) -> str:
    """The model fits the memory, but not the part of it that the GPU may use."""
    if machine.kind == "mac":
        wanted = -(-(needed.device + GPU_RESERVE) // GIB) * GIB
        return f"sudo sysctl iogpu.wired_limit_mb={min(wanted, have.ceiling) // 2**20}  # until the next start"
    if machine.kind == "strix":
        installed = -(-machine.ram // (16 * GIB)) * 16 * GIB  # /proc/meminfo leaves out what the kernel took first
        mapped = installed - LINUX_RESERVE
        parameters = f"amdgpu.gttsize={mapped // 2**20} ttm.pages_limit={mapped // 4096}"
        return f"Add to the kernel's command line and restart: {parameters}"
    return model.command(f"--gpu-layers {gpu_layers(model.footprint, needed, have.limit)}")


def _limits(machine: Machine, model: Model, needed: Need) -> Iterator[Finding]:
    """What the system does to a model that fits by its numbers."""
    from stepgguf.cli.output import size

    if machine.kind == "spark":
        message = "loading through mmap is slow here: 224 s were measured, and 22 s without"
        yield Finding("warn", "mmap", message, model.command("--no-mmap"))
    if machine.kind != "gpu" and machine.container_limit and needed.total > machine.container_limit:
        message = f"this container may use {size(machine.container_limit)} of memory"
        yield Finding("fail", "container", message, f"docker run --memory={-(-needed.total // GIB) + 4}g ...")
    if machine.kind != "gpu" and machine.swap and needed.total > machine.ram_available:
        message = f"{size(machine.swap)} of swap: a model that does not fit makes the machine stand still, not fail"
        yield Finding("warn", "swap", message, "sudo swapoff -a")
