"""What the JSON schema of a function's parameters says of them: which there are, of what types, which are required.

A client's schema may be anything, and it is asked about while an answer arrives: what makes no sense, is nested beyond
Python's stack, or refers to itself allows everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from stepgguf.grammar.merged_schema import ALL_TYPES, type_of, widen_types
from stepgguf.grammar.schema import resolve_reference

_COMBINERS = ("allOf", "anyOf", "oneOf")


def parameter_names(parameters: object) -> frozenset[str]:
    """Return the parameters that a function's schema lists, wherever it does."""
    listed = (part.get("properties") for part in _parts_of(parameters, _COMBINERS))
    return frozenset(name for names in listed if isinstance(names, Mapping) for name in names)


def required_names(parameters: object) -> frozenset[str]:
    """Return the parameters that every call must have."""
    listed = (part.get("required") for part in _parts_of(parameters, ("allOf",)))
    return frozenset(name for names in listed if isinstance(names, list) for name in names if isinstance(name, str))


def parameter_types(parameters: object, key: str) -> frozenset[str]:
    """Return the JSON types that the parameter `key` of a function may have; all of them if nothing is said."""
    types = [allowed_types(schema, parameters) for schema in _schemas_of_parameter(parameters, key)]
    return frozenset().union(*types) if types else ALL_TYPES


def allowed_types(schema: object, root: object) -> frozenset[str]:
    """Return the JSON types that a schema of the document `root` allows."""
    try:
        return _types_of(schema, root, {}) or ALL_TYPES
    except RecursionError:
        return ALL_TYPES


def _types_of(schema: object, root: object, known: dict[int, frozenset[str]]) -> frozenset[str]:
    """Return the types that a schema allows. known: the answers so far, by id; a schema inside itself allows all."""
    if not isinstance(schema, Mapping):
        return frozenset() if schema is False else ALL_TYPES
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = ALL_TYPES
    types = ALL_TYPES
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        types &= widen_types(name for name in names if isinstance(name, str)) & ALL_TYPES or ALL_TYPES
    members = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(members, list):
        types &= frozenset(map(type_of, members))
    for part in _combined_schemas(schema, root, ("allOf",)):
        types &= _types_of(part, root, known)
    for name in ("anyOf", "oneOf"):
        branches = [_types_of(part, root, known) for part in _combined_schemas(schema, root, (name,))]
        types &= frozenset().union(*branches) if branches else ALL_TYPES
    known[id(schema)] = types
    return types


def _schemas_of_parameter(parameters: object, key: str) -> Iterator[object]:
    """The schemas of a property, wherever an object's schema may have it."""
    for part in _parts_of(parameters, _COMBINERS):
        properties = part.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            yield properties[key]
        elif isinstance(part.get("additionalProperties"), Mapping):
            yield part["additionalProperties"]


def _parts_of(root: object, combiners: Iterable[str]) -> Iterator[Mapping[str, object]]:
    """A schema, and all that it is made of by these keywords, each once."""
    todo, seen = [root], set[int]()
    while todo:
        schema = todo.pop()
        if isinstance(schema, Mapping) and id(schema) not in seen:
            seen.add(id(schema))
            yield schema
            todo += _combined_schemas(schema, root, combiners)


def _combined_schemas(schema: Mapping[str, object], root: object, combiners: Iterable[str]) -> Iterator[object]:
    """The schemas under these keywords; a $ref is one that holds as well, as in allOf."""
    for name in combiners:
        parts = schema.get(name)
        yield from parts if isinstance(parts, list) else ()
    found = resolve_reference(root, schema.get("$ref"))
    if found is not None and "allOf" in combiners:
        yield found[0]
