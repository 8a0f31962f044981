"""How much memory a model takes in llama.cpp, and how much a machine has for it. Pure arithmetic.

    weights       the tensors of the file
    KV cache      per layer: cells x n_head_kv x (key_length + value_length) x 2 bytes (F16)
                  cells of a full-attention layer   n_ctx, shared by all sequences
                  cells of a sliding layer          window x n_parallel + n_ubatch, at most n_ctx
                  both rounded up to 256 (llama-kv-cache-iswa.cpp, llama-context.cpp)
    MTP           a context of its own: the MTP blocks' cache and compute buffer
    compute       an estimate: what a batch of n_ubatch tokens needs inside a layer, and its logits
    cache         conversations and saved states that the engine keeps in RAM, up to a limit of its own; a saved state
                  is a copy of the sliding layers' window for a sequence to go back to (llama_state_seq_get_data_ext)

Tests hold the KV caches and the estimate against what llama.cpp itself reports for the real model's shapes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
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
class LayerFootprint:
    """What a layer's KV cache depends on."""

    n_head_kv: int
    is_sliding: bool
    is_mtp: bool = False


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model's memory depends on. weights: bytes of all tensors, MTP blocks included."""

    weights: int
    layers: tuple[LayerFootprint, ...]
    key_length: int
    value_length: int
    sliding_window: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_expert_used: int
    expert_size: int
    n_ctx_train: int

    @property
    def trunk_layers(self) -> tuple[LayerFootprint, ...]:
        """The layers that every token goes through."""
        return tuple(layer for layer in self.layers if not layer.is_mtp)

    @property
    def mtp_layers(self) -> tuple[LayerFootprint, ...]:
        """The MTP blocks."""
        return tuple(layer for layer in self.layers if layer.is_mtp)

    @property
    def has_mtp(self) -> bool:
        return bool(self.mtp_layers)


@dataclass(frozen=True, slots=True)
class ContextParams:
    """How the model is run, in llama.cpp's terms: n_parallel sequences in n_ctx cells, batches of n_ubatch tokens.

    cache_ram: bytes for conversations that are kept beside the context. gpu_layers: how many layers go to a GPU with
    memory of its own; -1 is all.
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = 512
    cache_ram: int = DEFAULT_CACHE_RAM
    mtp: bool = True
    gpu_layers: int = -1

    @property
    def cells(self) -> int:
        """Cells of a full-attention layer's cache."""
        return _padded_cells(self.n_ctx)

    def sliding_cells(self, sliding_window: int) -> int:
        """Cells of a sliding layer's cache: each sequence's window, and the batch that is being read."""
        return _padded_cells(min(self.cells, sliding_window * self.n_parallel + self.n_ubatch))


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that running a model takes. `cache` is in RAM, the rest is where the model runs."""

    weights: int
    kv: int
    mtp: int
    compute: int
    cache: int

    @property
    def device(self) -> int:
        """Bytes where the model runs: all but the cache of conversations."""
        return self.weights + self.kv + self.mtp + self.compute

    @property
    def total(self) -> int:
        return self.device + self.cache


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that a model may take on a machine.

    limit: where the model runs, as the machine is set up. ceiling: everywhere, with its settings raised (a GPU of its
    own: with layers left in RAM). free: of limit, now. reserve: what has been taken off for the system.
    """

    limit: int
    ceiling: int
    free: int
    reserve: int


def memory_need(model: Footprint, context: ContextParams) -> MemoryNeed:
    """Add up what llama.cpp allocates for this model in this context, and what the engine keeps beside it."""
    mtp_layers = model.mtp_layers if context.mtp else ()
    sliding = context.sliding_cells(model.sliding_window)
    # The widest thing that a layer holds at a time: its chosen experts, or a dense network; see _compute_buffer_bytes.
    experts = model.n_expert_used * (2 * model.n_embd + model.expert_size)
    width = max(experts, 3 * model.n_ff)
    n_outputs = context.n_parallel * (1 + len(mtp_layers))  # the next token's and each guess's
    # An MTP block is dense and sliding, and guesses one token for each sequence.
    mtp_buffer = _compute_buffer_bytes(model, context, sliding, 3 * model.n_ff, context.n_parallel)
    return MemoryNeed(
        weights=model.weights,
        kv=kv_cache_bytes(model, model.trunk_layers, context),
        mtp=kv_cache_bytes(model, mtp_layers, context) + mtp_buffer if mtp_layers else 0,
        compute=_compute_buffer_bytes(model, context, context.cells + sliding, width, n_outputs),
        cache=context.cache_ram,
    )


def kv_cache_bytes(model: Footprint, layers: Sequence[LayerFootprint], context: ContextParams) -> int:
    """Bytes of the KV caches of these layers."""
    sliding = context.sliding_cells(model.sliding_window)
    return sum(_kv_cell_bytes(model, layer) * (sliding if layer.is_sliding else context.cells) for layer in layers)


