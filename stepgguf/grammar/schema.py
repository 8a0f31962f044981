"""Reading JSON schemas (draft 2020-12, and the older spellings that clients still send), before any grammar.

    Node: schemas that all hold -SchemaMerger.merge-> MergedSchema: their keywords, combined; $ref and allOf followed

Only the same instance is read twice, so that references that double at each step ("billion laughs") cost nothing,
and a loop of them ends. A schema comes from a stranger: bytes, depth and work have limits.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Collection
from typing import Any

from stepgguf.errors import BadGrammar
from stepgguf.grammar.merged_schema import TYPE_OF_KEYWORD, MergedSchema, Node, SchemaAt
from stepgguf.grammar.schema_keywords import UnsupportedKeyword, read_keyword, schemas_of

MAX_BYTES = 256 * 1024  # of a schema; real ones have a few thousand
MAX_DEPTH = 64  # schemas inside schemas: Python's stack
MAX_VISITS = 8192  # merged schemas: $ref and allOf can double the work with each line

_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions $anchor title description default example examples deprecated readOnly "
    "writeOnly contentEncoding contentMediaType contentSchema discriminator".split()
)
_HARMLESS = {"uniqueItems": False, "minProperties": 0, "nullable": False}  # these values demand nothing


def resolve_reference(root: object, ref: object) -> SchemaAt | None:
    """Return what a local $ref points to in the schema `root`; None: it is remote, or nothing is there."""
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


def too_large(param: str, problem: str) -> BadGrammar:
    """Return the error for a schema beyond the limits; `problem` is the end of a sentence about it."""
    return BadGrammar(f"{param} {problem}", param=param, hint="Use a smaller or flatter schema.")


class SchemaMerger:
    """Reads the schemas of one document, `root`. `param` is the request's field that it came in.

    strict: what is not understood raises UnsupportedKeyword; otherwise it is as if it were not there.
    """

    def __init__(self, root: object, param: str, *, strict: bool) -> None:
        self.root = root
        self.strict = strict
        self._param = param
        self._n_visits = 0

    def count_visits(self, n_visits: int) -> None:
        """Count work that was done for this document. BadGrammar: it is more than it may take."""
        self._n_visits += n_visits
        if self._n_visits > MAX_VISITS:
            raise too_large(self._param, f"takes more than {MAX_VISITS} steps to read")

    def merge(self, node: Node, chosen: Collection[int] = ()) -> MergedSchema:
        """Combine the schemas of a node. chosen: ids of anyOf lists that are left out, being chosen from already."""
        merged = MergedSchema(at=node[0][1] if node else "#")
        todo, seen = list(reversed(node)), set()
        while todo:
            schema, at = todo.pop()
            self.count_visits(1)
            if schema is True or id(schema) in seen:
                continue
            seen.add(id(schema))
            if schema is False:
                merged.never = True
            elif isinstance(schema, dict):
                todo += reversed(self._read_schema(merged, _modernize(schema), at, chosen))
            elif self.strict:
                raise UnsupportedKeyword(at, f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
        if merged.types is not None and not merged.types:
            merged.never = True
        return merged

    def _read_schema(
        self, merged: MergedSchema, schema: dict[str, Any], at: str, chosen: Collection[int]
    ) -> list[SchemaAt]:
        """Add a schema's own keywords, and return the schemas behind $ref and allOf, which hold as well."""
        also: list[SchemaAt] = []
        for key, value in schema.items():
            if key in _ANNOTATIONS or key.startswith("x-") or (key in _HARMLESS and value == _HARMLESS[key]):
                continue
            where = f"{at}/{key}"
            try:
                if key == "$ref":
                    also.append(self._reference_target(value, where))
                elif key == "allOf":
                    also += schemas_of(value, where)
                elif key in ("anyOf", "oneOf"):
                    schemas_of(value, where)
                    merged.unions += [(value, where)] if id(value) not in chosen else []
                    merged.keywords.add(key)
                else:
                    read_keyword(merged, key, value, where)
            except UnsupportedKeyword:
                if self.strict:
                    raise
                schema = {k: v for k, v in schema.items() if k != key}
        spoken_of = {TYPE_OF_KEYWORD.get(key) for key in schema}
        if "object" in spoken_of:
            merged.objects.append((schema, at))
        if "array" in spoken_of:
            merged.arrays.append((schema, at))
        return also

    def _reference_target(self, ref: object, at: str) -> SchemaAt:
        found = resolve_reference(self.root, ref)
        if found is None:
            raise UnsupportedKeyword(at, f"{json.dumps(ref)[:80]} is not in this schema; only #/... can be followed")
        return found

    def follow_references(self, node: Node) -> Node:
        """Return the schema that a node is only a $ref to, through any number of them; otherwise the node itself."""
        seen = set()
        while len(node) == 1 and isinstance(node[0][0], dict) and "$ref" in node[0][0]:
            schema, at = node[0]
            if any(key != "$ref" and key not in _ANNOTATIONS for key in schema):
                break
            found = resolve_reference(self.root, schema["$ref"])
            if found is None:
                break  # merge says what is wrong with it
            if id(schema) in seen:
                raise UnsupportedKeyword(f"{at}/$ref", "it refers to itself")
            seen.add(id(schema))
            node = (found,)
        return node


def _modernize(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with Draft 7's tuples spelled as 2020-12 does."""
    if isinstance(schema.get("items"), list):
        rest = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
        left = {k: v for k, v in schema.items() if k not in ("items", "additionalItems")}
        return {**left, "prefixItems": schema["items"], **rest}
    return schema
