"""The text of a recipe: which type each tensor gets, as a short TOML of ordered rules on roles.

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

Exactly one of default, base and bpw is there. The first rule that matches a tensor wins. Norms, the
router and its bias stay F32: no rule can name them. What would be ignored silently is an error that names the line.

The grammar is flat, so that each line of the file is one decision and a reason can cite it: "recipe line 6".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from stepgguf.errors import RecipeError
from stepgguf.quants.mixtures import BASE_TYPES
from stepgguf.quants.recipe import FLOAT32_ROLES, LAYER_ROLES, MODEL_ROLES, ROLES, Recipe, Rule
from stepgguf.quants.type_names import did_you_mean
from stepgguf.quants.types import BY_NAME

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS = ("name", "description", "default", "base", "bpw")

_LAYERS = re.compile(r"(?P<from>[0-9]{1,4})(?P<range>-(?P<to>[0-9]{0,4}))?|(?P<end>first|last) +(?P<n>[1-9][0-9]{0,3})")

_MAX_DOTS = 100
# What can hide the end of a line, or is one. A string that is not closed is no token, and its quote is passed over.
_TOKEN = re.compile(
    r'''"""(?:[^\\]|\\.)*?"""|"(?:[^"\\\n]|\\.)*"|#[^\n]*|[\[\]{}\n]|''' r"""'{3}.*?'{3}|'[^'\n]*'""", re.DOTALL
)
_MAX_NAMES = 100  # that one key may stand for


def parse_recipe(text: str, origin: str) -> Recipe:
    """A recipe from its text. Raises RecipeError, with `origin` and the line, for anything it does not understand."""
    lines: dict[str, int] = {}
    settings: dict[str, Any] = {}
    rules = []
    for line, key, value in split_statements(text, origin):
        where = f"{origin} line {line}"
        if key in lines:
            raise RecipeError(f"{where}: {key!r} is already on line {lines[key]}", hint="Remove one of them.")
        lines[key] = line
        if key in SETTINGS:
            settings[key] = _read_setting(key, value, where)
        else:
            rules.append(_read_rule(line, key, value, where))
    if sum(key in settings for key in ("default", "base", "bpw")) != 1:
        given = ", ".join(f"{key} on line {lines[key]}" for key in ("default", "base", "bpw") if key in settings)
        raise RecipeError(
            f"{origin}: exactly one of default, base and bpw decides what no rule does; found {given or 'none'}",
            hint='Give a type (default = "Q8_0"), a stock mixture (base = "Q4_K_M") or a target (bpw = 4.2).',
        )
    settings = {"name": Path(origin).stem, "description": "", **settings}
    return Recipe(origin=origin, text=text, rules=tuple(rules), **settings)


def split_statements(text: str, origin: str) -> Iterator[tuple[int, str, Any]]:
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
                table = _load_statement(statement)
            except (ValueError, RecursionError):  # TOMLDecodeError, digits without end, brackets without end
                raise _not_toml(statement, f"{origin} line {first}") from None
            for key, value in table.items():
                yield first, key, value
            first, start, depth = line, token.end(), 0
    if start < len(text):
        raise _not_toml(text[start:], f"{origin} line {first}")


def _load_statement(statement: str) -> dict[str, Any]:
    """What one statement says; {} for an empty line or a comment. ValueError for no TOML, and for too many dots."""
    if not statement.strip() or statement.startswith("#"):
        return {}
    if statement.count(".") > _MAX_DOTS:  # tomllib takes time and memory as the square of a key's parts
        raise ValueError
    table: dict[str, Any] = tomllib.loads(statement)
    return table


def _not_toml(statement: str, where: str) -> RecipeError:
    """The error for a statement that tomllib refuses, with its first line."""
    first = statement.lstrip("\n").split("\n", 1)[0].strip()[:80]
    return RecipeError(f"{where}: not TOML: {first}", hint="A line is KEY = VALUE, and short; quote the value.")


def _read_setting(key: str, value: Any, where: str) -> Any:
    """A setting's value as Recipe has it. RecipeError for one of the wrong kind."""
    if key == "bpw":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 32:
            raise RecipeError(f"{where}: bpw is {value!r}, expected a number of bits per weight above 0, at most 32")
        return float(value)
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key} is {value!r}, expected text in quotes")
    if key == "default":
        return _read_type(value, where)
    if key == "base":
        if value.upper() not in BASE_TYPES:
            raise RecipeError(
                f"{where}: unknown stock mixture {value!r}{did_you_mean(value, BASE_TYPES)}",
                hint=f"Choose from {', '.join(BASE_TYPES)}.",
            )
        return value.upper()
    return value


