"""Whether a model fits this machine in a context: doctor reports it, chat, serve and bench ask before they load."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepgguf.errors import DoesNotFit
from stepgguf.fit import machine as machines
from stepgguf.fit.footprint import footprint, with_mtp_file
from stepgguf.fit.machine import Machine
from stepgguf.fit.memory import (
    CACHE_RAM,
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
from stepgguf.runtime.llama_build import LlamaBuild

if TYPE_CHECKING:
    from stepgguf.convert.sizes import Inventory

_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")  # large to small
_SHORT = 4096  # a context below this is no help: thinking alone takes more
SHARED = {"spark": "DGX Spark", "mac": "Mac", "strix": "Strix Halo"}  # CPU and GPU have one memory


@dataclass(frozen=True, slots=True)
class Finding:
    """fix: a command, or what else to do."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a file, of a split one the first, says of itself. mtp_file: what its MTP blocks are in, if that is another
    file; footprint has both. verb: of the command that runs it."""

    path: Path
    footprint: Footprint
    template: str | None
    network: str | None
    inventory: Inventory
    mtp_file: Path | None = None
    verb: str = "chat"

    @property
    def sizes(self) -> Iterator[tuple[str, int]]:
        """The bytes that it would have as other types, large to small."""
        return ((name, self.inventory.sizes(name).total) for name in _TYPES)

    def command(self, options: str) -> str:
        return f"stepgguf {self.verb} {shlex.quote(str(self.path))} {options}"


def read_model(path: Path, mtp_file: Path | None = None, *, verb: str = "chat") -> Model:
    """Read the header of a file, or of all files of a split one. Raises what is wrong with it.

    mtp_file None: one whose name says that it belongs to this model is found beside it; see mtp_beside.
    """
    from stepgguf.convert import sizes
    from stepgguf.convert.metadata import CHAT_TEMPLATE
    from stepgguf.convert.sources.gguf_file import GGUFSource

    with GGUFSource(path) as source:
        size, inventory = footprint(source), sizes.inventory(source)
        template = source.keys[CHAT_TEMPLATE].value if CHAT_TEMPLATE in source.keys else None
        first = source.headers[0].path
    mtp_file = mtp_file or (None if size.has_mtp else mtp_beside(path))
    if mtp_file is not None:
        with GGUFSource(mtp_file) as heads:
            size = with_mtp_file(size, heads)
    return Model(
        first,
        size,
        template if isinstance(template, str) else None,
        machines.network_filesystem(path),
        inventory,
        mtp_file,
        verb,
    )


def mtp_beside(path: Path) -> Path | None:
    """The MTP file of a model, where and as `convert --mtp separate` writes it: mtp-NAME, whole or split."""
    from stepgguf.convert.planner import mtp_path
    from stepgguf.convert.sources.splits import model_stem

    whole = mtp_path(path.with_name(f"{model_stem(path)}.gguf"))
    splits = sorted(whole.parent.glob(f"{glob.escape(whole.stem)}-00001-of-*.gguf"))
    return next((file for file in (whole, *splits) if file.is_file()), None)


def refuse(model: Model, findings: Iterable[Finding]) -> None:
    """DoesNotFit for the first one, if there is any."""
    for finding in findings:
        raise DoesNotFit(f"{model.path}: {finding.message}", hint=f"{finding.fix}  (--force loads it all the same)")


def context_length(model: Model, n_ctx: int) -> Finding:
    """Whether the model was trained for so many tokens in one conversation."""
    most = model.footprint.n_ctx_train
    if n_ctx <= most:
        return Finding("ok", "context", f"{n_ctx:,} of the {most:,} tokens that the model was trained for")
    message = f"a context of {n_ctx:,} tokens is longer than the {most:,} that the model was trained for"
    return Finding("fail", "context", message, model.command(f"--ctx {most}"))


def memory(machine: Machine, build: LlamaBuild | None, model: Model, context: Context) -> Finding:
    """What it takes and what there is. fail: the machine does not have it; warn: not as things are now."""
    from stepgguf.cli.output import size

    if machine.kind == "gpu" and build is not None and not build.gpus:
        machine = replace(machine, gpus=())  # this engine does not use them
    needed, have = need(model.footprint, context), budget(machine, build.gpus if build else ())
    device = needed.device - _left_in_ram(machine, model, context, needed)
    parts = [f"{size(needed.weights)} weights", f"{size(needed.kv)} KV cache for {context.n_ctx:,} tokens"]
    parts += [f"{size(needed.mtp)} MTP"] if needed.mtp else []
    parts.append(f"{size(needed.compute)} buffers (estimate)")
    parts.append(f"{size(needed.cache)} conversation cache ({size(checkpoint(model.footprint))} a checkpoint)")
    message = f"{size(needed.total)} = {' + '.join(parts)}"
    kept = f"{size(have.reserve)} is left to the system"
    if not machine.ram:
        return Finding("ok", "memory", f"{message}; how much memory this system has is not known")
    if needed.total > have.ceiling:
        fix = _smaller(model, context, needed, have)
        return Finding("fail", "memory", f"{message}; there is {size(have.ceiling)} ({kept})", fix)
    if device > have.limit:
        level: Literal["warn", "fail"] = "fail" if machine.kind in SHARED else "warn"
        message += f"; the GPU may have {size(have.limit)}"
        return Finding(level, "memory", message, _raise_limit(machine, model, needed, have))
    if device > have.free:
        message += f"; of {size(have.limit)} only {size(have.free)} is free now"
        return Finding("warn", "memory", message, _with_less(machine, model, context, needed, have))
    return Finding("ok", "memory", f"{message}; there is {size(have.limit)} ({kept})")


def _left_in_ram(machine: Machine, model: Model, context: Context, needed: Need) -> int:
    """Bytes of the layers that --gpu-layers keeps off a GPU with memory of its own. Layers count as equally large."""
    n_layers = len(model.footprint.layers)
    if machine.kind != "gpu" or not 0 <= context.gpu_layers < n_layers:
        return 0
    return (needed.weights + needed.kv) * (n_layers - context.gpu_layers) // n_layers


def _smaller(model: Model, context: Context, needed: Need, have: Budget) -> str:
    """A smaller conversation cache if it was made larger, else a shorter context, else the largest type that fits."""
    from stepgguf.cli.output import size

    room = have.ceiling - needed.device
    if context.cache_ram > CACHE_RAM and room >= 0:
        return model.command(f"--ctx {context.n_ctx} --cache-ram {room // 2**20}MiB")
    n_ctx = largest_context(model.footprint, context, have.ceiling)
    if n_ctx is not None and n_ctx >= _SHORT:
        return model.command(f"--ctx {n_ctx}")
    for name, n_bytes in model.sizes:
        if needed.total - needed.weights + n_bytes <= have.ceiling:
            return f"stepgguf convert Step-3.5-Flash/ . --type {name}  # {size(n_bytes)}"
    return "This machine is too small for this model, whatever its type."


def _with_less(machine: Machine, model: Model, context: Context, needed: Need, have: Budget) -> str:
    """The model fits the memory, but not what is free of it now."""
    if machine.kind == "gpu":
        return f"Close other programs, or: {_fewer_layers(model, needed, have)}"
    n_ctx = largest_context(model.footprint, context, have.free + needed.cache)
    if n_ctx is None or n_ctx < _SHORT:
        return "Close other programs."
    return f"Close other programs, or: {model.command(f'--ctx {n_ctx}')}"


def _fewer_layers(model: Model, needed: Need, have: Budget) -> str:
    return model.command(f"--gpu-layers {gpu_layers(model.footprint, needed, have.free)}")


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
    return _fewer_layers(model, needed, have)
