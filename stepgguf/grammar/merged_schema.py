"""What schemas say together that must all hold for one value: the stage between a JSON schema and its grammar.

schema.py fills a MergedSchema in, keyword by keyword; schema_rules.py and the grammar of tool calls read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stepgguf.grammar.interval import Bound

SchemaAt = tuple[Any, str]  # a schema as it was sent, and its JSON pointer
Node = tuple[SchemaAt, ...]  # schemas that all hold for one value; none at all: any value

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
TYPE_OF_KEYWORD = {
    **dict.fromkeys(("properties", "required", "additionalProperties", "propertyNames"), "object"),
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("pattern", "format", "minLength", "maxLength"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
}


def type_of(value: object) -> str:
    """Return the JSON type of a parsed value: "integer" for whole numbers, "number" for the others."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {bool: "boolean", int: "integer", str: "string", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def widen_types(types: Iterable[str]) -> frozenset[str]:
    """Return the types, with "integer" wherever there is "number"."""
    result = frozenset(types)
    return result | {"integer"} if "number" in result else result


@dataclass(slots=True)
class MergedSchema:
    """Keywords, combined. `keywords`: the names of all that were said, annotations aside; `never`: no value fits.

    enum: the values that both enum and const leave, None if neither was said. unions: anyOf and oneOf lists that still
    have to be chosen from. low and high bound a number, n_low and n_high the number of "Items" or the "Length".
    """

    never: bool = False
    keywords: set[str] = field(default_factory=set)
    types: frozenset[str] | None = None
    enum: list[object] | None = None
    enum_at: str = ""
    unions: list[tuple[list[Any], str]] = field(default_factory=list)
    objects: list[SchemaAt] = field(default_factory=list)  # the schemas that speak of properties
    arrays: list[SchemaAt] = field(default_factory=list)  # and those that speak of elements
    low: Bound | None = None
    high: Bound | None = None
    n_low: dict[str, int] = field(default_factory=dict)
    n_high: dict[str, int] = field(default_factory=dict)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)  # pattern, format: the text and its pointer
    at: str = "#"

    def allowed_types(self) -> frozenset[str]:
        """Return the types that it may be; if none was said, those that its keywords speak of."""
        if self.types is not None:
            return self.types
        return widen_types(TYPE_OF_KEYWORD[k] for k in self.keywords if k in TYPE_OF_KEYWORD) or ALL_TYPES

    def properties(self) -> Iterator[tuple[str, Node, bool]]:
        """Yield name, schemas, and whether it is required: in the schemas' order, then those that are only required."""
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

    def extra_properties(self) -> Node | None:
        """Return what a property that is not declared must be; None: there may be none."""
        key = "additionalProperties"
        parts = tuple((schema[key], f"{at}/{key}") for schema, at in self.objects if key in schema)
        closed = not parts and any("properties" in schema for schema, _ in self.objects)
        return None if closed or any(schema is False for schema, _ in parts) else parts

    def property_names(self) -> Node:
        """Return what the name of a property that is not declared must be."""
        return tuple((s["propertyNames"], f"{at}/propertyNames") for s, at in self.objects if "propertyNames" in s)

    def elements(self) -> tuple[list[Node], Node | None]:
        """Return the schemas of the first elements, and of all after them (None: there are none)."""
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