def _read_rule(line: int, key: str, value: Any, where: str) -> Rule:
    """The rule of KEY = TYPE or KEY = { floor = TYPE }, where KEY is ROLES or ROLES @ LAYERS."""
    pattern, at, layers_text = key.partition("@")
    roles = _read_roles(pattern, where)
    layers = _read_layers(layers_text, where) if at else None
    if at:
        inside = tuple(role for role in roles if role in LAYER_ROLES)
        # A star may stand for more than what has layers; a role that is spelled out may not.
        if not inside or ("*" not in pattern and inside != roles):
            outside = next(role for role in roles if role not in LAYER_ROLES)
            raise RecipeError(f"{where}: {outside} is not in the trunk's layers", hint="Leave @ and the layers out.")
        roles = inside
    match value:
        case str():
            return Rule(line, key, roles, layers, _read_type(value, where), is_floor=False)
        case {"floor": str(name), **others} if not others:
            return Rule(line, key, roles, layers, _read_type(name, where), is_floor=True)
    raise RecipeError(
        f"{where}: {key} is {value!r}, expected a type or a floor",
        hint='Write KEY = "Q5_K" or KEY = { floor = "Q5_K" }; a KEY with a dot, a star or a comma is quoted.',
    )


def _read_roles(text: str, where: str) -> tuple[str, ...]:
    """Every role that one of the patterns names, in the order of ROLES."""
    found: set[str] = set()
    parts = re.split(r",(?![^{}]*\})", text) if text.count("{") <= _MAX_NAMES else []
    patterns = [p for part in parts for p in islice(_expand_braces(part.strip()), _MAX_NAMES)]
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


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a pattern with braces stands for: a{b,c}d -> abd, acd."""
    head, brace, rest = pattern.partition("{")
    inside, end, tail = rest.partition("}")
    if not brace or not end:
        yield pattern
        return
    for alternative in inside.split(","):
        yield from _expand_braces(head + alternative.strip() + tail)


def _read_layers(text: str, where: str) -> tuple[tuple[int, int | None], ...]:
    """The layers as [start, stop) as Rule has them: "0-4, last 6" -> (0, 5), (-6, None)."""
    spans: list[tuple[int, int | None]] = []
    for part in text.split(","):
        found = _LAYERS.fullmatch(part.strip())
        if found is None:
            raise RecipeError(
                f"{where}: {part.strip()!r} names no layers", hint='Write "7", "0-4", "39-", "first 5" or "last 6".'
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


def _read_type(name: str, where: str) -> GGMLQuantizationType:
    """One type. RecipeError for a mixture, with the type it starts from, and for a name that is neither."""
    wanted = name.upper()
    if wanted in BY_NAME:
        return BY_NAME[wanted].ggml_type
    if wanted in BASE_TYPES:
        raise RecipeError(
            f"{where}: {name} is a mixture of types; did you mean {BASE_TYPES[wanted].name}?",
            hint=f'A rule and the default take one type; base = "{wanted}" starts from the mixture.',
        )
    raise RecipeError(
        f"{where}: unknown type {name!r}{did_you_mean(name, BY_NAME)}", hint=f"Choose from {', '.join(BY_NAME)}."
    )


def _unknown_role(pattern: str, regex: str, where: str) -> RecipeError:
    """The error for a pattern that names no role, or only roles that stay F32."""
    kept = [role for role in FLOAT32_ROLES if len(pattern) <= 2 * len(role) and re.fullmatch(regex, role)]
    if kept:
        return RecipeError(f"{where}: {', '.join(kept)} stays F32", hint="Norms and the router are never quantized.")
    return RecipeError(
        f"{where}: unknown role {pattern[:80]!r}{did_you_mean(pattern, (*ROLES, 'nextn', *SETTINGS))}",
        hint=f"Roles are {', '.join((*MODEL_ROLES, *LAYER_ROLES, 'nextn'))}; settings {', '.join(SETTINGS)}.",
    )