def saved_state_bytes(model: Footprint) -> int:
    """Bytes of a saved state (llama.cpp: checkpoint) of a sequence: the window of all sliding layers of the trunk."""
    return sum(_kv_cell_bytes(model, layer) * model.sliding_window for layer in model.trunk_layers if layer.is_sliding)


def longest_context(n_ctx_train: int, fits: Callable[[int], bool]) -> int | None:
    """The longest context that fits, in steps of 1024 tokens from n_ctx_train down; None if none does.

    fits: whether a context of so many tokens does. Of two contexts the shorter one fits if the longer one does.
    """
    # What a context takes is not in proportion to it (padding, a window that is full), so it is tried and not solved.
    lengths = range(n_ctx_train, 0, -1024)
    i = bisect_left(lengths, True, key=fits)
    return lengths[i] if i < len(lengths) else None


def largest_context(model: Footprint, context: ContextParams, n_bytes: int) -> int | None:
    """The longest context with which the model needs at most n_bytes; None if none does."""
    return longest_context(
        model.n_ctx_train, lambda n_ctx: memory_need(model, replace(context, n_ctx=n_ctx)).total <= n_bytes
    )


def layers_that_fit(model: Footprint, needed: MemoryNeed, n_bytes: int) -> int:
    """How many layers fit a GPU with n_bytes, the compute buffers always being there. Layers count as equally large."""
    layer_bytes = math.ceil((needed.weights + needed.kv) / len(model.layers))
    return max(0, (n_bytes - needed.compute - needed.mtp) // layer_bytes)


def memory_budget(machine: Machine, gpus: Sequence[Gpu] = ()) -> MemoryBudget:
    """How much of a machine's memory a model may take.

    gpus: those that the engine sees; their figures are preferred to what the machine says of itself.
    """
    kind = machine.kind
    ram = min(machine.ram, machine.container_limit or machine.ram)
    reserve = min(MACOS_RESERVE if kind == "mac" else LINUX_RESERVE, ram // 8)
    ceiling = ram - reserve
    available = machine.ram_available or machine.ram  # a system that does not tell is taken for idle
    if kind == "mac":  # the GPU may wire a part of the RAM: as Metal says where it runs, else by the system's rule
        limit = min(ceiling, gpus[0].total if gpus and gpus[0].total else wired_limit(machine))
        return MemoryBudget(limit, ceiling, min(limit, available), reserve)
    if kind == "strix" and machine.amd is not None:  # memory set aside for the GPU is not in machine.ram
        limit = min(ceiling + machine.amd.vram, machine.amd.gtt + machine.amd.vram)
        free = min(limit, available + machine.amd.vram)
        return MemoryBudget(limit, ceiling + machine.amd.vram, free, reserve)
    cards = [gpu for gpu in (gpus or machine.gpus) if gpu.total] if kind != "spark" else []
    if cards:  # what they cannot hold stays in RAM
        limit = sum(card_budgets(cards))
        free = sum(max(0, (gpu.free or 0) - GPU_RESERVE) for gpu in cards)
        return MemoryBudget(limit, limit + ceiling, free, GPU_RESERVE)
    return MemoryBudget(ceiling, ceiling, min(ceiling, available), reserve)


def card_budgets(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """Bytes that a model may take of each GPU with memory of its own, in their order."""
    return tuple(max(0, gpu.total - GPU_RESERVE) for gpu in gpus if gpu.total)


def wired_limit(machine: Machine) -> int:
    """What macOS lets the GPU have: as set, or at least this by default (newer systems give a bit more)."""
    if machine.wired_limit:
        return machine.wired_limit
    return machine.ram * 3 // 4 if machine.ram > 36 * GIB else machine.ram * 2 // 3


def _kv_cell_bytes(model: Footprint, layer: LayerFootprint) -> int:
    """Bytes of K and V of one token in one layer."""
    return layer.n_head_kv * (model.key_length + model.value_length) * F16


def _compute_buffer_bytes(model: Footprint, context: ContextParams, masked: int, width: int, n_outputs: int) -> int:
    """The compute buffer: memory is reused along the graph, so one layer counts, and the logits after the last.

    In a layer: attention masks over `masked` cells (F16, as flash attention takes them), two hidden states, and the
    values that a feed-forward network has at a time: of a dense one gate, up and their product, of experts each one's
    gate and twice its output.
    """
    in_layer = context.n_ubatch * (F16 * masked + F32 * (width + 2 * model.n_embd))
    return in_layer + F32 * n_outputs * model.n_vocab


def _padded_cells(cells: int) -> int:
    return -(-cells // CELLS) * CELLS
