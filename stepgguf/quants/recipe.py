"""Recipes: which type each tensor gets, as a short TOML of ordered rules on roles.

    default = "Q8_0"                       what no rule decides: one type,
    base = "Q4_K_M"                        or a stock mixture, exactly as without rules,
    bpw = 4.2                              or a target in bits per weight, which the allocator fills
    name = "mine"                          optional, like description; the file's name is the default

    ffn_down_exps = "Q5_K"                 a rule: this role in every layer
    "ffn_{gate,up}_exps" = "Q4_K"          {a,b} and * stand for several roles, commas separate patterns
    "attn_v, attn_output @ 0-4, 39-" = "Q6_K"    only in these layers, both ends counted
    "ffn_down_exps @ last 6" = "Q6_K"      or "first 5": a minus sign is always a range, never "from the end"
    attn_q = { floor = "Q5_K" }            whatever decides the rest may not go below
    nextn = "Q6_K"                         the MTP blocks; "nextn.eh_proj" is one of their roles

Exactly one of default, base and bpw is there. The first rule that matches a tensor wins. Rules on other roles never
reach the MTP blocks, which are Q8_0 if no rule says otherwise (all tensors of a float file are floats). Norms, the
router and its bias stay F32: no rule can name them. What would be ignored silently is an error that names the line.

The grammar is flat, so that each line of the file is one decision and a reason can cite it: "recipe line 6".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stepgguf.errors import RecipeError
from stepgguf.files import textfile
from stepgguf.quants import mixtures
from stepgguf.quants.mixtures import BASE, Candidate, Choice, Facts
from stepgguf.quants.type_names import did_you_mean, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_ROLES = ("token_embd", "output")
LAYER_ROLES = (
    "attn_q", "attn_k", "attn_v", "attn_output", "attn_gate", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps",
    "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp",
)  # fmt: skip
MTP_ROLES = tuple(
    f"nextn.{role}"
    for role in ("attn_q", "attn_k", "attn_v", "attn_output", "attn_gate", "ffn_gate", "ffn_up", "ffn_down", "eh_proj",
                 "shared_head_head")
)  # fmt: skip
FLOAT32_ROLES = (
    "output_norm", "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_gate_inp", "exp_probs_b", "nextn.enorm",
    "nextn.hnorm", "nextn.shared_head_norm",
)  # fmt: skip
ROLES = (*MODEL_ROLES, *LAYER_ROLES, *MTP_ROLES)
SETTINGS = ("name", "description", "default", "base", "bpw")
TYPES = {kind.name: kind for kind in BASE.values()}

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_FOLDER = Path(__file__).with_name("recipes")
_LAYERS = re.compile(r"(?P<from>[0-9]{1,4})(?P<range>-(?P<to>[0-9]{0,4}))?|(?P<end>first|last) +(?P<n>[1-9][0-9]{0,3})")

MAX_BYTES = 2**20
_MAX_DOTS = 100
# What can hide the end of a line, or is one. A string that is not closed is no token, and its quote is passed over.
_TOKEN = re.compile(
    r'''"""(?:[^\\]|\\.)*?"""|"(?:[^"\\\n]|\\.)*"|#[^\n]*|[\[\]{}\n]|''' r"""'{3}.*?'{3}|'[^'\n]*'""", re.DOTALL
)
_MAX_NAMES = 100  # that one key may stand for

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
        """Whether it is a stock mixture and nothing else."""
        return self.base is not None and not self.rules

    def choose(
        self,
        candidates: Sequence[Candidate],
        facts: Facts,
        *,
        has_imatrix: bool = False,
        allocated: Mapping[str, Choice] | None = None,
    ) -> list[Choice]:
        """The type of each tensor and why, in the order given, which is llama-quantize's (see mixtures).

        allocated: for tensors that no rule decides, by name.

        Tensors of layers from facts.n_layer on are MTP tensors. RecipeError if a rule asks for layers that the model
        does not have or can match nothing in it, or if a tensor is left to the allocator.
        """
        trunk = [c for c in candidates if not facts.is_mtp(c.layer)]
        stock: dict[str, Choice] = {}
        if self.base is not None:
            choices = mixtures.choose(self.base, trunk, facts, has_imatrix=has_imatrix)
            stock = {c.name: choice for c, choice in zip(trunk, choices, strict=True)}
        given = allocated or {}
        return [
            self.fixed(c, facts)
            or given.get(c.name)
            or self._raised(stock.get(c.name) or self._default(c, facts), c, facts)
            for c in candidates
        ]

    def fixed(self, candidate: Candidate, facts: Facts) -> Choice | None:
        """What a rule decides, or None where the default, the base or the allocator does."""
        rule = self._rule(candidate, facts)
        if rule is None or rule.is_floor:
            return None
        return _fitting(rule.ggml_type, candidate, f"recipe line {rule.line}: {rule.key}")

    def floor(self, candidate: Candidate, facts: Facts) -> GGMLQuantizationType | None:
        """The type below whose bits per weight this tensor may not go."""
        rule = self._rule(candidate, facts)
        if rule is None or not rule.is_floor:
            return None
        return mixtures.fallback(rule.ggml_type, candidate.shape[-1])

    def _rule(self, candidate: Candidate, facts: Facts) -> Rule | None:
        place = (
            (f"nextn.{candidate.role}", None) if facts.is_mtp(candidate.layer) else (candidate.role, candidate.layer)
        )
        return _table(self, facts.n_layer).get(place)

    def _raised(self, choice: Choice, candidate: Candidate, facts: Facts) -> Choice:
        """The choice, or the floor where that has more bits."""
        rule = self._rule(candidate, facts)
        if rule is None:
            return choice
        floor = _fitting(rule.ggml_type, candidate, f"recipe line {rule.line}: {rule.key}, floor")
        return floor if bits_per_weight(floor.ggml_type) > bits_per_weight(choice.ggml_type) else choice

    def _default(self, candidate: Candidate, facts: Facts) -> Choice:
        throughout = BASE[self.base] if self.base else self.default
        if facts.is_mtp(candidate.layer):
            kind = throughout if throughout in _FLOATS else GGMLQuantizationType.Q8_0
            return _fitting(kind, candidate, f"MTP {kind.name}")
        if self.default is None:
            raise RecipeError(
                f"{self.origin}: no rule decides {candidate.name}, and a target in bits per weight is no type",
                hint="convert and quantize choose types for a target; here give a recipe with a default or a base.",
            )
        return _fitting(self.default, candidate, "recipe default")


