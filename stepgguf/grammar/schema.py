"""What a JSON schema says (draft 2020-12, and the older spellings that clients still send), before any grammar.

    Node: schemas that all hold -Merger.merge-> Merged: their keywords, combined; $ref and allOf are followed

Only the same instance is read twice, so that references that double at each step ("billion laughs") cost nothing,
and a loop of them ends. A schema comes from a stranger: bytes, depth and work have limits.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from stepgguf.errors import BadGrammar
from stepgguf.grammar.gbnf import MAX_REPEAT
from stepgguf.grammar.interval import DIGITS, Bound

Part = tuple[Any, str]  # a schema and its JSON pointer
Node = tuple[Part, ...]  # all of them hold; none at all: any value

MAX_BYTES = 256 * 1024  # of a schema; real ones have a few thousand
MAX_DEPTH = 64  # schemas inside schemas: Python's stack
MAX_VISITS = 8192  # merged schemas: $ref and allOf can double the work with each line

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions $anchor title description default example examples deprecated readOnly "
    "writeOnly contentEncoding contentMediaType contentSchema discriminator".split()
)
_SPOKEN_OF = {
    **dict.fromkeys(("properties", "required", "additionalProperties", "propertyNames"), "object"),
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("pattern", "format", "minLength", "maxLength"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
}
_HARMLESS = {"uniqueItems": False, "minProperties": 0, "nullable": False}


class Unsupported(Exception):
    """A keyword that cannot be held, by its JSON pointer."""

    def __init__(self, at: str, problem: str) -> None:
        super().__init__(f"{at}: {problem}")


def resolve(root: Any, ref: Any) -> Part | None:
    """What a local $ref points to; None: it is remote, or nothing is there."""
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        return None
    found = root
    for name in urllib.parse.unquote(ref).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and len(name) < 9 and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found, ref


def type_of(value: Any) -> str:
    """The JSON type of a parsed value: "integer" for whole numbers, "number" for the others."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {bool: "boolean", int: "integer", str: "string", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def widen(types: Iterable[str]) -> frozenset[str]:
    """With "integer" wherever there is "number"."""
    result = frozenset(types)
    return result | {"integer"} if "number" in result else result


@dataclass(slots=True)
class Merged:
    """What several schemas that must all hold say together. `keywords`: all that were said, annotations aside."""

    never: bool = False
    keywords: set[str] = field(default_factory=set)
    types: frozenset[str] | None = None
    enum: list[Any] | None = None
    enum_at: str = ""
    unions: list[tuple[list[Any], str]] = field(default_factory=list)
    objects: list[Part] = field(default_factory=list)  # the schemas that speak of properties
    arrays: list[Part] = field(default_factory=list)
    low: Bound | None = None
    high: Bound | None = None
    n_low: dict[str, int] = field(default_factory=dict)  # by "Items", "Length"
    n_high: dict[str, int] = field(default_factory=dict)
    texts: dict[str, Part] = field(default_factory=dict)  # pattern, format
    at: str = "#"

    def allowed(self) -> frozenset[str]:
        """The types that it may be."""
        if self.types is not None:
            return self.types
        return widen(_SPOKEN_OF[k] for k in self.keywords if k in _SPOKEN_OF) or ALL_TYPES

    def properties(self) -> Iterator[tuple[str, Node, bool]]:
        """name, schemas, required: in the schemas' order, then those that are only required."""
        required = {name: None for schema, _ in self.objects for name in schema.get("required", ())}
        declared = {name: None for schema, _ in self.objects for name in schema.get("properties", ())}
        for name in {**declared, **required}:
            parts = []
            for schema, at in self.objects:
                if name in schema.get("properties", {}):
                    escaped = name.replace("~", "~0").replace("/", "~1")
                    parts.append((schema["properties"][name], f"{at}/properties/{escaped}"))
                elif "additionalProperties" in schema:
                    parts.append((schema["additionalProperties"], f"{at}/additionalProperties"))
            yield name, tuple(parts), name in required

    def extras(self) -> Node | None:
        """What a property that is not declared must be; None: there may be none."""
        key = "additionalProperties"
        parts = tuple((schema[key], f"{at}/{key}") for schema, at in self.objects if key in schema)
        closed = not parts and any("properties" in schema for schema, _ in self.objects)
        return None if closed or any(schema is False for schema, _ in parts) else parts

    def key_names(self) -> Node:
        return tuple((s["propertyNames"], f"{at}/propertyNames") for s, at in self.objects if "propertyNames" in s)

    def elements(self) -> tuple[list[Node], Node | None]:
        """The schemas of the first elements, and of all after them (None: there are none)."""
        n = max((len(schema.get("prefixItems", ())) for schema, _ in self.arrays), default=0)
        first: list[Node] = []
        for i in range(n):
            parts = []
            for schema, at in self.arrays:
                if i < len(schema.get("prefixItems", ())):
                    parts.append((schema["prefixItems"][i], f"{at}/prefixItems/{i}"))
                elif "items" in schema:
                    parts.append((schema["items"], f"{at}/items"))
            first.append(tuple(parts))
        rest = tuple((schema["items"], f"{at}/items") for schema, at in self.arrays if "items" in schema)
        return first, None if n and not rest else rest


