"""A parsed recipe: rules on roles, the first that matches wins, and what decides where none does.

    rules, in the file's order -Rule.places-> the rule of each (role, layer) -choose_types-> a type for each tensor

What a rule says stands. A floor only raises what the default, the base or the allocator gives. Rules on other roles
never reach the MTP blocks, which are Q8_0 if no rule says otherwise (all tensors of a float file are floats).
recipe_grammar.py reads one from TOML, recipe_files.py finds it by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gguf import GGMLQuantizationType

from stepgguf.errors import RecipeError
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TENSORS, TensorSpec, quantizable_roles
from stepgguf.quants import mixtures
from stepgguf.quants.mixtures import BASE_TYPES, RuleFacts, TypeChoice
from stepgguf.quants.types import FLOATS, bits_per_weight, fitting_type

MODEL_ROLES = quantizable_roles("model")
LAYER_ROLES = quantizable_roles("layer", "dense", "moe")
MTP_ROLES = tuple(f"nextn.{role}" for role in quantizable_roles("layer", "dense", "mtp"))  # MTP blocks have no experts
FLOAT32_ROLES = tuple(TensorName(rule.name).stem for rule in TENSORS if not rule.is_quantizable)
ROLES = (*MODEL_ROLES, *LAYER_ROLES, *MTP_ROLES)

# Where a rule applies: a role in a layer, or outside the trunk's layers (None).
Place = tuple[str, "int | None"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe. layers: as in seq[start:stop], so a negative start counts from the end; None is all."""

    line: int
    key: str
    roles: tuple[str, ...]
    layers: tuple[tuple[int, int | None], ...] | None
    ggml_type: GGMLQuantizationType
    is_floor: bool

    def places(self, n_layer: int) -> set[Place]:
        """Everywhere it applies in a model of n_layer layers. ValueError if some of its layers do not exist."""
        layers = set(range(n_layer))
        if self.layers is not None:
            # Of a negative start so many layers must be there, of another one the layer itself.
            if any(max(-start, start + 1, stop or 0) > n_layer for start, stop in self.layers):
                raise ValueError
            layers = {layer for start, stop in self.layers for layer in range(n_layer)[start:stop]}
        inside = {(role, layer) for role in self.roles if role in LAYER_ROLES for layer in layers}
        return inside | {(role, None) for role in self.roles if role not in LAYER_ROLES}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe. `text` is the whole file, which goes into the metadata; `origin` is what errors call it."""

    name: str
    description: str
    origin: str
    text: str
    rules: tuple[Rule, ...]
    default: GGMLQuantizationType | None = None
    base: str | None = None
    bpw: float | None = None

    @property
    def is_stock(self) -> bool:
        """Whether it is a stock mixture and nothing else, so that its name says it all."""
        return self.base is not None and not self.rules

    def choose_types(
        self,
        candidates: Sequence[TensorSpec],
        facts: RuleFacts,
        *,
        has_imatrix: bool = False,
        allocated: Mapping[str, TypeChoice] | None = None,
    ) -> list[TypeChoice]:
        """The type of each tensor and why, in the order given, which is llama-quantize's (see mixtures).

        allocated: for tensors that no rule decides, by name.

        Tensors of layers from facts.n_layer on are MTP tensors. RecipeError if a rule asks for layers that the model
        does not have or can match nothing in it, or if a tensor is left to the allocator.
        """
        trunk = [c for c in candidates if not c.is_mtp]
        stock: dict[str, TypeChoice] = {}
        if self.base is not None:
            choices = mixtures.choose_types(self.base, trunk, facts, has_imatrix=has_imatrix)
            stock = {c.name: choice for c, choice in zip(trunk, choices, strict=True)}
        given = allocated or {}
        return [
            self.fixed_type(c, facts)
            or given.get(c.name)
            or self._raise_to_floor(stock.get(c.name) or self._default_choice(c), c, facts)
            for c in candidates
        ]

    def fixed_type(self, candidate: TensorSpec, facts: RuleFacts) -> TypeChoice | None:
        """What a rule decides, or None where the default, the base or the allocator does."""
        rule = self._rule_of(candidate, facts)
        if rule is None or rule.is_floor:
            return None
        return _fitting_choice(rule.ggml_type, candidate, f"recipe line {rule.line}: {rule.key}")

    def floor_type(self, candidate: TensorSpec, facts: RuleFacts) -> GGMLQuantizationType | None:
        """The type below whose bits per weight this tensor may not go."""
        rule = self._rule_of(candidate, facts)
        if rule is None or not rule.is_floor:
            return None
        return fitting_type(rule.ggml_type, candidate.shape[-1])

    def _rule_of(self, candidate: TensorSpec, facts: RuleFacts) -> Rule | None:
        place = (f"nextn.{candidate.role}", None) if candidate.is_mtp else (candidate.role, candidate.layer)
        return _rules_by_place(self, facts.n_layer).get(place)

    def _raise_to_floor(self, choice: TypeChoice, candidate: TensorSpec, facts: RuleFacts) -> TypeChoice:
        """The choice, or the floor where that has more bits."""
        rule = self._rule_of(candidate, facts)
        if rule is None:
            return choice
        floor = _fitting_choice(rule.ggml_type, candidate, f"recipe line {rule.line}: {rule.key}, floor")
        return floor if bits_per_weight(floor.ggml_type) > bits_per_weight(choice.ggml_type) else choice

    def _default_choice(self, candidate: TensorSpec) -> TypeChoice:
        throughout = BASE_TYPES[self.base] if self.base else self.default
        if candidate.is_mtp:
            ggml_type = throughout if throughout in FLOATS else GGMLQuantizationType.Q8_0
            return _fitting_choice(ggml_type, candidate, f"MTP {ggml_type.name}")
        if self.default is None:
            raise RecipeError(
                f"{self.origin}: no rule decides {candidate.name}, and a target in bits per weight is no type",
                hint="convert and quantize choose types for a target; here give a recipe with a default or a base.",
            )
        return _fitting_choice(self.default, candidate, "recipe default")


@lru_cache(maxsize=8)  # it is asked for each tensor
def _rules_by_place(recipe: Recipe, n_layer: int) -> dict[Place, Rule]:
    """The rule of every place that has one. RecipeError for a rule that earlier ones leave no place."""
    table: dict[Place, Rule] = {}
    for rule in recipe.rules:
        where = f"{recipe.origin} line {rule.line}"
        try:
            places = rule.places(n_layer)
        except ValueError:
            raise RecipeError(f"{where}: {rule.key}: the model has layers 0 to {n_layer - 1}") from None
        if places <= table.keys():
            earlier = ", ".join(map(str, sorted({table[place].line for place in places})))
            raise RecipeError(
                f"{where}: {rule.key} can never match, line {earlier} comes first",
                hint="The first rule that matches wins: put the narrower one first.",
            )
        table |= {place: rule for place in places if place not in table}
    return table


def _fitting_choice(ggml_type: GGMLQuantizationType, candidate: TensorSpec, reason: str) -> TypeChoice:
    """The type, or its fallback on rows of another length, which the reason then says."""
    fitting = fitting_type(ggml_type, candidate.shape[-1])
    if fitting != ggml_type:
        reason += f"; rows of {candidate.shape[-1]} do not divide into {ggml_type.name} blocks"
    return TypeChoice(fitting, reason)