def load(name_or_path: str) -> Recipe:
    """A stock mixture, a shipped recipe or a .toml file, looked for in this order. RecipeError if it is none."""
    if name_or_path.upper() in BASE:
        return parse(f'base = "{name_or_path.upper()}"\n', name_or_path.upper())
    if name_or_path.lower() in shipped_names():
        return parse(shipped_text(name_or_path.lower()), name_or_path.lower())
    path = Path(name_or_path)
    files = sorted(str(file) for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    if path.suffix == ".toml" and not path.exists():
        raise RecipeError(
            f"{path}: no such file{did_you_mean(str(path), files, 0.8)}",  # they all end alike
            hint="Those that come with stepgguf: stepgguf recipes.",
        )
    if path.suffix != ".toml":
        raise unknown(name_or_path, (*shipped_names(), *files))
    return parse(textfile.read(path, RecipeError, most=MAX_BYTES), name_or_path)


def shipped_names() -> list[str]:
    """The recipes that come with stepgguf, for the smallest machine first."""
    return sorted((path.stem for path in _FOLDER.glob("*.toml")), key=lambda name: (len(name), name))


def shipped_text(name: str) -> str:
    """The TOML of a shipped recipe."""
    return (_FOLDER / f"{name}.toml").read_text("utf-8")


def shipped() -> dict[str, str]:
    """Their descriptions by name."""
    return {name: load(name).description for name in shipped_names()}


def parse(text: str, origin: str) -> Recipe:
    """A recipe from its text. Raises RecipeError, with `origin` and the line, for anything it does not understand."""
    lines: dict[str, int] = {}
    settings: dict[str, Any] = {}
    rules = []
    for line, key, value in _statements(text, origin):
        where = f"{origin} line {line}"
        if key in lines:
            raise RecipeError(f"{where}: {key!r} is already on line {lines[key]}", hint="Remove one of them.")
        lines[key] = line
        if key in SETTINGS:
            settings[key] = _setting(key, value, where)
        else:
            rules.append(_rule(line, key, value, where))
    if sum(key in settings for key in ("default", "base", "bpw")) != 1:
        given = ", ".join(f"{key} on line {lines[key]}" for key in ("default", "base", "bpw") if key in settings)
        raise RecipeError(
            f"{origin}: exactly one of default, base and bpw decides what no rule does; found {given or 'none'}",
            hint='Give a type (default = "Q8_0"), a stock mixture (base = "Q4_K_M") or a target (bpw = 4.2).',
        )
    settings = {"name": Path(origin).stem, "description": "", **settings}
    return Recipe(origin=origin, text=text, rules=tuple(rules), **settings)


def _statements(text: str, origin: str) -> Iterator[tuple[int, str, Any]]:
    """Line, key and value of each top-level statement, in one pass over the text.

    TOML ends a statement at the end of its line unless a string or a bracket is open. Where one ends is found by the
    tokens that can hide a line's end; what it says is for tomllib, which reads each statement once.
    """
    line, first, start, depth = 1, 1, 0, 0
    for token in _TOKEN.finditer(text + "\n"):
        what = token[0]
        depth += (what in ("[", "{")) - (what in ("]", "}"))
        line += what.count("\n")
        if what == "\n" and depth <= 0:
            statement = text[start : token.end()]
            try:
                table = _read(statement)
            except (ValueError, RecursionError):  # TOMLDecodeError, digits without end, brackets without end
                raise _not_toml(statement, f"{origin} line {first}") from None
            for key, value in table.items():
                yield first, key, value
            first, start, depth = line, token.end(), 0
    if start < len(text):
        raise _not_toml(text[start:], f"{origin} line {first}")


def _read(statement: str) -> dict[str, Any]:
    """tomllib's time and memory grow with the square of the number of a key's parts: dots are bounded."""
    if not statement.strip() or statement.startswith("#"):
        return {}
    if statement.count(".") > _MAX_DOTS:
        raise ValueError
    table: dict[str, Any] = tomllib.loads(statement)
    return table


def _not_toml(statement: str, where: str) -> RecipeError:
    first = statement.lstrip("\n").split("\n", 1)[0].strip()[:80]
    return RecipeError(f"{where}: not TOML: {first}", hint="A line is KEY = VALUE, and short; quote the value.")


def _setting(key: str, value: Any, where: str) -> Any:
    if key == "bpw":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 32:
            raise RecipeError(f"{where}: bpw is {value!r}, expected a number of bits per weight above 0, at most 32")
        return float(value)
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key} is {value!r}, expected text in quotes")
    if key == "default":
        return _type(value, where)
    if key == "base":
        if value.upper() not in BASE:
            raise RecipeError(
                f"{where}: unknown stock mixture {value!r}{did_you_mean(value, BASE)}",
                hint=f"Choose from {', '.join(BASE)}.",
            )
        return value.upper()
    return value


