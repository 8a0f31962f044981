"""How large a model is as each type: from names and shapes alone, without a plan, an encoder or a destination.

source --take_inventory--> Inventory --sizes_as(type or recipe)--> Sizes: bytes of each trunk tensor, of the MTP blocks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from stepgguf.convert.objective import Routing
from stepgguf.convert.planner import rule_facts
from stepgguf.convert.sources.source import TensorSource
from stepgguf.errors import UnknownType
from stepgguf.files.byte_sizes import readable_size
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import mixtures
from stepgguf.quants.mixtures import RuleFacts
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.types import F32, row_size

Types = Mapping[str, GGMLQuantizationType]  # by names of tensors


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of every trunk tensor, and of all MTP blocks together. n_values and types are of both."""

    trunk: tuple[tuple[TensorName, int], ...]
    mtp: int
    n_values: int
    types: Types
    needs_imatrix: bool = False

    @property
    def total(self) -> int:
        """Bytes of all tensors; a file has a header besides."""
        return self.mtp + sum(n_bytes for _, n_bytes in self.trunk)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors of a model, those of MTP blocks and constants too, and what rules and costs ask about it.

    own_types: the type that each tensor has in a GGUF; None of a checkpoint.
    """

    facts: RuleFacts
    routing: Routing
    tensors: tuple[TensorSpec, ...]
    own_types: Types | None

    def sizes_as(self, name: str, *, mtp: bool = True) -> Sizes:
        """As a stock mixture or a recipe, with the MTP blocks or without.

        Types that need an importance matrix are given one. RecipeError for a name that is neither, and for a recipe
        that does not fit the model.
        """
        chosen = load_recipe(name)
        candidates = [t for t in self.tensors if t.is_quantizable and (mtp or not t.is_mtp)]
        choices = chosen.choose_types(candidates, self.facts)
        pairs = zip(candidates, choices, strict=True)
        needs_imatrix = any(mixtures.requires_imatrix(chosen.base or "", c, choice.ggml_type) for c, choice in pairs)
        if needs_imatrix:  # with one, the same mixture may choose other types
            choices = chosen.choose_types(candidates, self.facts, has_imatrix=True)
        types: dict[str, GGMLQuantizationType] = {
            c.name: choice.ggml_type for c, choice in zip(candidates, choices, strict=True)
        }
        return self.sizes_with(types, mtp=mtp, needs_imatrix=needs_imatrix)

    def own_sizes(self, *, mtp: bool = True) -> Sizes | None:
        """As they are in the GGUF; None for a checkpoint, whose tensors have no ggml types."""
        return None if self.own_types is None else self.sizes_with(self.own_types, mtp=mtp)

    @property
    def matrices(self) -> list[TensorSpec]:
        """The trunk's tensors that can be quantized."""
        return [tensor for tensor in self.tensors if tensor.is_quantizable and not tensor.is_mtp]

    @property
    def n_mtp(self) -> int:
        """MTP blocks that are there."""
        return len({tensor.layer for tensor in self.tensors if tensor.is_mtp})

    @property
    def n_expert_layers(self) -> int:
        """Layers with routed experts."""
        return len({tensor.layer for tensor in self.tensors if tensor.name.is_expert})

    def sizes_with(self, types: Types, *, mtp: bool = True, needs_imatrix: bool = False) -> Sizes:
        """With such types; the others are F32."""
        all_types: dict[str, GGMLQuantizationType] = {t.name: types.get(t.name, F32) for t in self.tensors}
        n_bytes = {t.name: math.prod(t.shape[:-1]) * row_size(all_types[t.name], t.shape[-1]) for t in self.tensors}
        return Sizes(
            trunk=tuple((t.name, n_bytes[t.name]) for t in self.tensors if not t.is_mtp),
            mtp=sum(n_bytes[t.name] for t in self.tensors if t.is_mtp) if mtp else 0,
            n_values=sum(math.prod(t.shape) for t in self.tensors if mtp or not t.is_mtp),
            types=all_types,
            needs_imatrix=needs_imatrix,
        )


def take_inventory(source: TensorSource) -> Inventory:
    """What a checkpoint or a GGUF holds. BadMetadata for a GGUF that does not say what the rules ask."""
    hp = source.hparams
    constants = [TensorSpec("", name, (len(data) // 4,), is_mtp=False) for name, data in source.constants.items()]
    return Inventory(
        facts=rule_facts(hp),
        routing=Routing(hp.n_expert, hp.n_expert_used, hp.router_scale),
        tensors=(*source.specs, *constants),
        own_types=source.own_types,
    )


def with_near_sizes(error: UnknownType, model: Inventory) -> UnknownType:
    """The same error with a hint that says how large this model is as the types that come near."""
    if not error.near:
        return error
    sizes = sorted(((model.sizes_as(name), name) for name in error.near), key=lambda pair: pair[0].total)
    found = [f"{name} {readable_size(s.total)}{' (with an imatrix)' * s.needs_imatrix}" for s, name in sizes]
    return UnknownType(error.message, hint=f"Types that come near: {', '.join(found)}.", near=error.near)
