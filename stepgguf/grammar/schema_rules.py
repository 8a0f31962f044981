r"""JSON that a schema allows, as GBNF rules.

    node -merge-> one alternative per anyOf branch -> one per type -> a rule. The same node is compiled once, under a
    name that exists before its body does, so that schemas may be recursive.

What the model may write is what the schema allows, but for what is documented here:
  - Objects have their properties in the schema's order, extra ones last. If there are `properties` and nothing is said
    about additional ones, there are none, and likewise `prefixItems` without `items`: models ramble.
  - A schema without `type` is read as one of the types that its keywords speak of.
  - Keys, enum members and patterned strings are written as json.dumps(ensure_ascii=False) does. Numbers: see
    interval.py; exponents have two digits, an integer has no point.
  - oneOf is anyOf: that no second branch matches is not checked. `format` is held for date, time, date-time and uuid,
    and is a remark otherwise (a month may have 31 days). Keywords that start with "x-" are remarks.
A constraint that cannot be held is refused with its JSON pointer. Not so for tools (`strict` False): there it is
dropped, since agents send whatever schemas their tools have, and a loose grammar is better than no tool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from stepgguf.errors import BadGrammar
from stepgguf.grammar.gbnf import GrammarRules, literal
from stepgguf.grammar.interval import integers_between, numbers_between
from stepgguf.grammar.json_grammar import FORMATS, NOT_PLAIN, SHORT_ESCAPES, split_escapes
from stepgguf.grammar.merged_schema import ALL_TYPES, MergedSchema, Node, SchemaAt, type_of, widen_types
from stepgguf.grammar.pattern import translate_pattern
from stepgguf.grammar.schema import MAX_BYTES, MAX_DEPTH, SchemaMerger, too_large
from stepgguf.grammar.schema_keywords import UnsupportedKeyword

_NodeKey = tuple[frozenset[int], frozenset[int]]  # ids of a node's schemas, and of the anyOf lists chosen from
_T = TypeVar("_T")
_ANY_STRING: SchemaAt = ({"type": "string"}, "#")


class SchemaRules:
    """Adds the rules of one schema, `root`, to `rules`, which have JSON's (json_grammar.define_json).

    A symbol that is None stands for a schema that nothing fits. BadGrammar: the schema is too large.
    """

    def __init__(self, root: object, rules: GrammarRules, *, strict: bool) -> None:
        self.rules = rules
        self.strict = strict
        self.merger = SchemaMerger(root, rules.param, strict=strict)
        self._done: dict[_NodeKey, str | None] = {}
        self._open: dict[_NodeKey, str] = {}  # being compiled, with the name that it will have if it is recursive
        self._recursive: set[_NodeKey] = set()
        self._starts: dict[_NodeKey, set[_NodeKey]] = {}  # node -> the nodes that it may start with
        try:
            too_long = len(json.dumps(root)) > MAX_BYTES
        except RecursionError:
            too_long = True
        if too_long:
            raise too_large(rules.param, f"has more than {MAX_BYTES // 1024} KiB or nests too deep")

    def root_symbol(self) -> str:
        """Return the symbol for the whole schema. BadGrammar: not supported, or nothing is allowed."""
        return self.checked_symbol(lambda: self.symbol_of(((self.merger.root, "#"),)))

    def checked_symbol(self, make: Callable[[], str | None]) -> str:
        """Return the symbol that `make` makes; what is wrong with the schema becomes BadGrammar."""
        try:
            symbol = make()
            if symbol is None:
                raise UnsupportedKeyword("#", "the schema allows nothing")
            if has_cycle(self._starts):  # left recursion, which no grammar engine can walk
                raise UnsupportedKeyword("#", "a schema refers to itself without an object or an array between")
        except UnsupportedKeyword as error:
            param = self.rules.param
            raise BadGrammar(
                f"{param}: {error}",
                param=param,
                hint="Leave it out of the schema and check the answer yourself, or say it with what is supported.",
            ) from error
        return symbol

    def symbol_of(self, node: Node, start: _NodeKey | None = None, chosen: frozenset[int] = frozenset()) -> str | None:
        """Return the symbol for a node. start: the node that may start with this one."""
        node = self.merger.follow_references(node)
        key = (frozenset(id(schema) for schema, _ in node), chosen)
        if start is not None:
            self._starts.setdefault(start, set()).add(key)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            self._recursive.add(key)
            return self._open[key]
        if len(self._open) > MAX_DEPTH:
            raise too_large(self.rules.param, f"nests more than {MAX_DEPTH} schemas")
        name = self._open[key] = self.rules.reserve_name()
        body = self._node_symbol(node, key, chosen)
        del self._open[key]
        if key in self._recursive:  # its name is in use already, so the body must come under it
            if body is None:
                raise UnsupportedKeyword(node[0][1], "it refers to itself and allows nothing")
            body = self.rules.define_rule(name, body)
        self._done[key] = body
        return body

    def union_branches(
        self, merged: MergedSchema, node: Node, chosen: frozenset[int]
    ) -> list[tuple[Node, frozenset[int]]]:
        """Return the nodes that the first anyOf of a merged node stands for, each with what was chosen from then."""
        options, at = merged.unions[0]
        if merged.keywords <= {"anyOf", "oneOf"} and len(merged.unions) == 1:
            return [(((option, f"{at}/{i}"),), frozenset()) for i, option in enumerate(options)]
        left = chosen | {id(options)}
        return [((*node, (option, f"{at}/{i}")), left) for i, option in enumerate(options)]

    def _node_symbol(self, node: Node, key: _NodeKey, chosen: frozenset[int]) -> str | None:
        merged = self.merger.merge(node, chosen)
        if merged.never:
            return None
        if merged.unions:
            symbols = [self.symbol_of(branch, key, left) for branch, left in self.union_branches(merged, node, chosen)]
            return self._either_of(symbols)
        return self._enum_symbol(merged) if merged.enum is not None else self.typed_symbol(merged)

    def typed_symbol(self, merged: MergedSchema) -> str | None:
        """Return the symbol for a merged node without anyOf and enum: an alternative for each allowed type."""
        if not merged.keywords:
            return "value"
        types = merged.allowed_types()
        names = types - {"integer"} if "number" in types else types
        return self._either_of([self._type_symbol(name, merged) for name in sorted(names)])

    def _either_of(self, symbols: list[str | None]) -> str | None:
        allowed = [symbol for symbol in symbols if symbol is not None]
        return self.rules.either_of(allowed) if allowed else None

    def enum_members(self, merged: MergedSchema) -> list[object]:
        """Return the enum's members of an allowed type. UnsupportedKeyword: other keywords would have to be checked."""
        others = merged.keywords - {"enum", "const", "type", "format", "anyOf", "oneOf"}
        if others and self.strict:
            raise UnsupportedKeyword(merged.enum_at, f"enum or const together with {', '.join(sorted(others))}")
        types = widen_types(merged.types or ALL_TYPES)
        return [member for member in merged.enum or () if type_of(member) in types]

    def _enum_symbol(self, merged: MergedSchema) -> str | None:
        texts = [json.dumps(member, ensure_ascii=False) for member in self.enum_members(merged)]
        return self.rules.one_of_texts(texts) if texts else None

    def _type_symbol(self, name: str, merged: MergedSchema) -> str | None:
        if name == "object":
            return self._object_symbol(merged)
        if name == "array":
            return self._array_symbol(merged)
        if name == "string":
            return self._string_symbol(merged)
        if name in ("number", "integer") and (merged.low or merged.high):
            between = integers_between if name == "integer" else numbers_between
            options = between(merged.low, merged.high)
            return None if options is None else self.rules.symbol_for(options)
        return name

    # objects -------------------------------------------------------------------------------------------------------

    def _object_symbol(self, merged: MergedSchema) -> str | None:
        members = []
        for name, node, required in merged.properties():
            self.merger.count_visits(len(merged.objects))
            symbol = self.symbol_of(node)
            if symbol is None and required:
                return None
            if symbol is not None:
                key = literal(json.dumps(name, ensure_ascii=False) + ":")
                members.append((self.rules.symbol_for(f"{key} ws {symbol}"), required))
        extra = self._extra_member(merged, [name for name, _, _ in merged.properties()])
        # From the last property to the first: `some` is this one or a later one and what follows it; `rest` is what
        # follows the one before it. So each property is one rule, and not one for each set of others before it.
        rest = self.rules.symbol_for(f'("," ws {extra})*') if extra else '""'
        some = self.rules.symbol_for(f"{extra} {rest}") if extra else None
        must = False  # one of them is required, so the object is not empty
        for member, required in reversed(members):
            some = self.rules.either_of([f"{member} {rest}", *([some] if some and not required else [])])
            must |= required
            rest = self.rules.symbol_for(f'"," ws {some}' if must else f'("," ws {some})?')
        if some is None:
            return self.rules.symbol_for('"{" ws "}"')
        return self.rules.symbol_for(f'"{{" ws {some} ws "}}"' if must else f'"{{" ws ({some} ws)? "}}"')

    def _extra_member(self, merged: MergedSchema, names: list[str]) -> str | None:
        """A property that is not declared, with its name."""
        node = merged.extra_properties()
        symbol = None if node is None else self.symbol_of(node)
        if symbol is None:
            return None
        property_names = merged.property_names()
        key: str | None = "string"
        if property_names:
            key = self.symbol_of((*property_names, _ANY_STRING))
        elif names:
            words = [tuple(split_escapes(json.dumps(name, ensure_ascii=False)[1:-1])) for name in names]
            key = self.rules.symbol_for(f'"\\"" {self.rules.any_text_but(words, NOT_PLAIN, SHORT_ESCAPES)} "\\""')
        return self.rules.symbol_for(f'{key} ":" ws {symbol}') if key else None

    # arrays --------------------------------------------------------------------------------------------------------

    def _array_symbol(self, merged: MergedSchema) -> str | None:
        first, rest = merged.elements()
        low, high = merged.n_low.get("Items", 0), merged.n_high.get("Items")
        symbols: list[str] = []
        for node in first[:high]:
            symbol = self.symbol_of(node)
            if symbol is None:  # no element fits here, so the array ends before it
                rest = None
                break
            symbols.append(symbol)
        more = None if rest is None or (high is not None and high <= len(symbols)) else self.symbol_of(rest)
        if more and not symbols:
            symbols = [more]
        if (low > len(symbols) and not more) or (high is not None and low > high):
            return None
        return self._element_list(symbols, more, low, high)

    def _element_list(self, symbols: list[str], more: str | None, low: int, high: int | None) -> str:
        """An array of these elements, then any number of `more`, low to high in all."""
        if not symbols:
            return self.rules.symbol_for('"[" ws "]"')
        tail = '""'
        if more:
            n = len(symbols)
            following = self.rules.symbol_for(f'"," ws {more}')
            tail = self.rules.repeat_symbol(following, max(0, low - n), None if high is None else high - n)
        for i in range(len(symbols) - 1, 0, -1):
            tail = self.rules.symbol_for(f'"," ws {symbols[i]} {tail}' if i < low else f'("," ws {symbols[i]} {tail})?')
        body = f"{symbols[0]} {tail} ws"
        return self.rules.symbol_for(f'"[" ws {body} "]"' if low else f'"[" ws ({body})? "]"')

    # strings -------------------------------------------------------------------------------------------------------

    def _string_symbol(self, merged: MergedSchema) -> str | None:
        low, high = merged.n_low.get("Length", 0), merged.n_high.get("Length")
        pattern, at = merged.texts.get("pattern", ("", ""))
        form = FORMATS.get(merged.texts.get("format", ("", ""))[0])
        if (at or form) and (low or high is not None) and self.strict:
            raise UnsupportedKeyword(merged.at, "pattern or format together with minLength or maxLength")
        if at:
            try:
                return self.rules.symbol_for(f'"\\"" {translate_pattern(pattern, self.rules)} "\\""')
            except ValueError as error:
                if self.strict:
                    raise UnsupportedKeyword(at, f"the pattern {pattern[:80]!r} is not supported: {error}") from error
        if form:
            return self.rules.symbol_for(f'"\\"" {form} "\\""')
        if high is not None and low > high:
            return None
        if (low, high) == (0, None):
            return "string"
        return self.rules.symbol_for(f'"\\"" {self.rules.repeat_symbol("char", low, high)} "\\""')


def has_cycle(edges: Mapping[_T, set[_T]]) -> bool:
    """Whether a path of these edges comes back to where it was. No recursion: a chain may have thousands of nodes."""
    on_path: dict[_T, bool] = {}  # True: on the path, False: walked and without a cycle
    for root in edges:
        if root in on_path:
            continue
        on_path[root] = True
        path: list[tuple[_T, Iterator[_T]]] = [(root, iter(edges[root]))]
        while path:
            node, following = path[-1]
            child = next(following, None)
            if child is None:
                on_path[node] = False
                path.pop()
            elif child not in on_path:
                on_path[child] = True
                path.append((child, iter(edges.get(child, ()))))
            elif on_path[child]:
                return True
    return False
