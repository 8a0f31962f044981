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
from collections.abc import Callable
from typing import Any

from stepgguf.errors import BadGrammar
from stepgguf.grammar import interval, pattern
from stepgguf.grammar.gbnf import Rules, all_but, char_class, characters, literal
from stepgguf.grammar.schema import (
    ALL_TYPES,
    MAX_BYTES,
    MAX_DEPTH,
    Merged,
    Merger,
    Node,
    Unsupported,
    too_large,
    type_of,
    widen,
)

_Key = tuple[frozenset[int], frozenset[int]]  # ids of a node's schemas, and of the anyOf lists that were chosen from

_HEX = "[0-9a-fA-F]"
_DATE = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_ZONE = '("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
_TIME = f'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{{1,9}})? {_ZONE}'
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": f'{_HEX}{{8}} "-" ({_HEX}{{4}} "-"){{3}} {_HEX}{{12}}',
}
_NOT_PLAIN = '"\\' + "".join(map(chr, range(32)))  # what a JSON string holds as an escape only
_ESCAPES = '"\\bfnrt'
# JSON itself. White space is bounded: one space, or a line break and an indentation.
_JSON = {
    **interval.RULES,
    "ws": r'| " " | "\n" [ \t]{0,40}',
    "hex": _HEX,
    "char": char_class(all_but(characters(_NOT_PLAIN))) + r' | "\\" (["\\/bfnrt] | "u" escaped)',
    "escaped": r'([0-9abcefABCEF] hex | [dD] [0-7]) hex hex | [dD] [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex',
    "string": r'"\"" char* "\""',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,{interval.DIGITS - 1}}})',
    "number": "integer fraction ([eE] [-+]? [0-9]{1,2})?",
    "boolean": '"true" | "false"',
    "null": '"null"',
    "member": r'string ":" ws value',
    "object": '"{" ws (member ("," ws member)* ws)? "}"',
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
    "value": "object | array | string | number | boolean | null",
}


def define_json(rules: Rules) -> None:
    for name, body in _JSON.items():
        rules.define(name, body)


