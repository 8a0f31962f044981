r"""Writing GBNF, llama.cpp's grammar notation: literals, character classes, repetitions, and rules within limits.

An expression here is always one symbol (a rule's name, a literal, a class or a group), so that it can be followed by
a repetition and stand in a sequence. The grammar comes from a stranger's schema, so everything that grows is counted:
llama.cpp unfolds `x{0,n}` into n rules and walks all rules for each token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from stepgguf.errors import BadGrammar

MAX_REPEAT = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD; above it drops upper bounds silently and refuses lower ones
MAX_RULES = 16384  # unfolded ones included: llama.cpp reads them in 10 ms
MAX_TEXT = 256 * 1024  # characters of all rules
_TRIE_DEPTH = 32  # of choices; below it they are written out, so that a hostile list cannot nest without end

Range = tuple[int, int]  # code points, both ends included
SURROGATES = (0xD800, 0xDFFF)
_LAST = 0x10FFFF


class Rules:
    """Named rules. `param` is the request's field that they are made from, for the errors."""

    def __init__(self, param: str) -> None:
        self.param = param
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}  # body -> name: equal rules are one
        self._n_rules = self._n_text = self._n_reserved = 0

    def define(self, name: str, body: str) -> str:
        self._count(1, len(name) + len(body) + 6)
        self._bodies[name] = body
        return name

    def reserve(self) -> str:
        """A name that is defined later: for recursion."""
        self._n_reserved += 1
        return f"r{self._n_reserved}"

    def add(self, body: str) -> str:
        """The rule with this body, as one symbol."""
        if re.fullmatch(r"[\w-]+", body):
            return body
        if body not in self._names:
            self._names[body] = self.define(self.reserve(), body)
        return self._names[body]

    def either(self, options: Iterable[str]) -> str:
        return self.add(" | ".join(dict.fromkeys(options)))

    def repeat(self, symbol: str, low: int, high: int | None = None) -> str:
        """From low to high times (None: without end); low and high are at most MAX_REPEAT."""
        assert max(low, high or 0) <= MAX_REPEAT
        if high == 0:
            return '""'
        self._count(low if high is None else high, 0)
        if (low, high) == (1, 1):
            return symbol
        return self.add(
            symbol
            + {(0, 1): "?", (0, None): "*", (1, None): "+"}.get(
                (low, high), f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
            )
        )

    def choice(self, texts: Collection[str]) -> str:
        """Exactly one of the texts. As a tree by first characters: llama.cpp tries all alternatives for each token."""
        return self._tree(sorted(set(texts)), 0)

    def _tree(self, texts: Sequence[str], depth: int) -> str:
        if len(texts) == 1 or depth == _TRIE_DEPTH:
            return self.either(literal(text) for text in texts)
        branches: dict[str, list[str]] = {}
        for text in texts:
            branches.setdefault(text[:1], []).append(text)
        options = []
        for first, group in branches.items():
            n = len(_common_prefix(group[0], group[-1])) if first else 0
            rest = self._tree([text[n:] for text in group], depth + 1) if len(group) > 1 else literal(group[0][n:])
            options.append(f"{literal(group[0][:n])} {rest}" if len(group) > 1 else literal(group[0]))
        return self.either(options)

    def others(self, words: Collection[Sequence[str]], forbidden: str, escapes: str = "") -> str:
        """Any text but these words. A word is a sequence of symbols: a character, or a backslash and one of `escapes`.

        The text has no character of `forbidden`; with `escapes`, `forbidden` holds the backslash.
        """
        any_symbol = self._symbol_but((), forbidden, escapes)
        rest = self.repeat(any_symbol, 0) if any_symbol else '""'
        tree: dict[str, dict] = {}  # type: ignore[type-arg]
        for word in words:
            node = tree
            for symbol in (*word, ""):
                node = node.setdefault(symbol, {})
        todo, names = [(self.reserve(), tree)], []
        while todo:
            name, node = todo.pop()
            names.append(name)
            options = [f"{self._symbol_but(tuple(node), forbidden, escapes)} {rest}"]
            if "" not in node:
                options.append('""')
            for symbol, child in node.items():
                if symbol:
                    todo.append((self.reserve(), child))
                    options.append(f"{literal(symbol)} {todo[-1][0]}")
            self.define(name, " | ".join(options))
        return names[0]

    def _symbol_but(self, symbols: Sequence[str], forbidden: str, escapes: str) -> str:
        plain = char_class(all_but(characters([*forbidden, *(s for s in symbols if len(s) == 1)])))
        left = [e for e in escapes if "\\" + e not in symbols]
        return self.either([plain, f'"\\\\" {char_class(characters(left))}']) if left else plain

    def text(self) -> str:
        return "".join(f"{name} ::= {body}\n" for name, body in self._bodies.items())

    def _count(self, n_rules: int, n_text: int) -> None:
        self._n_rules += n_rules
        self._n_text += n_text
        if self._n_rules > MAX_RULES or self._n_text > MAX_TEXT:
            raise BadGrammar(
                f"{self.param} makes a grammar of more than {MAX_RULES} rules or {MAX_TEXT} characters",
                param=self.param,
                hint="Use a smaller schema: fewer properties, shorter enums, lower maxItems and maxLength.",
            )


def literal(text: str) -> str:
    return '"' + "".join(_LITERAL.get(c) or (c if " " <= c < "\ud800" else _escaped(ord(c))) for c in text) + '"'


def char_class(ranges: Iterable[Range]) -> str:
    """A class of characters. Everything but ASCII letters and digits is escaped."""
    return f"[{''.join(_code(a) if a == b else f'{_code(a)}-{_code(b)}' for a, b in ranges)}]"


def all_but(ranges: Iterable[Range]) -> list[Range]:
    """The other characters. Always listed: llama.cpp's [^x] also allows bytes that are no UTF-8."""
    result, start = [], 1
    for first, last in sorted([*ranges, SURROGATES]):
        if first > start:
            result.append((start, first - 1))
        start = max(start, last + 1)
    return [*result, (start, _LAST)] if start <= _LAST else result


def characters(text: Iterable[str]) -> list[Range]:
    return [(ord(char), ord(char)) for char in text]


def _code(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else _escaped(code)


def _escaped(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


_LITERAL = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
