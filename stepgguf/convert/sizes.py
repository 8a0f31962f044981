"""How large a model is as each type: from names and shapes alone, without a plan, an encoder or a destination.

checkpoint --+
             +-> Inventory --sizes(type or recipe)--> Sizes: bytes of each trunk tensor by role, of the MTP blocks
GGUF --------+
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType, Keys

from stepgguf.convert import metadata
from stepgguf.convert.objective import Routing
from stepgguf.convert.planner import gguf_facts, is_quantizable, model_facts, number
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import ARCHITECTURE, GGUFSource
from stepgguf.errors import BadMetadata, UnknownType
from stepgguf.files.byte_sizes import readable_size
from stepgguf.files.jsonread import shown
from stepgguf.model.tensors import ROPE_FREQS, file_order, layer_of, role_of
from stepgguf.quants import mixtures, recipe
from stepgguf.quants.ggml import row_size
from stepgguf.quants.mixtures import Candidate, Facts

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
    tensors: tuple[Candidate, ...]
    quantizable: frozenset[str]
    own: dict[str, GGMLQuantizationType] | None

    def sizes(self, name: str, *, mtp: bool = True) -> Sizes:
        """As a stock mixture or a recipe, with the MTP blocks or without. Types that need an importance matrix are
        given one. RecipeError for a name that is neither, and for a recipe that does not fit the model."""
        chosen = recipe.load(name)
        candidates = [t for t in self.tensors if t.name in self.quantizable and (mtp or not self.is_mtp(t))]
        choices = chosen.choose(candidates, self.facts)
        pairs = zip(candidates, choices, strict=True)
        needs_imatrix = any(mixtures.requires_imatrix(chosen.base or "", c, choice.ggml_type) for c, choice in pairs)
        if needs_imatrix:
            choices = chosen.choose(candidates, self.facts, has_imatrix=True)
        types = {c.name: choice.ggml_type for c, choice in zip(candidates, choices, strict=True)}
        return self.with_types(types, mtp=mtp, needs_imatrix=needs_imatrix)

    def own_sizes(self, *, mtp: bool = True) -> Sizes | None:
        """As they are in the GGUF; None for a checkpoint, whose tensors have no ggml types."""
        return None if self.own is None else self.with_types(self.own, mtp=mtp)

    @property
    def matrices(self) -> list[Candidate]:
        """The trunk's tensors that can be quantized."""
        return [t for t in self.tensors if t.name in self.quantizable and not self.is_mtp(t)]

    @property
    def n_mtp(self) -> int:
        return len({t.layer for t in self.tensors if self.is_mtp(t)})

    def with_types(
        self, types: Mapping[str, GGMLQuantizationType], *, mtp: bool = True, needs_imatrix: bool = False
    ) -> Sizes:
        """With such types; the others are F32."""
        all_types = {tensor.name: types.get(tensor.name, F32) for tensor in self.tensors}
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

    def is_mtp(self, tensor: Candidate) -> bool:
        return self.facts.is_mtp(tensor.layer)


def inventory(source: Checkpoint | GGUFSource) -> Inventory:
    """Of whatever the source is. BadMetadata for a GGUF that does not say what the rules ask."""
    return _of_checkpoint(source) if isinstance(source, Checkpoint) else _of_gguf(source)


def with_near_sizes(error: UnknownType, model: Inventory) -> UnknownType:
    """The same error with a hint that says how large this model is as the types that come near."""
    if not error.near:
        return error
    sizes = sorted(((model.sizes(name), name) for name in error.near), key=lambda pair: pair[0].total)
    found = [f"{name} {readable_size(s.total)}{' (with an imatrix)' * s.needs_imatrix}" for s, name in sizes]
    return UnknownType(error.message, hint=f"Types that come near: {', '.join(found)}.", near=error.near)


def _of_checkpoint(checkpoint: Checkpoint) -> Inventory:
    tensors = [Candidate(s.name, s.role, s.shape, s.layer) for s in checkpoint.specs]
    freqs = metadata.rope_freqs(checkpoint.hparams)
    if freqs is not None:
        tensors.append(Candidate(ROPE_FREQS, "rope_freqs", (len(freqs) // 4,), None))
    quantizable = frozenset(s.name for s in checkpoint.specs if not s.float32)
    hp = checkpoint.hparams
    routing = Routing(hp.n_expert, hp.n_expert_used, hp.router_scale)
    return Inventory(model_facts(checkpoint), routing, tuple(tensors), quantizable, own=None)


def _of_gguf(source: GGUFSource) -> Inventory:
    facts = gguf_facts(source)
    name = Keys.LLM.EXPERT_WEIGHTS_SCALE.format(arch=ARCHITECTURE)
    scale = source.headers[0].get(name, 1.0)
    if not isinstance(scale, float) or not math.isfinite(scale):
        raise BadMetadata(f"{source.path}: key {name} is {shown(scale)}, expected a number", hint="Convert it again.")
    names = sorted(source.tensors, key=file_order)
    return Inventory(
        facts=facts,
        routing=Routing(facts.n_expert, number(source, Keys.LLM.EXPERT_USED_COUNT, 0), scale),
        tensors=tuple(Candidate(n, role_of(n), source.tensors[n].shape, layer_of(n)) for n in names),
        quantizable=frozenset(n for n in names if is_quantizable(n, source.tensors[n].shape)),
        own={t.name: t.ggml_type for header in source.headers for t in header.tensors},
    )
