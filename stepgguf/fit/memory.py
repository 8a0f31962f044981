"""How much memory a model takes in llama.cpp, and how much a machine has for it. Pure arithmetic.

    weights       the tensors of the file
    KV cache      per layer: cells x n_head_kv x (key_length, value_length), in F16 or in blocks of the types that
                  --cache-type-k and --cache-type-v name (q8_0: 34 bytes for 32 values)
                  cells of a full-attention layer   n_ctx, shared by all sequences
                  cells of a sliding layer          window x n_parallel + n_ubatch, at most n_ctx
                  both rounded up to 256 (llama-kv-cache-iswa.cpp, llama-context.cpp)
    MTP           a context of its own: the MTP blocks' cache, in F16, and compute buffer
    compute       an estimate: what a batch of n_ubatch tokens needs inside a layer, and its logits; without flash
                  attention also the scores of all heads, for each token over all cells
    cache         conversations and saved states that the engine keeps in RAM, up to a limit of its own; a saved state
                  is a copy of the sliding layers' window for a sequence to go back to (llama_state_seq_get_data_ext)

Tests hold the KV caches and the estimate against what llama.cpp itself reports for the real model's shapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from stepgguf.files.byte_sizes import GIB, MIB
from stepgguf.fit.machine import Machine
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM
from stepgguf.runtime.llama_build import Gpu
from stepgguf.runtime.placement import DEFAULT_UBATCH, Attention, CacheType, Placement

F16, F32 = 2, 4
_CACHE_BLOCKS: dict[CacheType, tuple[int, int]] = {  # values of a block, and its bytes
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip
CELLS = 256  # the cache grows in steps of so many cells

# What is left to the system, of a small memory an eighth, and at least what this program itself takes. Linux: what the
# 124 of 128 GiB that Strix Halo is set up for leave. macOS: its window server and its own wired pages. A GPU of its
# own: what llama.cpp's --fit leaves (common.h, fit_params_target).
LINUX_RESERVE, MACOS_RESERVE, GPU_RESERVE, LEAST_RESERVE = 4 * GIB, 8 * GIB, 1 * GIB, 192 * MIB


@dataclass(frozen=True, slots=True)
class LayerFootprint:
    """What a layer's KV cache depends on, and the scores of its attention."""

    n_head: int
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

    cache_ram: bytes for conversations that are kept beside the context. placement: what is set of where tensors go.
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = DEFAULT_UBATCH
    cache_ram: int = DEFAULT_CACHE_RAM
    mtp: bool = True
    attention: Attention = field(default_factory=Attention)
    placement: Placement = field(default_factory=Placement)

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
    mtp_buffer = _compute_buffer_bytes(model, context, mtp_layers, sliding, 3 * model.n_ff, context.n_parallel)
    return MemoryNeed(
        weights=model.weights,
        kv=kv_cache_bytes(model, model.trunk_layers, context),
        mtp=mtp_cache_bytes(model, context) + mtp_buffer if mtp_layers else 0,
        compute=_compute_buffer_bytes(model, context, model.trunk_layers, context.cells + sliding, width, n_outputs),
        cache=context.cache_ram,
    )


def kv_cache_bytes(model: Footprint, layers: Sequence[LayerFootprint], context: ContextParams) -> int:
    """Bytes of the KV caches of these layers."""
    return sum(
        _kv_cell_bytes(model, layer, context.attention) * _layer_cells(model, layer, context) for layer in layers
    )


def mtp_cache_bytes(model: Footprint, context: ContextParams) -> int:
    """Bytes of the KV caches of the MTP blocks."""
    return kv_cache_bytes(model, model.mtp_layers, replace(context, attention=context.attention.of_mtp))


def saved_state_bytes(model: Footprint, attention: Attention) -> int:
    """Bytes of a saved state (llama.cpp: checkpoint) of a sequence: the window of all sliding layers of the trunk."""
    sliding = (layer for layer in model.trunk_layers if layer.is_sliding)
    return sum(_kv_cell_bytes(model, layer, attention) * model.sliding_window for layer in sliding)


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


def memory_budget(machine: Machine, gpus: Sequence[Gpu] = ()) -> MemoryBudget:
    """How much of a machine's memory a model may take.

    gpus: those that the engine sees; their figures are preferred to what the machine says of itself.
    """
    kind = machine.kind
    ram = min(machine.ram, machine.container_limit or machine.ram)
    reserve = min(MACOS_RESERVE if kind == "mac" else LINUX_RESERVE, max(ram // 8, LEAST_RESERVE))
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
        free = sum(free_on_cards(cards))
        return MemoryBudget(limit, limit + ceiling, free, GPU_RESERVE)
    return MemoryBudget(ceiling, ceiling, min(ceiling, available), reserve)


def card_budgets(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """Bytes that a model may take of each GPU with memory of its own, in their order."""
    return tuple(max(0, gpu.total - GPU_RESERVE) for gpu in gpus if gpu.total)


def free_on_cards(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """The same of what is free on each now."""
    return tuple(max(0, (gpu.free or 0) - GPU_RESERVE) for gpu in gpus if gpu.total)


def wired_limit(machine: Machine) -> int:
    """What macOS lets the GPU have: as set, or at least this by default (newer systems give a bit more)."""
    if machine.wired_limit:
        return machine.wired_limit
    return machine.ram * 3 // 4 if machine.ram > 36 * GIB else machine.ram * 2 // 3


def _layer_cells(model: Footprint, layer: LayerFootprint, context: ContextParams) -> int:
    return context.sliding_cells(model.sliding_window) if layer.is_sliding else context.cells


def _kv_cell_bytes(model: Footprint, layer: LayerFootprint, attention: Attention) -> int:
    """Bytes of K and V of one token in one layer."""
    sizes = (model.key_length, attention.cache_type_k), (model.value_length, attention.cache_type_v)
    return sum(_row_bytes(layer.n_head_kv * length, cache_type) for length, cache_type in sizes)


def _row_bytes(n_values: int, cache_type: CacheType) -> int:
    block, n_bytes = _CACHE_BLOCKS[cache_type]
    return -(-n_values // block) * n_bytes


def _compute_buffer_bytes(
    model: Footprint,
    context: ContextParams,
    layers: Sequence[LayerFootprint],
    masked: int,
    width: int,
    n_outputs: int,
) -> int:
    """The compute buffer: memory is reused along the graph, so one layer counts, and the logits after the last.

    In a layer: what attention holds beside the cache, two hidden states, and the values that a feed-forward network has
    at a time: of a dense one gate, up and their product, of experts each one's gate and twice its output.
    """
    attention = max((_attention_bytes(model, context, layer, masked) for layer in layers), default=0)
    in_layer = attention + context.n_ubatch * F32 * (width + 2 * model.n_embd)
    return in_layer + F32 * n_outputs * model.n_vocab


def _attention_bytes(model: Footprint, context: ContextParams, layer: LayerFootprint, masked: int) -> int:
    """Attention masks over `masked` cells, in F16 for flash attention, which also wants keys and values that are F32
    converted to that. Without it masks are F32, and beside them are the scores of all heads."""
    cells, attention = _layer_cells(model, layer, context), context.attention
    if attention.flash_attn == "off":
        return context.n_ubatch * F32 * (masked + layer.n_head * cells)
    lengths = (model.key_length, attention.cache_type_k), (model.value_length, attention.cache_type_v)
    converted = sum(layer.n_head_kv * length for length, cache_type in lengths if cache_type == "f32")
    return F16 * (context.n_ubatch * masked + cells * converted)


def _padded_cells(cells: int) -> int:
    return -(-cells // CELLS) * CELLS
