"""Where a model goes in several memories: cards with RAM beside them, or machines that follow one another.

    layers           dealt out in order, to each card as many as it holds: their weights and their KV cache
    routed experts   of the first N layers in RAM, as llama.cpp's --n-cpu-moe N has it; N is the smallest that fits
    MTP blocks       follow the trunk's layers, and the output follows them
    embedding        in RAM, with the kept conversations
    buffers          on each card: what a batch needs in a layer; if experts are in RAM, also one matrix of them at a
                     time, with which the card itself computes batches of 32 tokens and more (ggml-backend.cpp)

--tensor-split takes the number of layers on each card, the output being one (llama-model.cpp, get_layer_buft_list).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from stepgguf.fit.memory import ContextParams, Footprint, MemoryNeed, kv_cache_bytes, memory_need

if TYPE_CHECKING:
    from stepgguf.convert.sizes import Sizes


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of a layer's routed experts, and of all that stays on its card: other weights and its KV cache."""

    experts: int
    others: int


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Bytes of all that is placed.

    layers: MTP blocks come last. in_ram: the embedding and kept conversations. buffers: on each card. matrix: the
    largest that holds routed experts.
    """

    layers: tuple[LayerBytes, ...]
    output: int
    in_ram: int
    buffers: int
    matrix: int

    @property
    def without_ram(self) -> ModelParts:
        """The same for machines in a row: what is in RAM is with the output.

        llama.cpp deals layers to other machines first, and what it keeps in RAM stays where it was started.
        """
        return replace(self, output=self.output + self.in_ram, in_ram=0)


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes on each card and in RAM.

    n_cpu_moe: layers whose routed experts are in RAM. split: layers on each card, of which the output is one.
    """

    n_cpu_moe: int
    split: tuple[int, ...]
    cards: tuple[int, ...]
    ram: int


def weight_parts(sizes: Sizes, n_mtp: int) -> ModelParts:
    """Take a model with n_mtp MTP blocks apart: its weights alone."""
    experts: Counter[int] = Counter()
    others: Counter[int] = Counter()
    outside: Counter[str] = Counter()
    matrix = 0
    for name, n_bytes in sizes.trunk:
        if name.layer is None:
            outside["embedding" if name.role == "token_embd" else "output"] += n_bytes
        elif name.is_expert:
            experts[name.layer] += n_bytes
            matrix = max(matrix, n_bytes)
        else:
            others[name.layer] += n_bytes
    trunk = [LayerBytes(experts[number], others[number]) for number in sorted(others)]
    mtp = [LayerBytes(0, -(-sizes.mtp // n_mtp)) for _ in range(n_mtp)]
    return ModelParts((*trunk, *mtp), outside["output"], outside["embedding"], 0, matrix)


def with_context(parts: ModelParts, model: Footprint, context: ContextParams) -> ModelParts:
    """The weights with all that running them takes, each where it is: a layer's cache is with the layer."""
    needed, mtp_layers = memory_need(model, context), model.mtp_layers if context.mtp else ()
    caches = [kv_cache_bytes(model, (layer,), context) for layer in model.trunk_layers]
    caches += [-(-needed.mtp // len(mtp_layers)) for _ in mtp_layers]
    layers = zip(parts.layers, caches, strict=True)
    return replace(
        parts,
        layers=tuple(replace(layer, others=layer.others + cache) for layer, cache in layers),
        in_ram=parts.in_ram + needed.cache,
        buffers=needed.compute,
    )


def place(parts: ModelParts, cards: Sequence[int], ram: int) -> Placement | None:
    """Place a model on cards and in RAM with as few layers' experts in RAM as can be; None if it does not fit.

    cards: bytes that each card has for the model. ram: the same of the RAM.
    """
    for n_cpu_moe in range(len(parts.layers) + 1):
        in_ram = sum(layer.experts for layer in parts.layers[:n_cpu_moe])
        dealt = _deal(parts, cards, n_cpu_moe, parts.buffers + (parts.matrix if in_ram else 0))
        if dealt is not None:
            used = parts.in_ram + in_ram
            return Placement(n_cpu_moe, *dealt, used) if used <= ram else None
    return None


def unusable_room(needed: MemoryNeed, cards: Sequence[int], ram: int, n_expert_layers: int) -> int:
    """Bytes that whole layers leave free at worst: of each card a layer (without RAM the last one can be full), and
    with RAM one of a layer's three matrices of experts on its way to the card.

    needed: with the buffers of all cards. Layers count as equally large, and their experts as all of them.
    """
    if not cards:
        return 0
    layers = len(cards) * 4 / 3 if ram else len(cards) - 1
    share = layers / max(1, n_expert_layers)  # of the weights
    return max(0, int((sum(cards) + ram - needed.total) * share / (1 + share)))


def _deal(
    parts: ModelParts, cards: Sequence[int], n_cpu_moe: int, buffers: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How many layers each card takes, and its bytes; None if not all find room."""
    left = [layer.others + (layer.experts if i >= n_cpu_moe else 0) for i, layer in enumerate(parts.layers)]
    left.append(parts.output)
    counts, taken = [], []
    for card in cards:
        filled = list(accumulate(left, initial=buffers))
        n = max(0, bisect_right(filled, card) - 1)
        counts.append(n)
        taken.append(filled[n] if n else 0)
        left = left[n:]
    return None if left else (tuple(counts), tuple(taken))
