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

CodeRange = tuple[int, int]  # code points, both ends included
_SURROGATES = (0xD800, 0xDFFF)
_LAST_CODE = 0x10FFFF
_SHORT_REPEATS = {(0, 1): "?", (0, None): "*", (1, None): "+"}
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class GrammarRules:
    """Named rules that become one grammar. `param` is the request's field that they are made from, for the errors.

    Every method that adds rules raises BadGrammar when there are more than llama.cpp reads quickly.
    """

    def __init__(self, param: str) -> None:
        self.param = param
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}  # body -> name: equal rules are one
        self._n_rules = self._n_text = self._n_reserved = 0

    def define_rule(self, name: str, body: str) -> str:
        """Add a rule under a name of the caller's, and return the name."""
        self._count_size(1, len(name) + len(body) + 6)
        self._bodies[name] = body
        return name

    def reserve_name(self) -> str:
        """Return a name that is defined later: a recursive rule refers to itself before it has a body."""
        self._n_reserved += 1
        return f"r{self._n_reserved}"

    def symbol_for(self, body: str) -> str:
        """Return the name of a rule with this body, or the body itself if it is a name already."""
        if re.fullmatch(r"[\w-]+", body):
            return body
        if body not in self._names:
            self._names[body] = self.define_rule(self.reserve_name(), body)
        return self._names[body]

    def either_of(self, options: Iterable[str]) -> str:
        """Return the symbol for any one of these bodies."""
        return self.symbol_for(" | ".join(dict.fromkeys(options)))

    def repeat_symbol(self, symbol: str, low: int, high: int | None = None) -> str:
        """Return the symbol for low to high (None: any number) of a symbol in a row. Both are at most MAX_REPEAT."""
        assert max(low, high or 0) <= MAX_REPEAT
        if high == 0:
            return '""'
        self._count_size(low if high is None else high, 0)  # what llama.cpp unfolds it to
        if (low, high) == (1, 1):
            return symbol
        counts = f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
        return self.symbol_for(symbol + _SHORT_REPEATS.get((low, high), counts))

    def one_of_texts(self, texts: Collection[str]) -> str:
        """Return the symbol for exactly one of these texts.

        It is a tree by first characters, because llama.cpp tries all alternatives for each token.
        """
        return self._text_tree(sorted(set(texts)), 0)

    def _text_tree(self, texts: Sequence[str], depth: int) -> str:
        if len(texts) == 1 or depth == _TRIE_DEPTH:
            return self.either_of(literal(text) for text in texts)
        branches: dict[str, list[str]] = {}
        for text in texts:
            branches.setdefault(text[:1], []).append(text)
        options = []
        for group in branches.values():
            if len(group) == 1:
                options.append(literal(group[0]))
                continue
            # the texts are sorted, so what the first and the last share all of them share
            n = _n_common(group[0], group[-1])
            options.append(f"{literal(group[0][:n])} {self._text_tree([text[n:] for text in group], depth + 1)}")
        return self.either_of(options)

    def any_text_but(self, words: Collection[Sequence[str]], forbidden: str, escapes: str = "") -> str:
        """Return the symbol for any text that is none of these words and has no character of `forbidden`.

        A word is a sequence of symbols: a character, or a backslash and one of `escapes`. With `escapes`, `forbidden`
        holds the backslash.
        """
        any_symbol = self._symbol_but((), forbidden, escapes)
        rest = self.repeat_symbol(any_symbol, 0) if any_symbol else '""'
        tree: dict[str, dict] = {}  # type: ignore[type-arg]
        for word in words:
            node = tree
            for symbol in (*word, ""):  # "" marks where a word ends: there the text may not
                node = node.setdefault(symbol, {})
        todo, names = [(self.reserve_name(), tree)], []
        while todo:
            name, node = todo.pop()
            names.append(name)
            options = [f"{self._symbol_but(tuple(node), forbidden, escapes)} {rest}"]
            if "" not in node:
                options.append('""')
            for symbol, child in node.items():
                if symbol:
                    todo.append((self.reserve_name(), child))
                    options.append(f"{literal(symbol)} {todo[-1][0]}")
            self.define_rule(name, " | ".join(options))
        return names[0]

    def _symbol_but(self, symbols: Sequence[str], forbidden: str, escapes: str) -> str:
        plain = char_class(all_but(character_ranges([*forbidden, *(s for s in symbols if len(s) == 1)])))
        left = [e for e in escapes if "\\" + e not in symbols]
        return self.either_of([plain, f'"\\\\" {char_class(character_ranges(left))}']) if left else plain

    def gbnf_text(self) -> str:
        """Return the grammar: one rule a line, in the order in which they were defined."""
        return "".join(f"{name} ::= {body}\n" for name, body in self._bodies.items())

    def _count_size(self, n_rules: int, n_text: int) -> None:
        self._n_rules += n_rules
        self._n_text += n_text
        if self._n_rules > MAX_RULES or self._n_text > MAX_TEXT:
            raise BadGrammar(
                f"{self.param} makes a grammar of more than {MAX_RULES} rules or {MAX_TEXT} characters",
                param=self.param,
                hint="Use a smaller schema: fewer properties, shorter enums, lower maxItems and maxLength.",
            )


def literal(text: str) -> str:
    """Return the symbol for exactly this text: in quotes, with escapes for all that is not plainly printable."""
    plain = (_SHORT_ESCAPES.get(c) or (c if " " <= c < "\ud800" else _escape_code(ord(c))) for c in text)
    return '"' + "".join(plain) + '"'


def char_class(ranges: Iterable[CodeRange]) -> str:
    """Return a class of characters. Everything but ASCII letters and digits is escaped."""
    ends = ((_class_character(first), _class_character(last)) for first, last in ranges)
    return f"[{''.join(first if first == last else f'{first}-{last}' for first, last in ends)}]"


def all_but(ranges: Iterable[CodeRange]) -> list[CodeRange]:
    """Return the other characters, surrogates aside.

    They are always listed and never written as [^x]: llama.cpp's negated classes also allow bytes that are no UTF-8.
    """
    result, start = [], 1
    for first, last in sorted([*ranges, _SURROGATES]):
        if first > start:
            result.append((start, first - 1))
        start = max(start, last + 1)
    return [*result, (start, _LAST_CODE)] if start <= _LAST_CODE else result


def character_ranges(text: Iterable[str]) -> list[CodeRange]:
    """Return each character as a range of its own."""
    return [(ord(char), ord(char)) for char in text]


def _class_character(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else _escape_code(code)


def _escape_code(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _n_common(a: str, b: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
