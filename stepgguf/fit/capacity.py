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
from stepgguf.fit.choice import Room, describe, engine_budget, free_room, whole_room
from stepgguf.fit.machine import Machine
from stepgguf.fit.memory import (
    GPU_RESERVE,
    LINUX_RESERVE,
    ContextParams,
    MemoryBudget,
    MemoryNeed,
    memory_need,
    saved_state_bytes,
)
from stepgguf.fit.model_file import ModelFile
from stepgguf.fit.placement import PlacedModel
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.llama_build import LlamaBuild
from stepgguf.runtime.placement import Attention, Placement

_SMALL_CACHE = "--cache-type-k q8_0 --cache-type-v q8_0"
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

    What the context's placement leaves open is chosen so that it fits, if it can be; see choice.py. build None: what
    the engine can use is not known, so the machine's own figures count.
    """
    needed, have = memory_need(model.footprint, context), engine_budget(machine, build)
    message = _memory_sum(model, context, needed)
    reserve = f"{readable_size(have.reserve)} is left to the system"
    limit, free = readable_size(have.limit), readable_size(have.free)
    if not machine.ram:
        return Finding("ok", "memory", f"{message}; how much memory this system has is not known")
    whole, now = whole_room(machine, build), free_room(machine, build)
    if needed.total > have.ceiling:  # whatever is set up and closed, it cannot fit
        message += f"; there is {readable_size(have.ceiling)} ({reserve})"
        return Finding("fail", "memory", message, _suggest_smaller(model, context, needed, whole))
    if whole.cards:
        return _check_cards(model, context, message, whole, now)
    if needed.device > have.limit:  # where CPU and GPU share their memory the rest of it is out of the model's reach
        message += f"; the GPU may have {limit}"
        return Finding("fail", "memory", message, _suggest_larger_limit(machine, needed, have))
    if needed.device > have.free:
        message += f"; of {limit} only {free} is free now"
        return Finding("warn", "memory", message, _suggest_closing_programs(model, context, now))
    return Finding("ok", "memory", f"{message}; there is {limit} ({reserve})")


def _check_cards(model: ModelFile, context: ContextParams, message: str, whole: Room, now: Room) -> Finding:
    """check_memory where cards have memory of their own, and RAM beside it takes what they cannot hold."""
    placed = now.place(model, context)
    if placed is not None:
        where = ", ".join(describe(placed, model))
        there = f"{readable_size(sum(now.cards))} free on cards and {readable_size(now.ram)} in RAM"
        return Finding("ok", "memory", f"{message}; there is {there}: {where}")
    if whole.fits(model, context):
        message += f"; of {readable_size(sum(whole.cards))} on cards only {readable_size(sum(now.cards))} is free now"
        return Finding("warn", "memory", message, _suggest_closing_programs(model, context, now))
    message += f"; there is {readable_size(sum(whole.cards))} on cards and {readable_size(whole.ram)} in RAM"
    placed = whole.place(model, _unplaced(context))
    if placed is None:
        needed = memory_need(model.footprint, context)
        return Finding("fail", "memory", message, _suggest_smaller(model, context, needed, whole))
    return Finding("fail", "memory", f"{message}, but not where it was to go", _with_placement(model, placed))


def _unplaced(context: ContextParams) -> ContextParams:
    """The same with every choice of what goes where left open, but for tensors that were named."""
    return replace(context, placement=Placement(overrides=context.placement.overrides))


def _with_placement(model: ModelFile, placed: PlacedModel) -> str:
    return model.command_with(" ".join(replace(placed.placement, overrides=()).arguments()))


def _memory_sum(model: ModelFile, context: ContextParams, needed: MemoryNeed) -> str:
    """ "110.2 GiB = 106.2 GiB weights + ...". MTP has a part where there are MTP blocks."""
    saved_state = readable_size(saved_state_bytes(model.footprint, context.attention))
    parts = [
        (needed.weights, "weights"),
        (needed.kv, f"KV cache for {context.n_ctx:,} tokens{_cache_types(context.attention)}"),
        *([(needed.mtp, "MTP")] if needed.mtp else []),
        (needed.compute, "buffers (estimate)"),
        (needed.cache, f"conversation cache ({saved_state} a saved state)"),
    ]
    return f"{readable_size(needed.total)} = " + " + ".join(f"{readable_size(n)} {what}" for n, what in parts)


def _cache_types(attention: Attention) -> str:
    """ " in q8_0 and q4_0" for keys and values; nothing of F16."""
    types = dict.fromkeys((attention.cache_type_k, attention.cache_type_v))
    return "" if list(types) == ["f16"] else f" in {' and '.join(types)}"


def _suggest_smaller(model: ModelFile, context: ContextParams, needed: MemoryNeed, whole: Room) -> str:
    """A smaller conversation cache if it was made larger, else a shorter context, or a longer one in fewer bits, else
    the largest type that fits."""
    room = whole.total - needed.device
    if context.cache_ram > DEFAULT_CACHE_RAM and room >= 0:
        return model.command_with(f"--ctx {context.n_ctx} --cache-ram {room // MIB}MiB")
    n_ctx = whole.longest_context(model, context) or 0
    n_small = min(whole.longest_context(model, _with_small_cache(context)) or 0, context.n_ctx)
    if n_ctx >= _SHORT_CTX:
        longer = f"  # or --ctx {n_small} {_SMALL_CACHE}" if n_small > n_ctx else ""
        return model.command_with(f"--ctx {n_ctx}") + longer
    if n_small >= _SHORT_CTX:
        return model.command_with(f"--ctx {n_small} {_SMALL_CACHE}")
    for name, n_bytes in model.sizes_by_type:
        if needed.total - needed.weights + n_bytes <= whole.total:
            return f"stepgguf convert Step-3.5-Flash/ . --type {name}  # {readable_size(n_bytes)}"
    return "This machine is too small for this model, whatever its type."


def _with_small_cache(context: ContextParams) -> ContextParams:
    """The context with keys and values in 8 bits, if they have more and flash attention is not switched off."""
    attention = replace(context.attention, cache_type_k="q8_0", cache_type_v="q8_0")
    is_smaller = context.attention.is_plain and attention.is_possible
    return replace(context, attention=attention) if is_smaller else context


def _suggest_closing_programs(model: ModelFile, context: ContextParams, now: Room) -> str:
    """What to do where the model fits the memory, but not the part of it that is free now."""
    if now.cards and (placed := now.place(model, _unplaced(context))) is not None:
        return f"Close other programs, or: {_with_placement(model, placed)}"
    n_ctx = now.longest_context(model, context)
    if n_ctx is None or n_ctx < _SHORT_CTX:
        return "Close other programs."
    return f"Close other programs, or: {model.command_with(f'--ctx {n_ctx}')}"


def _suggest_larger_limit(machine: Machine, needed: MemoryNeed, have: MemoryBudget) -> str:
    """What to do where the model fits the memory, but not the part of it that the GPU may use."""
    if machine.kind == "mac":
        wanted = -(-(needed.device + GPU_RESERVE) // GIB) * GIB
        return f"sudo sysctl iogpu.wired_limit_mb={min(wanted, have.ceiling) // MIB}  # until the next start"
    installed = -(-machine.ram // (16 * GIB)) * 16 * GIB  # /proc/meminfo leaves out what the kernel took first
    mapped = installed - LINUX_RESERVE
    parameters = f"amdgpu.gttsize={mapped // MIB} ttm.pages_limit={mapped // 4096}"
    return f"Add to the kernel's command line and restart: {parameters}"
