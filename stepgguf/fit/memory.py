"""How much memory a model takes in llama.cpp, and how much a machine has for it. Pure arithmetic.

    weights       the tensors of the file
    KV cache      per layer: cells x n_head_kv x (key_length + value_length) x 2 bytes (F16)
                  cells of a full-attention layer   n_ctx, shared by all sequences
                  cells of a sliding layer          window x n_parallel + n_ubatch, at most n_ctx
                  both rounded up to 256 (llama-kv-cache-iswa.cpp, llama-context.cpp)
    MTP           a context of its own: the MTP blocks' cache and compute buffer
    compute       an estimate: what a batch of n_ubatch tokens needs inside a layer, and its logits; see _buffer
    cache         conversations and checkpoints that the engine keeps in RAM, up to a limit of its own; a checkpoint is
                  a copy of the sliding layers' window, to go back to (llama_state_seq_get_data_ext)

Tests hold the KV caches and the estimate against what llama.cpp itself reports for the real model's shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import Machine
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.llama_build import Gpu

F16, F32 = 2, 4
CELLS = 256  # the cache grows in steps of so many cells

# What is left to the system, of a small memory an eighth. Linux: what the 124 of 128 GiB that Strix Halo is set up
# for leave. macOS: its window server and its own wired pages. A GPU of its own: what llama.cpp's --fit leaves
# (common.h, fit_params_target).
LINUX_RESERVE, MACOS_RESERVE, GPU_RESERVE = 4 * GIB, 8 * GIB, 1 * GIB


@dataclass(frozen=True, slots=True)
class Layer:
    n_head_kv: int
    is_sliding: bool
    is_mtp: bool = False


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model's memory depends on. weights: bytes of all tensors, MTP blocks included."""

    weights: int
    layers: tuple[Layer, ...]
    key_length: int
    value_length: int
    window: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_expert_used: int
    expert_size: int
    n_ctx_train: int

    @property
    def has_mtp(self) -> bool:
        return any(layer.is_mtp for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Context:
    """How the model is run: n_parallel sequences in n_ctx cells, batches of n_ubatch. cache_ram in bytes. gpu_layers:
    so many on a GPU with memory of its own; -1 is all."""

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = 512
    cache_ram: int = DEFAULT_CACHE_RAM
    mtp: bool = True
    gpu_layers: int = -1

    @property
    def cells(self) -> int:
        """Of a full-attention layer's cache."""
        return _padded(self.n_ctx)

    def sliding_cells(self, window: int) -> int:
        return _padded(min(self.cells, window * self.n_parallel + self.n_ubatch))


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes. `cache` is in RAM, the rest is where the model runs."""

    weights: int
    kv: int
    mtp: int
    compute: int
    cache: int

    @property
    def device(self) -> int:
        return self.weights + self.kv + self.mtp + self.compute

    @property
    def total(self) -> int:
        return self.device + self.cache


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a model may take on a machine.

    limit: where the model runs, as the machine is set up. ceiling: everywhere, with its settings raised (a GPU of its
    own: with layers left in RAM). free: of limit, now. reserve: what has been taken off for the system.
    """

    limit: int
    ceiling: int
    free: int
    reserve: int


def need(model: Footprint, context: Context) -> Need:
    """What llama.cpp allocates for this model in this context, and what the engine keeps beside it."""
    trunk = [layer for layer in model.layers if not layer.is_mtp]
    heads = [layer for layer in model.layers if layer.is_mtp and context.mtp]
    sliding = context.sliding_cells(model.window)
    experts = model.n_expert_used * (2 * model.n_embd + model.expert_size)
    width = max(experts, 3 * model.n_ff)
    n_outputs = context.n_parallel * (1 + len(heads))  # the next token's and each guess's
    mtp = _buffer(model, context, sliding, 3 * model.n_ff, context.n_parallel) if heads else 0
    return Need(
        weights=model.weights,
        kv=_cache(model, trunk, context),
        mtp=_cache(model, heads, context) + mtp,
        compute=_buffer(model, context, context.cells + sliding, width, n_outputs),
        cache=context.cache_ram,
    )


def checkpoint(model: Footprint) -> int:
    """Bytes of one checkpoint of one sequence: the window of every sliding layer of the trunk."""
    return sum(_row(model, y) * model.window for y in model.layers if y.is_sliding and not y.is_mtp)


def largest_context(model: Footprint, context: Context, n_bytes: int) -> int | None:
    """The longest context, in steps of 1024, with which the model needs at most n_bytes."""
    for n_ctx in range(model.n_ctx_train, 0, -1024):
        if need(model, replace(context, n_ctx=n_ctx)).total <= n_bytes:
            return n_ctx
    return None


def gpu_layers(model: Footprint, needed: Need, n_bytes: int) -> int:
    """How many layers fit a GPU with n_bytes, the compute buffers always being there. Layers count as equally large."""
    layer = math.ceil((needed.weights + needed.kv) / len(model.layers))
    return max(0, (n_bytes - needed.compute - needed.mtp) // layer)


def budget(machine: Machine, gpus: Sequence[Gpu] = ()) -> Budget:
    """What this machine has. `gpus`: what the engine sees, which is preferred to what the machine says of itself."""
    kind = machine.kind
    ram = min(machine.ram, machine.container_limit or machine.ram)
    reserve = min(MACOS_RESERVE if kind == "mac" else LINUX_RESERVE, ram // 8)
    ceiling = ram - reserve
    available = machine.ram_available or machine.ram  # a system that does not tell is taken for idle
    if kind == "mac":
        limit = min(ceiling, gpus[0].total if gpus and gpus[0].total else wired_limit(machine))
        return Budget(limit, ceiling, min(limit, available), reserve)
    if kind == "strix" and machine.amd is not None:
        limit = min(ceiling + machine.amd.vram, machine.amd.gtt + machine.amd.vram)
        free = min(limit, available + machine.amd.vram)
        return Budget(limit, ceiling + machine.amd.vram, free, reserve)
    cards = [gpu for gpu in (gpus or machine.gpus) if gpu.total] if kind != "spark" else []
    if cards:
        limit = sum(max(0, (gpu.total or 0) - GPU_RESERVE) for gpu in cards)
        free = sum(max(0, (gpu.free or 0) - GPU_RESERVE) for gpu in cards)
        return Budget(limit, limit + ceiling, free, GPU_RESERVE)
    return Budget(ceiling, ceiling, min(ceiling, available), reserve)


def wired_limit(machine: Machine) -> int:
    """What macOS lets the GPU have: as set, or at least this by default (newer systems give a bit more)."""
    if machine.wired_limit:
        return machine.wired_limit
    return machine.ram * 3 // 4 if machine.ram > 36 * GIB else machine.ram * 2 // 3


def _row(model: Footprint, layer: Layer) -> int:
    """K and V of one token in one layer."""
    return layer.n_head_kv * (model.key_length + model.value_length) * F16


def _cache(model: Footprint, layers: Sequence[Layer], context: Context) -> int:
    sliding = context.sliding_cells(model.window)
    return sum(_row(model, layer) * (sliding if layer.is_sliding else context.cells) for layer in layers)


def _buffer(model: Footprint, context: Context, masked: int, width: int, n_outputs: int) -> int:
    """The compute buffer: memory is reused along the graph, so one layer counts, and the logits after the last.

    In a layer: attention masks over `masked` cells (F16, as flash attention takes them), two hidden states, and the
    values that a feed-forward network has at a time: of a dense one gate, up and their product, of experts each one's
    gate and twice its output.
    """
    layer = context.n_ubatch * (F16 * masked + F32 * (width + 2 * model.n_embd))
    return layer + F32 * n_outputs * model.n_vocab


def _padded(cells: int) -> int:
    return -(-cells // CELLS) * CELLS
