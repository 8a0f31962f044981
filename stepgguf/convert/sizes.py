"""How large a model is as each type: from names and shapes alone, without a plan, an encoder or a destination.

checkpoint --+
             +-> Inventory --sizes(type or recipe)--> Sizes: bytes of each trunk tensor by role, of the MTP blocks
GGUF --------+
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
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import mixtures
from stepgguf.quants.mixtures import Facts
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.types import row_size

F32 = GGMLQuantizationType.F32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of every trunk tensor with its role, and of all MTP blocks together. n_values and types are of both."""

    trunk: tuple[tuple[str, int], ...]
    mtp: int
    n_values: int
    types: Mapping[str, GGMLQuantizationType]
    needs_imatrix: bool = False

    @property
    def total(self) -> int:
        return self.mtp + sum(n_bytes for _, n_bytes in self.trunk)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors of a model in llama-quantize's order, those of MTP blocks too. `own`: the type that each one has in
    a GGUF; of a checkpoint None."""

    facts: Facts
    routing: Routing
    tensors: tuple[TensorSpec, ...]
    quantizable: frozenset[str]
    own: Mapping[str, GGMLQuantizationType] | None

    def sizes(self, name: str, *, mtp: bool = True) -> Sizes:
        """As a stock mixture or a recipe, with the MTP blocks or without. Types that need an importance matrix are
        given one. RecipeError for a name that is neither, and for a recipe that does not fit the model."""
        chosen = load_recipe(name)
        candidates = [t for t in self.tensors if t.name in self.quantizable and (mtp or not self.is_mtp(t))]
        choices = chosen.choose_types(candidates, self.facts)
        pairs = zip(candidates, choices, strict=True)
        needs_imatrix = any(mixtures.requires_imatrix(chosen.base or "", c, choice.ggml_type) for c, choice in pairs)
        if needs_imatrix:
            choices = chosen.choose_types(candidates, self.facts, has_imatrix=True)
        types: dict[str, GGMLQuantizationType] = {
            c.name: choice.ggml_type for c, choice in zip(candidates, choices, strict=True)
        }
        return self.with_types(types, mtp=mtp, needs_imatrix=needs_imatrix)

    def own_sizes(self, *, mtp: bool = True) -> Sizes | None:
        """As they are in the GGUF; None for a checkpoint, whose tensors have no ggml types."""
        return None if self.own is None else self.with_types(self.own, mtp=mtp)

    @property
    def matrices(self) -> list[TensorSpec]:
        """The trunk's tensors that can be quantized."""
        return [t for t in self.tensors if t.name in self.quantizable and not self.is_mtp(t)]

    @property
    def n_mtp(self) -> int:
        return len({t.layer for t in self.tensors if self.is_mtp(t)})

    def with_types(
        self, types: Mapping[str, GGMLQuantizationType], *, mtp: bool = True, needs_imatrix: bool = False
    ) -> Sizes:
        """With such types; the others are F32."""
        all_types: dict[str, GGMLQuantizationType] = {
            tensor.name: types.get(tensor.name, F32) for tensor in self.tensors
        }
        trunk, heads, n_values = [], 0, 0
        for tensor in self.tensors:
            n_bytes = math.prod(tensor.shape[:-1]) * row_size(all_types[tensor.name], tensor.shape[-1])
            if not self.is_mtp(tensor):
                trunk.append((tensor.role, n_bytes))
            elif mtp:
                heads += n_bytes
            else:
                continue
            n_values += math.prod(tensor.shape)
        return Sizes(tuple(trunk), heads, n_values, all_types, needs_imatrix)

    def is_mtp(self, tensor: TensorSpec) -> bool:
        return self.facts.is_mtp(tensor.layer)


def inventory(source: TensorSource) -> Inventory:
    """Of whatever the source is. BadMetadata for a GGUF that does not say what the rules ask."""
    hp = source.hparams
    constants = [TensorSpec("", name, (len(data) // 4,), is_mtp=False) for name, data in source.constants.items()]
    return Inventory(
        facts=rule_facts(hp),
        routing=Routing(hp.n_expert, hp.n_expert_used, hp.router_scale),
        tensors=(*source.specs, *constants),
        quantizable=frozenset(spec.name for spec in source.specs if spec.is_quantizable),
        own=source.own_types,
    )


def with_near_sizes(error: UnknownType, model: Inventory) -> UnknownType:
    """The same error with a hint that says how large this model is as the types that come near."""
    if not error.near:
        return error
    sizes = sorted(((model.sizes(name), name) for name in error.near), key=lambda pair: pair[0].total)
    found = [f"{name} {readable_size(s.total)}{' (with an imatrix)' * s.needs_imatrix}" for s, name in sizes]
    return UnknownType(error.message, hint=f"Types that come near: {', '.join(found)}.", near=error.near)
