"""What each keyword of a JSON schema demands, added to what the others said: one function for each shape of value."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from stepgguf.grammar.gbnf import MAX_REPEAT
from stepgguf.grammar.interval import DIGITS, Bound
from stepgguf.grammar.merged_schema import ALL_TYPES, MergedSchema, SchemaAt, widen_types


class UnsupportedKeyword(Exception):
    """A keyword that cannot be held, or whose value makes no sense. The text starts with its JSON pointer."""

    def __init__(self, at: str, problem: str) -> None:
        super().__init__(f"{at}: {problem}")


def read_keyword(merged: MergedSchema, key: str, value: object, at: str) -> None:
    """Add what a keyword demands. `at` is its JSON pointer. UnsupportedKeyword: it cannot be held."""
    _READERS.get(key, _refuse_unknown)(merged, key, value, at)
    merged.keywords.add(key)


def schemas_of(value: object, at: str) -> list[SchemaAt]:
    """Return the schemas of a list, each with its pointer. UnsupportedKeyword: it is no list, or an empty one."""
    if not isinstance(value, list) or not value:
        raise UnsupportedKeyword(at, "it must be a list of schemas")
    return [(schema, f"{at}/{i}") for i, schema in enumerate(value)]


def _refuse_unknown(_: MergedSchema, key: str, value: object, at: str) -> None:
    raise UnsupportedKeyword(at, f"the keyword {key} is not supported")


def _read_type(merged: MergedSchema, _: str, value: object, at: str) -> None:
    names: list[Any] = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in ALL_TYPES for name in names):
        raise UnsupportedKeyword(at, f"{json.dumps(value)[:80]} is not a type")
    merged.types = widen_types(names) if merged.types is None else merged.types & widen_types(names)


def _read_values(merged: MergedSchema, key: str, value: object, at: str) -> None:
    """Add what enum and const demand: both are lists of values, and a value must be in all of them."""
    values = [value] if key == "const" else value
    if not isinstance(values, list) or not values:
        raise UnsupportedKeyword(at, "it must be a list of values")
    if merged.enum is not None:
        texts = {json.dumps(member) for member in values}  # by text, because True == 1 in Python
        values = [member for member in merged.enum if json.dumps(member) in texts]
    merged.enum = values
    merged.enum_at = at


def _check_object_keyword(_: MergedSchema, key: str, value: object, at: str) -> None:
    """Only check: the schemas of properties are read from MergedSchema.objects."""
    if key == "properties" and not isinstance(value, dict):
        raise UnsupportedKeyword(at, "it must be an object")
    if key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise UnsupportedKeyword(at, "it must be a list of names")


def _check_array_keyword(_: MergedSchema, key: str, value: object, at: str) -> None:
    """Only check: the schemas of elements are read from MergedSchema.arrays."""
    if key == "prefixItems":
        schemas_of(value, at)


def _read_bound(merged: MergedSchema, key: str, value: object, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UnsupportedKeyword(at, "it must be a number")
    bound = Bound(Decimal(str(value)), key.startswith("exclusive"))
    if len(f"{bound.value:f}".partition(".")[2]) > DIGITS:
        raise UnsupportedKeyword(at, f"a bound may have {DIGITS} digits after the point")
    if key.endswith("inimum"):
        merged.low = max((merged.low or bound, bound), key=lambda b: (b.value, b.open))
    else:
        merged.high = min((merged.high or bound, bound), key=lambda b: (b.value, not b.open))


def _read_count(merged: MergedSchema, key: str, value: object, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnsupportedKeyword(at, "it must be a whole number, 0 or more")
    if value > MAX_REPEAT:
        raise UnsupportedKeyword(at, f"{value} is more than the grammar engine can count to, {MAX_REPEAT}")
    what = key[3:]  # "Items", "Length"
    if key.startswith("min"):
        merged.n_low[what] = max(merged.n_low.get(what, 0), value)
    else:
        merged.n_high[what] = min(merged.n_high.get(what, value), value)


def _read_text(merged: MergedSchema, key: str, value: object, at: str) -> None:
    if not isinstance(value, str):
        raise UnsupportedKeyword(at, "it must be a string")
    if key == "pattern" and merged.texts.get(key, (value, at))[0] != value:
        raise UnsupportedKeyword(at, "two patterns for one string")
    merged.texts[key] = (value, at)


_READERS: dict[str, Callable[[MergedSchema, str, object, str], None]] = {
    "type": _read_type,
    **dict.fromkeys(("enum", "const"), _read_values),
    **dict.fromkeys(("properties", "required", "additionalProperties", "propertyNames"), _check_object_keyword),
    **dict.fromkeys(("items", "prefixItems", "additionalItems"), _check_array_keyword),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _read_bound),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), _read_count),
    **dict.fromkeys(("pattern", "format"), _read_text),
}