def _rule(line: int, key: str, value: Any, where: str) -> Rule:
    pattern, at, layers_text = key.partition("@")
    roles = _roles(pattern, where)
    layers = _layers(layers_text, where) if at else None
    if at:
        inside = tuple(role for role in roles if role in LAYER_ROLES)
        if not inside or ("*" not in pattern and inside != roles):
            outside = next(role for role in roles if role not in LAYER_ROLES)
            raise RecipeError(f"{where}: {outside} is not in the trunk's layers", hint="Leave @ and the layers out.")
        roles = inside
    match value:
        case str():
            return Rule(line, key, roles, layers, _type(value, where), is_floor=False)
        case {"floor": str(name), **others} if not others:
            return Rule(line, key, roles, layers, _type(name, where), is_floor=True)
    raise RecipeError(
        f"{where}: {key} is {value!r}, expected a type or a floor",
        hint='Write KEY = "Q5_K" or KEY = { floor = "Q5_K" }; a KEY with a dot, a star or a comma is quoted.',
    )


def _roles(text: str, where: str) -> tuple[str, ...]:
    """Every role that one of the patterns names, in the order of ROLES."""
    found: set[str] = set()
    parts = re.split(r",(?![^{}]*\})", text) if text.count("{") <= _MAX_NAMES else []
    patterns = [p for part in parts for p in islice(_expanded(part.strip()), _MAX_NAMES)]
    if len(patterns) >= _MAX_NAMES or text.count("{") > _MAX_NAMES:
        raise RecipeError(f"{where}: stands for {_MAX_NAMES} names and more", hint="Write * for any part of a name.")
    for pattern in patterns:
        # A star does not cross the dot, so nothing but nextn itself reaches the MTP blocks.
        wanted = "nextn.*" if pattern == "nextn" else re.sub(r"\*+", "*", pattern)
        regex = re.escape(wanted).replace(r"\*", "[^.]*")
        roles = {role for role in ROLES if len(wanted) <= 2 * len(role) and re.fullmatch(regex, role)}
        if not roles:
            raise _unknown_role(pattern, regex, where)
        found |= roles
    return tuple(role for role in ROLES if role in found)