class Merger:
    """Reads schemas. `strict`: what is not understood is Unsupported; otherwise it is as if it were not there."""

    def __init__(self, root: Any, param: str, *, strict: bool) -> None:
        self.root = root
        self.strict = strict
        self._param = param
        self._n_visits = 0

    def charge(self, n_visits: int) -> None:
        self._n_visits += n_visits
        if self._n_visits > MAX_VISITS:
            raise too_large(self._param, f"takes more than {MAX_VISITS} steps to read")

    def merge(self, node: Node, chosen: Collection[int] = ()) -> Merged:
        """chosen: ids of anyOf lists that are left out."""
        merged = Merged(at=node[0][1] if node else "#")
        todo, seen = list(reversed(node)), set()
        while todo:
            schema, at = todo.pop()
            self.charge(1)
            if schema is True or id(schema) in seen:
                continue
            seen.add(id(schema))
            if schema is False:
                merged.never = True
            elif isinstance(schema, dict):
                todo += reversed(self._read(merged, _modern(schema), at, chosen))
            elif self.strict:
                raise Unsupported(at, f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
        if merged.types is not None and not merged.types:
            merged.never = True
        return merged

    def _read(self, merged: Merged, schema: dict[str, Any], at: str, chosen: Collection[int]) -> list[Part]:
        """Add a schema. Returns those that hold as well."""
        more: list[Part] = []
        for key, value in schema.items():
            if key in _ANNOTATIONS or key.startswith("x-") or (key in _HARMLESS and value == _HARMLESS[key]):
                continue
            where = f"{at}/{key}"
            try:
                if key == "$ref":
                    more.append(self._target(value, where))
                elif key == "allOf":
                    more += _parts(value, where)
                elif key in ("anyOf", "oneOf"):
                    _parts(value, where)
                    merged.unions += [(value, where)] if id(value) not in chosen else []
                    merged.keywords.add(key)
                else:
                    _READERS.get(key, _unknown)(merged, key, value, where)
                    merged.keywords.add(key)
            except Unsupported:
                if self.strict:
                    raise
                schema = {k: v for k, v in schema.items() if k != key}
        if any(_SPOKEN_OF.get(key) == "object" for key in schema):
            merged.objects.append((schema, at))
        if any(_SPOKEN_OF.get(key) == "array" for key in schema):
            merged.arrays.append((schema, at))
        return more

    def _target(self, ref: Any, at: str) -> Part:
        found = resolve(self.root, ref)
        if found is None:
            raise Unsupported(at, f"{json.dumps(ref)[:80]} is not in this schema; only #/... can be followed")
        return found

    def plain_reference(self, node: Node) -> Node:
        """The schema that a node is only a $ref to, through any number of them."""
        seen = set()
        while len(node) == 1 and isinstance(node[0][0], dict) and "$ref" in node[0][0]:
            schema, at = node[0]
            if any(key != "$ref" and key not in _ANNOTATIONS for key in schema):
                break
            found = resolve(self.root, schema["$ref"])
            if found is None:
                break  # merge says what is wrong with it
            if id(schema) in seen:
                raise Unsupported(f"{at}/$ref", "it refers to itself")
            seen.add(id(schema))
            node = (found,)
        return node


def _modern(schema: dict[str, Any]) -> dict[str, Any]:
    """Draft 7's tuples as 2020-12 spells them."""
    if isinstance(schema.get("items"), list):
        rest = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
        left = {k: v for k, v in schema.items() if k not in ("items", "additionalItems")}
        return {**left, "prefixItems": schema["items"], **rest}
    return schema


def _parts(value: Any, at: str) -> list[Part]:
    if not isinstance(value, list) or not value:
        raise Unsupported(at, "it must be a list of schemas")
    return [(schema, f"{at}/{i}") for i, schema in enumerate(value)]


def _unknown(_: Merged, key: str, value: Any, at: str) -> None:
    raise Unsupported(at, f"the keyword {key} is not supported")


def _read_type(merged: Merged, _: str, value: Any, at: str) -> None:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in ALL_TYPES for name in names):
        raise Unsupported(at, f"{json.dumps(value)[:80]} is not a type")
    merged.types = widen(names) if merged.types is None else merged.types & widen(names)


