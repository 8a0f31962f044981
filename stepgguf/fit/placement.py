"""Where a model goes in several memories: cards with RAM beside them, or machines that follow one another.

    layers           dealt out in order, to each card as many as it holds: their weights and their KV cache
    routed experts   of the first N layers in RAM, as --n-cpu-moe N has it; N is the smallest that fits
    MTP blocks       follow the trunk's layers, and the output follows them
    embedding        in RAM, with the kept conversations
    buffers          on each card: what a batch needs in a layer; if experts are in RAM, also one matrix of them at a
                     time, with which the card itself computes batches of 32 tokens and more (ggml-backend.cpp)

What a person has set is taken, and the rest is chosen around it: --gpu-layers leaves the first layers in RAM,
--tensor-split fixes each card's share of the others. What is chosen is written in the same way: a card's share is the
number of its layers, the output being one (llama-model.cpp, get_layer_buft_list).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from stepgguf.fit.memory import ContextParams, Footprint, MemoryNeed, kv_cache_bytes, memory_need
from stepgguf.runtime.placement import ALL_LAYERS, Placement

if TYPE_CHECKING:
    from stepgguf.convert.sizes import Sizes

UNPLACED = Placement()


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
class PlacedModel:
    """A placement with which a model fits, and its bytes on each card and in RAM.

    counts: layers on each card, the output being one. n_left: so many layers are in RAM altogether.
    """

    placement: Placement
    counts: tuple[int, ...]
    cards: tuple[int, ...]
    ram: int
    n_left: int = 0

    @property
    def n_cpu_moe(self) -> int:
        """Layers whose routed experts are in RAM."""
        return self.placement.n_cpu_moe or 0


def weight_parts(sizes: Sizes, n_mtp: int, overrides: Sequence[tuple[str, str]] = ()) -> ModelParts:
    """Take a model with n_mtp MTP blocks apart: its weights alone.

    overrides: as Placement has them. Those to "CPU" count; where another one puts a tensor is not looked at.
    """
    experts: Counter[int] = Counter()
    others: Counter[int] = Counter()
    outside: Counter[str] = Counter()
    matrix = 0
    for name, n_bytes in sizes.trunk:
        if _buffer_of(name, overrides) == "CPU":
            outside["embedding"] += n_bytes
        elif name.layer is None:
            outside["embedding" if name.role == "token_embd" else "output"] += n_bytes
        elif name.is_expert:
            experts[name.layer] += n_bytes
            matrix = max(matrix, n_bytes)
        else:
            others[name.layer] += n_bytes
    trunk = [LayerBytes(experts[number], others[number]) for number in sorted(others)]
    mtp = [LayerBytes(0, -(-sizes.mtp // n_mtp)) for _ in range(n_mtp)]
    return ModelParts((*trunk, *mtp), outside["output"], outside["embedding"], 0, matrix)


def _buffer_of(name: str, overrides: Sequence[tuple[str, str]]) -> str | None:
    return next((buffer for pattern, buffer in overrides if re.search(pattern, name)), None)


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


def place(parts: ModelParts, cards: Sequence[int], ram: int, wish: Placement = UNPLACED) -> PlacedModel | None:
    """Place a model on cards and in RAM with as few layers' experts in RAM as can be; None if it does not fit.

    cards: bytes that each card has for the model. ram: the same of the RAM. wish: what is set already and kept.
    """
    if wish.split_mode == "none":
        cards = [n_bytes if i == wish.main_gpu else 0 for i, n_bytes in enumerate(cards)]
    n_left = _layers_in_ram(parts, wish)
    for n_cpu_moe in range(len(parts.layers) + 1) if wish.n_cpu_moe is None else (wish.n_cpu_moe,):
        in_ram = sum(y.experts for y in parts.layers[:n_cpu_moe]) + sum(
            y.others + (y.experts if i >= n_cpu_moe else 0) for i, y in enumerate(parts.layers[:n_left])
        )
        dealt = _deal(parts, cards, n_cpu_moe, n_left, wish.tensor_split)
        if dealt is not None:
            counts, taken = dealt
            split = tuple(map(float, counts)) if wish.tensor_split is None and len(cards) > 1 else wish.tensor_split
            placed = replace(wish, n_cpu_moe=n_cpu_moe, tensor_split=split)
            used = parts.in_ram + in_ram
            return PlacedModel(placed, counts, taken, used, n_left) if used <= ram else None
    return None


def place_somehow(parts: ModelParts, cards: Sequence[int], ram: int, wish: Placement) -> PlacedModel | None:
    """The same, with layers in RAM if not all can be on the cards: as few as can be, unless the wish says how many."""
    placed = place(parts, cards, ram, wish)
    if placed is not None or wish.gpu_layers is not None:
        return placed
    fewer = (replace(wish, gpu_layers=n) for n in range(len(parts.layers), -1, -1))
    return next((placed for other in fewer if (placed := place(parts, cards, ram, other)) is not None), None)


def _layers_in_ram(parts: ModelParts, wish: Placement) -> int:
    """How many of the first layers --gpu-layers leaves in RAM."""
    if wish.gpu_layers is None or wish.gpu_layers == ALL_LAYERS:
        return 0
    return max(0, len(parts.layers) + 1 - wish.gpu_layers)


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
    parts: ModelParts, cards: Sequence[int], n_cpu_moe: int, n_left: int, split: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How many layers behind the first n_left each card takes, and its bytes; None if not all find room."""
    left = [layer.others + (layer.experts if i >= n_cpu_moe else 0) for i, layer in enumerate(parts.layers)]
    left = [*left, parts.output][n_left:]
    has_experts_in_ram = any(layer.experts for layer in parts.layers[: max(n_cpu_moe, n_left)])
    buffers = parts.buffers + (parts.matrix if has_experts_in_ram else 0)
    wanted = _split_counts(len(left), split, len(cards)) if split is not None else None
    counts, taken = [], []
    for i, card in enumerate(cards):
        filled = list(accumulate(left, initial=buffers))
        n = max(0, bisect_right(filled, card) - 1)
        if wanted is not None:
            if wanted[i] > n:
                return None
            n = wanted[i]
        counts.append(n)
        taken.append(filled[n] if n else 0)
        left = left[n:]
    return None if left else (tuple(counts), tuple(taken))


def _split_counts(n_layers: int, split: Sequence[float], n_cards: int) -> list[int]:
    """How many layers go to each card by its share, as llama.cpp deals them: layer i to the first card whose share,
    with those before it, is above i / n_layers."""
    shares = [*split, *[0.0] * n_cards][:n_cards]
    points = [total / (sum(shares) or 1.0) for total in accumulate(shares)]
    dealt = Counter(min(bisect_right(points, i / n_layers), n_cards - 1) for i in range(n_layers))
    return [dealt[card] for card in range(n_cards)]