def _expanded(pattern: str) -> Iterator[str]:
    """a{b,c}d -> abd, acd."""
    head, brace, rest = pattern.partition("{")
    inside, end, tail = rest.partition("}")
    if not brace or not end:
        yield pattern
        return
    for alternative in inside.split(","):
        yield from _expanded(head + alternative.strip() + tail)


def _layers(text: str, where: str) -> tuple[tuple[int, int | None], ...]:
    spans: list[tuple[int, int | None]] = []
    for part in text.split(","):
        found = _LAYERS.fullmatch(part.strip())
        if found is None:
            raise RecipeError(
                f"{where}: {part.strip()!r} are no layers", hint='Write "7", "0-4", "39-", "first 5" or "last 6".'
            )
        if found["end"]:
            spans.append((0, int(found["n"])) if found["end"] == "first" else (-int(found["n"]), None))
            continue
        start = int(found["from"])
        stop = None if found["range"] == "-" else int(found["to"] or start) + 1
        if stop is not None and stop <= start:
            raise RecipeError(f"{where}: the layers {part.strip()} end before they begin")
        spans.append((start, stop))
    return tuple(spans)


def _type(name: str, where: str) -> GGMLQuantizationType:
    wanted = name.upper()
    if wanted in TYPES:
        return TYPES[wanted]
    if wanted in BASE:
        raise RecipeError(
            f"{where}: {name} is a mixture of types; did you mean {BASE[wanted].name}?",
            hint=f'A rule and the default take one type; base = "{wanted}" starts from the mixture.',
        )
    raise RecipeError(
        f"{where}: unknown type {name!r}{did_you_mean(name, TYPES)}", hint=f"Choose from {', '.join(TYPES)}."
    )


def _unknown_role(pattern: str, regex: str, where: str) -> RecipeError:
    kept = [role for role in FLOAT32_ROLES if len(pattern) <= 2 * len(role) and re.fullmatch(regex, role)]
    if kept:
        return RecipeError(f"{where}: {', '.join(kept)} stays F32", hint="Norms and the router are never quantized.")
    return RecipeError(
        f"{where}: unknown role {pattern[:80]!r}{did_you_mean(pattern, (*ROLES, 'nextn', *SETTINGS))}",
        hint=f"Roles are {', '.join((*MODEL_ROLES, *LAYER_ROLES, 'nextn'))}; settings {', '.join(SETTINGS)}.",
    )


@lru_cache(maxsize=8)
def _table(recipe: Recipe, n_layer: int) -> dict[Place, Rule]:
    """The rule of every place that has one. Here each rule must have a place that is its own."""
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


def _fitting(kind: GGMLQuantizationType, candidate: Candidate, reason: str) -> Choice:
    fitting = mixtures.fallback(kind, candidate.shape[-1])
    if fitting != kind:
        reason += f"; rows of {candidate.shape[-1]} do not divide into {kind.name} blocks"
    return Choice(fitting, reason)


def bits_per_weight(kind: GGMLQuantizationType) -> float:
    """Of a type's blocks."""
    values, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / values