class SchemaRules:
    """Adds the rules of one schema to `rules`, which have JSON's."""

    def __init__(self, root: Any, rules: Rules, *, strict: bool) -> None:
        """BadGrammar if it is too large."""
        self.rules = rules
        self.strict = strict
        self.merger = Merger(root, rules.param, strict=strict)
        self._done: dict[_Key, str | None] = {}
        self._open: dict[_Key, str] = {}
        self._recursive: set[_Key] = set()
        self._starts: dict[_Key, set[_Key]] = {}  # node -> the nodes that it may start with
        try:
            too_long = len(json.dumps(root)) > MAX_BYTES
        except RecursionError:
            too_long = True
        if too_long:
            raise too_large(rules.param, f"has more than {MAX_BYTES // 1024} KiB or nests too deep")

    def root(self) -> str:
        """One symbol. BadGrammar: not supported, or nothing is allowed."""
        return self.checked(lambda: self.value(((self.merger.root, "#"),)))

    def checked(self, make: Callable[[], str | None]) -> str:
        try:
            symbol = make()
            if symbol is None:
                raise Unsupported("#", "the schema allows nothing")
            self._check_recursion()
        except Unsupported as error:
            param = self.rules.param
            raise BadGrammar(
                f"{param}: {error}",
                param=param,
                hint="Leave it out of the schema and check the answer yourself, or say it with what is supported.",
            ) from error
        return symbol

    def value(self, node: Node, start: _Key | None = None, chosen: frozenset[int] = frozenset()) -> str | None:
        """One symbol; None if nothing is allowed. start: the node that may start with this one."""
        node = self.merger.plain_reference(node)
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
        name = self._open[key] = self.rules.reserve()
        body = self._body(node, key, chosen)
        del self._open[key]
        if key in self._recursive:
            if body is None:
                raise Unsupported(node[0][1], "it refers to itself and allows nothing")
            body = self.rules.define(name, body)
        self._done[key] = body
        return body

    def branches(self, merged: Merged, node: Node, chosen: frozenset[int]) -> list[tuple[Node, frozenset[int]]]:
        """The nodes that the first anyOf of a merged node stands for."""
        options, at = merged.unions[0]
        if merged.keywords <= {"anyOf", "oneOf"} and len(merged.unions) == 1:
            return [(((option, f"{at}/{i}"),), frozenset()) for i, option in enumerate(options)]
        left = chosen | {id(options)}
        return [((*node, (option, f"{at}/{i}")), left) for i, option in enumerate(options)]

    def _body(self, node: Node, key: _Key, chosen: frozenset[int]) -> str | None:
        merged = self.merger.merge(node, chosen)
        if merged.never:
            return None
        if merged.unions:
            symbols = [self.value(branch, key, left) for branch, left in self.branches(merged, node, chosen)]
            return self._either(symbols)
        return self._enum(merged) if merged.enum is not None else self.typed(merged)

    def typed(self, merged: Merged) -> str | None:
        """One symbol for a merged node without anyOf and enum."""
        if not merged.keywords:
            return "value"
        types = merged.allowed()
        names = types - {"integer"} if "number" in types else types
        return self._either([self._of_type(name, merged) for name in sorted(names)])

    def _either(self, symbols: list[str | None]) -> str | None:
        allowed = [symbol for symbol in symbols if symbol is not None]
        return self.rules.either(allowed) if allowed else None

    def members(self, merged: Merged) -> list[Any]:
        """The enum's members of an allowed type."""
        left = merged.keywords - {"enum", "const", "type", "format", "anyOf", "oneOf"}
        if left and self.strict:
            raise Unsupported(merged.enum_at, f"enum or const together with {', '.join(sorted(left))}")
        return [member for member in merged.enum or () if type_of(member) in widen(merged.types or ALL_TYPES)]

    def _enum(self, merged: Merged) -> str | None:
        texts = [json.dumps(member, ensure_ascii=False) for member in self.members(merged)]
        return self.rules.choice(texts) if texts else None

    def _of_type(self, name: str, merged: Merged) -> str | None:
        if name == "object":
            return self._object(merged)
        if name == "array":
            return self._array(merged)
        if name == "string":
            return self._string(merged)
        if name in ("number", "integer") and (merged.low or merged.high):
            options = (interval.integers if name == "integer" else interval.numbers)(merged.low, merged.high)
            return None if options is None else self.rules.add(options)
        return name

    # objects -------------------------------------------------------------------------------------------------------

    def _object(self, merged: Merged) -> str | None:
        members = []
        for name, node, required in merged.properties():
            self.merger.charge(len(merged.objects))
            symbol = self.value(node)
            if symbol is None and required:
                return None
            if symbol is not None:
                members.append(
                    (self.rules.add(f"{literal(json.dumps(name, ensure_ascii=False) + ':')} ws {symbol}"), required)
                )
        extra = self._extra(merged, [name for name, _, _ in merged.properties()])
        # from the last property to the first: `some`, this one or a later one and what follows it; `rest`, what follows
        # the one before it
        rest = self.rules.add(f'("," ws {extra})*') if extra else '""'
        some = self.rules.add(f"{extra} {rest}") if extra else None
        must = False
        for member, required in reversed(members):
            some = self.rules.either([f"{member} {rest}", *([some] if some and not required else [])])
            must |= required
            rest = self.rules.add(f'"," ws {some}' if must else f'("," ws {some})?')
        if some is None:
            return self.rules.add('"{" ws "}"')
        return self.rules.add(f'"{{" ws {some} ws "}}"' if must else f'"{{" ws ({some} ws)? "}}"')

    def _extra(self, merged: Merged, names: list[str]) -> str | None:
        """A property that is not declared."""
        node = merged.extras()
        symbol = None if node is None else self.value(node)
        if symbol is None:
            return None
        key_names = merged.key_names()
        if key_names:
            key = self.value((*key_names, _ANY_STRING))
        elif names:
            words = [tuple(_symbols(json.dumps(name, ensure_ascii=False)[1:-1])) for name in names]
            key = self.rules.add(f'"\\"" {self.rules.others(words, _NOT_PLAIN, _ESCAPES)} "\\""')
        else:
            key = "string"
        return self.rules.add(f'{key} ":" ws {symbol}') if key else None

    # arrays --------------------------------------------------------------------------------------------------------

    def _array(self, merged: Merged) -> str | None:
        first, rest = merged.elements()
        low, high = merged.n_low.get("Items", 0), merged.n_high.get("Items")
        symbols: list[str] = []
        for node in first[:high]:
            symbol = self.value(node)
            if symbol is None:
                rest = None
                break
            symbols.append(symbol)
        more = None if rest is None or (high is not None and high <= len(symbols)) else self.value(rest)
        if more and not symbols:
            symbols = [more]
        if low > len(symbols) and not more:
            return None
        if high is not None and low > high:
            return None
        tail = '""'
        if more:
            n = len(symbols)
            following = self.rules.add(f'"," ws {more}')
            tail = self.rules.repeat(following, max(0, low - n), None if high is None else high - n)
        for i in range(len(symbols) - 1, 0, -1):
            tail = self.rules.add(f'"," ws {symbols[i]} {tail}' if i < low else f'("," ws {symbols[i]} {tail})?')
        if not symbols:
            return self.rules.add('"[" ws "]"')
        body = f"{symbols[0]} {tail} ws"
        return self.rules.add(f'"[" ws {body} "]"' if low else f'"[" ws ({body})? "]"')

    # strings -------------------------------------------------------------------------------------------------------

    def _string(self, merged: Merged) -> str | None:
        low, high = merged.n_low.get("Length", 0), merged.n_high.get("Length")
        text, at = merged.texts.get("pattern", ("", ""))
        form = _FORMATS.get(merged.texts.get("format", ("", ""))[0])
        if (at or form) and (low or high is not None) and self.strict:
            raise Unsupported(merged.at, "pattern or format together with minLength or maxLength")
        if at:
            try:
                return self.rules.add(f'"\\"" {pattern.translate(text, self.rules)} "\\""')
            except ValueError as error:
                if self.strict:
                    raise Unsupported(at, f"the pattern {text[:80]!r} is not supported: {error}") from error
        if form:
            return self.rules.add(f'"\\"" {form} "\\""')
        if high is not None and low > high:
            return None
        if (low, high) == (0, None):
            return "string"
        return self.rules.add(f'"\\"" {self.rules.repeat("char", low, high)} "\\""')

    def _check_recursion(self) -> None:
        """A schema that may start with itself is left recursion, which no grammar engine can walk."""
        state: dict[_Key, bool] = {}  # True: on the path
        for root in list(self._starts):
            path = [(root, iter(self._starts.get(root, ())))] if root not in state else []
            state.setdefault(root, True)
            while path:
                key, following = path[-1]
                child = next(following, None)
                if child is None:
                    state[key] = False
                    path.pop()
                elif child not in state:
                    state[child] = True
                    path.append((child, iter(self._starts.get(child, ()))))
                elif state[child]:
                    raise Unsupported("#", "a schema refers to itself without an object or an array between")


_ANY_STRING = ({"type": "string"}, "#")


def _symbols(escaped: str) -> list[str]:
    """A JSON string's inside as characters and escapes."""
    symbols, i = [], 0
    while i < len(escaped):
        n = 1 if escaped[i] != "\\" else 6 if escaped[i + 1] == "u" else 2
        symbols.append(escaped[i : i + n])
        i += n
    return symbols
