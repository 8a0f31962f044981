"""Whether a model fits this machine in a context: doctor reports it, chat, serve and bench ask before they load.

Machine, LlamaBuild  -> MemoryBudget --+
ModelFile, ContextParams -> MemoryNeed +-> Finding: ok, warn (not as things are now), fail; and what mends it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from stepgguf.errors import DoesNotFit
from stepgguf.files.byte_sizes import GIB, MIB, readable_size
from stepgguf.fit.machine import SHARED_MEMORY, Machine
from stepgguf.fit.memory import (
    GPU_RESERVE,
    LINUX_RESERVE,
    ContextParams,
    MemoryBudget,
    MemoryNeed,
    largest_context,
    layers_that_fit,
    memory_budget,
    memory_need,
    saved_state_bytes,
)
from stepgguf.fit.model_file import ModelFile
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.llama_build import LlamaBuild

_SHORT_CTX = 4096  # a context below this is no help: the reasoning alone takes more


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis. fix: a command, or what else to do."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    fix: str | None = None


def refuse_to_load(model: ModelFile, findings: Iterable[Finding]) -> None:
    """Raise DoesNotFit for the first finding, if there is any."""
    for finding in findings:
        raise DoesNotFit(f"{model.path}: {finding.message}", hint=f"{finding.fix}  (--force loads it all the same)")


def check_context_length(model: ModelFile, n_ctx: int) -> Finding:
    """Whether the model was trained for so many tokens in one conversation."""
    most = model.footprint.n_ctx_train
    if n_ctx <= most:
        return Finding("ok", "context", f"{n_ctx:,} of the {most:,} tokens that the model was trained for")
    message = f"a context of {n_ctx:,} tokens is longer than the {most:,} that the model was trained for"
    return Finding("fail", "context", message, model.command_with(f"--ctx {most}"))


def check_memory(machine: Machine, build: LlamaBuild | None, model: ModelFile, context: ContextParams) -> Finding:
    """Weigh what the model takes against what there is. fail: the machine lacks it; warn: it is not free now.

    build None: what the engine can use is not known, so the machine's own figures count.
    """
    if machine.kind == "gpu" and build is not None and not build.gpus:
        machine = replace(machine, gpus=())  # this engine does not use them
    needed, have = memory_need(model.footprint, context), memory_budget(machine, build.gpus if build else ())
    device = needed.device - _left_in_ram(machine, model, context, needed)
    message = _memory_sum(model, context, needed)
    reserve = f"{readable_size(have.reserve)} is left to the system"
    limit, free = readable_size(have.limit), readable_size(have.free)
    if not machine.ram:
        return Finding("ok", "memory", f"{message}; how much memory this system has is not known")
    if needed.total > have.ceiling:  # whatever is set up and closed, it cannot fit
        message += f"; there is {readable_size(have.ceiling)} ({reserve})"
        return Finding("fail", "memory", message, _suggest_smaller(model, context, needed, have))
    if device > have.limit:  # where CPU and GPU share their memory the rest of it is out of the model's reach
        level: Literal["warn", "fail"] = "fail" if machine.kind in SHARED_MEMORY else "warn"
        message += f"; the GPU may have {limit}"
        return Finding(level, "memory", message, _suggest_larger_limit(machine, model, needed, have))
    if device > have.free:
        message += f"; of {limit} only {free} is free now"
        return Finding("warn", "memory", message, _suggest_closing_programs(machine, model, context, needed, have))
    return Finding("ok", "memory", f"{message}; there is {limit} ({reserve})")


def _memory_sum(model: ModelFile, context: ContextParams, needed: MemoryNeed) -> str:
    """ "110.2 GiB = 106.2 GiB weights + ...". MTP has a part where there are MTP blocks."""
    saved_state = readable_size(saved_state_bytes(model.footprint))
    parts = [
        (needed.weights, "weights"),
        (needed.kv, f"KV cache for {context.n_ctx:,} tokens"),
        *([(needed.mtp, "MTP")] if needed.mtp else []),
        (needed.compute, "buffers (estimate)"),
        (needed.cache, f"conversation cache ({saved_state} a saved state)"),
    ]
    return f"{readable_size(needed.total)} = " + " + ".join(f"{readable_size(n)} {what}" for n, what in parts)


def _left_in_ram(machine: Machine, model: ModelFile, context: ContextParams, needed: MemoryNeed) -> int:
    """Bytes of the layers that --gpu-layers keeps off a GPU with memory of its own. Layers count as equally large."""
    n_layers = len(model.footprint.layers)
    if machine.kind != "gpu" or not 0 <= context.gpu_layers < n_layers:
        return 0
    return (needed.weights + needed.kv) * (n_layers - context.gpu_layers) // n_layers


def _suggest_smaller(model: ModelFile, context: ContextParams, needed: MemoryNeed, have: MemoryBudget) -> str:
    """A smaller conversation cache if it was made larger, else a shorter context, else the largest type that fits."""
    room = have.ceiling - needed.device
    if context.cache_ram > DEFAULT_CACHE_RAM and room >= 0:
        return model.command_with(f"--ctx {context.n_ctx} --cache-ram {room // MIB}MiB")
    n_ctx = largest_context(model.footprint, context, have.ceiling)
    if n_ctx is not None and n_ctx >= _SHORT_CTX:
        return model.command_with(f"--ctx {n_ctx}")
    for name, n_bytes in model.sizes_by_type:
        if needed.total - needed.weights + n_bytes <= have.ceiling:
            return f"stepgguf convert Step-3.5-Flash/ . --type {name}  # {readable_size(n_bytes)}"
    return "This machine is too small for this model, whatever its type."


def _suggest_closing_programs(
    machine: Machine, model: ModelFile, context: ContextParams, needed: MemoryNeed, have: MemoryBudget
) -> str:
    """What to do where the model fits the memory, but not the part of it that is free now."""
    if machine.kind == "gpu":
        return f"Close other programs, or: {_with_fewer_gpu_layers(model, needed, have)}"
    # The conversation cache is in the total and grows later: only what runs the model has to be free now.
    n_ctx = largest_context(model.footprint, context, have.free + needed.cache)
    if n_ctx is None or n_ctx < _SHORT_CTX:
        return "Close other programs."
    return f"Close other programs, or: {model.command_with(f'--ctx {n_ctx}')}"


def _suggest_larger_limit(machine: Machine, model: ModelFile, needed: MemoryNeed, have: MemoryBudget) -> str:
    """What to do where the model fits the memory, but not the part of it that the GPU may use."""
    if machine.kind == "mac":
        wanted = -(-(needed.device + GPU_RESERVE) // GIB) * GIB
        return f"sudo sysctl iogpu.wired_limit_mb={min(wanted, have.ceiling) // MIB}  # until the next start"
    if machine.kind == "strix":
        installed = -(-machine.ram // (16 * GIB)) * 16 * GIB  # /proc/meminfo leaves out what the kernel took first
        mapped = installed - LINUX_RESERVE
        parameters = f"amdgpu.gttsize={mapped // MIB} ttm.pages_limit={mapped // 4096}"
        return f"Add to the kernel's command line and restart: {parameters}"
    return _with_fewer_gpu_layers(model, needed, have)


def _with_fewer_gpu_layers(model: ModelFile, needed: MemoryNeed, have: MemoryBudget) -> str:
    return model.command_with(f"--gpu-layers {layers_that_fit(model.footprint, needed, have.free)}")