def _read_enum(merged: Merged, key: str, value: Any, at: str) -> None:
    if key == "const":
        value = [value]
    if not isinstance(value, list) or not value:
        raise Unsupported(at, "it must be a list of values")
    if merged.enum is not None:
        texts = {json.dumps(member) for member in value}
        value = [member for member in merged.enum if json.dumps(member) in texts]
    merged.enum = value
    merged.enum_at = at


def _read_object(_: Merged, key: str, value: Any, at: str) -> None:
    if key == "properties" and not isinstance(value, dict):
        raise Unsupported(at, "it must be an object")
    if key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise Unsupported(at, "it must be a list of names")


def _read_prefix(_: Merged, key: str, value: Any, at: str) -> None:
    if key == "prefixItems":
        _parts(value, at)


def _read_bound(merged: Merged, key: str, value: Any, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise Unsupported(at, "it must be a number")
    bound = Bound(Decimal(str(value)), key.startswith("exclusive"))
    if len(f"{bound.value:f}".partition(".")[2]) > DIGITS:
        raise Unsupported(at, f"a bound may have {DIGITS} digits after the point")
    if key.endswith("inimum"):
        merged.low = max((merged.low or bound, bound), key=lambda b: (b.value, b.open))
    else:
        merged.high = min((merged.high or bound, bound), key=lambda b: (b.value, not b.open))


def _read_count(merged: Merged, key: str, value: Any, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unsupported(at, "it must be a whole number, 0 or more")
    if value > MAX_REPEAT:
        raise Unsupported(at, f"{value} is more than the grammar engine can count to, {MAX_REPEAT}")
    what = key[3:]
    if key.startswith("min"):
        merged.n_low[what] = max(merged.n_low.get(what, 0), value)
    else:
        merged.n_high[what] = min(merged.n_high.get(what, value), value)


def _read_text(merged: Merged, key: str, value: Any, at: str) -> None:
    if not isinstance(value, str):
        raise Unsupported(at, "it must be a string")
    if key == "pattern" and merged.texts.get(key, (value, at))[0] != value:
        raise Unsupported(at, "two patterns for one string")
    merged.texts[key] = (value, at)


_READERS: dict[str, Callable[[Merged, str, Any, str], None]] = {
    "type": _read_type,
    **dict.fromkeys(("enum", "const"), _read_enum),
    **dict.fromkeys(("properties", "required", "additionalProperties", "propertyNames"), _read_object),
    **dict.fromkeys(("items", "prefixItems", "additionalItems"), _read_prefix),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _read_bound),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), _read_count),
    **dict.fromkeys(("pattern", "format"), _read_text),
}


def too_large(param: str, problem: str) -> BadGrammar:
    return BadGrammar(f"{param} {problem}", param=param, hint="Use a smaller or flatter schema.")
