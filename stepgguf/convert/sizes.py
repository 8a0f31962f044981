"""How large a model is as each type: from names and shapes alone, without a plan, an encoder or a destination.

checkpoint --+
             +-> Inventory --sizes(type or recipe)--> Sizes: bytes of each trunk tensor by role, of the MTP blocks
GGUF --------+
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gguf import GGMLQuantizationType, Keys

from stepgguf.convert import metadata
from stepgguf.convert.checkpoint import Checkpoint
from stepgguf.convert.ggufsource import ARCHITECTURE, GGUFSource
from stepgguf.convert.plan import is_quantizable, model_facts
from stepgguf.errors import BadMetadata
from stepgguf.model.tensors import ROPE_FREQS, file_order, layer_of
from stepgguf.quants import mixtures, recipe
from stepgguf.quants.ggml import row_size
from stepgguf.quants.mixtures import Candidate, Facts

F32 = GGMLQuantizationType.F32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of every trunk tensor with its role, and of all MTP blocks together. n_values counts both."""

    trunk: tuple[tuple[str, int], ...]
    mtp: int
    n_values: int
    needs_imatrix: bool = False

    @property
    def total(self) -> int:
        return self.mtp + sum(n_bytes for _, n_bytes in self.trunk)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors of a model in llama-quantize's order, those of MTP blocks too. `own`: the type that each one has in
    a GGUF; of a checkpoint None."""

    facts: Facts
    tensors: tuple[Candidate, ...]
    quantizable: frozenset[str]
    own: dict[str, GGMLQuantizationType] | None

    def sizes(self, name: str, *, mtp: bool = True) -> Sizes:
        """As a stock mixture or a recipe, with the MTP blocks or without. Types that need an importance matrix are
        given one. RecipeError for a name that is neither, and for a recipe that does not fit the model."""
        chosen = recipe.load(name)
        candidates = [t for t in self.tensors if t.name in self.quantizable and (mtp or not self._is_mtp(t))]
        choices = chosen.choose(candidates, self.facts)
        pairs = zip(candidates, choices, strict=True)
        needs_imatrix = any(mixtures.requires_imatrix(chosen.base or "", c, choice.ggml_type) for c, choice in pairs)
        if needs_imatrix:
            choices = chosen.choose(candidates, self.facts, has_imatrix=True)
        types = {c.name: choice.ggml_type for c, choice in zip(candidates, choices, strict=True)}
        return self._sizes(types, mtp, needs_imatrix)

    def own_sizes(self, *, mtp: bool = True) -> Sizes | None:
        """As they are in the GGUF; None for a checkpoint, whose tensors have no ggml types."""
        return None if self.own is None else self._sizes(self.own, mtp, needs_imatrix=False)

    @property
    def n_mtp(self) -> int:
        return len({t.layer for t in self.tensors if self._is_mtp(t)})

    def _sizes(self, types: dict[str, GGMLQuantizationType], mtp: bool, needs_imatrix: bool) -> Sizes:
        trunk, heads, n_values = [], 0, 0
        for tensor in self.tensors:
            n_bytes = math.prod(tensor.shape[:-1]) * row_size(types.get(tensor.name, F32), tensor.shape[-1])
            if not self._is_mtp(tensor):
                trunk.append((tensor.role, n_bytes))
            elif mtp:
                heads += n_bytes
            else:
                continue
            n_values += math.prod(tensor.shape)
        return Sizes(tuple(trunk), heads, n_values, needs_imatrix)

    def _is_mtp(self, tensor: Candidate) -> bool:
        return tensor.layer is not None and tensor.layer >= self.facts.n_layer


def of_checkpoint(checkpoint: Checkpoint) -> Inventory:
    """What `convert` starts from."""
    tensors = [Candidate(s.name, s.role, s.shape, s.layer) for s in checkpoint.specs]
    freqs = metadata.rope_freqs(checkpoint.hparams)
    if freqs is not None:
        tensors.append(Candidate(ROPE_FREQS, "rope_freqs", (len(freqs) // 4,), None))
    quantizable = frozenset(s.name for s in checkpoint.specs if not s.float32)
    return Inventory(model_facts(checkpoint), tuple(tensors), quantizable, own=None)


def of_gguf(source: GGUFSource) -> Inventory:
    """What `quantize` starts from. BadMetadata for a file that does not say what the rules ask."""
    n_layer = _number(source, Keys.LLM.BLOCK_COUNT) - _number(source, Keys.LLM.NEXTN_PREDICT_LAYERS, 0)
    gqa = _number(source, Keys.Attention.HEAD_COUNT) // max(1, _number(source, Keys.Attention.HEAD_COUNT_KV))
    names = sorted(source.tensors, key=file_order)
    layers = {name: layer_of(name) if name.startswith("blk.") else None for name in names}
    return Inventory(
        facts=Facts(n_layer, _number(source, Keys.LLM.EXPERT_COUNT, 0), gqa),
        tensors=tuple(Candidate(n, n.split(".")[-2], source.tensors[n].shape, layers[n]) for n in names),
        quantizable=frozenset(n for n in names if is_quantizable(n, source.tensors[n].shape)),
        own={t.name: t.ggml_type for header in source.headers for t in header.tensors},
    )


def _number(source: GGUFSource, key: str, default: int | None = None) -> int:
    """Of a key that may also be a list, one number for each layer: layer 0's."""
    name = key.format(arch=ARCHITECTURE)
    value = source.headers[0].get(name, default)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int):
        raise BadMetadata(f"{source.path}: key {name} is {value!r}, expected an integer", hint="Convert it again.")
    return value
