r"""Regular expressions (JSON schema's `pattern`, ECMA-262) as GBNF for the inside of a JSON string.

    alternatives := sequence ("|" sequence)*        atom := character | "." | \d \w \s \D \W \S | [class] | (group)
    sequence     := "^"? (atom quantifier?)* "$"?   quantifier := ("*" | "+" | "?" | "{m}" | "{m,}" | "{m,n}") "?"?

A pattern that is not anchored at an end may have any text there, as the specification says. Characters stand for
themselves and are never written as \uXXXX; quote, backslash and control characters are written as JSON's short
escapes. What GBNF cannot say (look-around, back-references, \b) is a ValueError that names it.
"""

from __future__ import annotations

from string import hexdigits

from stepgguf.grammar.ambiguity import MAX_EMPTY
from stepgguf.grammar.gbnf import MAX_REPEAT, Range, Rules, all_but, char_class, literal

MAX_LENGTH = 1000  # characters: no pattern that a person wrote is longer
MAX_DEPTH = 32  # groups in groups

_SHAPES: dict[str, list[Range]] = {
    "d": [(48, 57)],
    "w": [(48, 57), (65, 90), (95, 95), (97, 122)],
    "s": [(9, 13), (32, 32)],
}
# all that any engine counts as white space; \S must be none of it
_SPACES: list[Range] = [(9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)]
_SPACES += [(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
_LINE_ENDS: list[Range] = [(10, 10), (13, 13), (0x2028, 0x2029)]
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}  # how JSON escapes a character
_UNWRITABLE: list[Range] = [(0, 31), (34, 34), (92, 92)]  # not as themselves, in a JSON string


def translate(pattern: str, rules: Rules) -> str:
    """One symbol. ValueError: not supported, or no regular expression."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, the limit is {MAX_LENGTH}")
    reader = _Reader(pattern, rules)
    symbol = reader.alternatives(top=True)
    if reader.at < len(pattern):
        raise ValueError("unbalanced )")
    return symbol


class _Reader:
    def __init__(self, pattern: str, rules: Rules) -> None:
        self._pattern = pattern
        self._rules = rules
        self._depth = 0
        self._empty: dict[str, int] = {}  # symbols that may stand for no character: in how many in a row of it
        self.at = 0

    def _next(self, text: str) -> bool:
        found = self._pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def _take(self) -> str:
        if self.at >= len(self._pattern):
            raise ValueError("it ends too early")
        self.at += 1
        return self._pattern[self.at - 1]

    def alternatives(self, *, top: bool = False) -> str:
        sequences = [self._sequence(top)]
        while self._next("|"):
            sequences.append(self._sequence(top))
        symbol = self._rules.either(" ".join(symbols) or '""' for symbols in sequences)
        runs = [sum(map(self._empty.__getitem__, s)) for s in sequences if self._empty.keys() >= set(s)]
        if runs:
            self._empty[symbol] = max(1, *runs, self._empty.get(symbol, 0))
        return symbol

    def _sequence(self, top: bool) -> list[str]:
        symbols = ["char*"] if top and not self._next("^") else []
        anchored = not top
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            if top and self._next("$"):
                anchored = True
                if self.at < len(self._pattern) and self._pattern[self.at] != "|":
                    raise ValueError("$ before the end")
                break
            symbols.append(self._quantified(self._atom()))
        return symbols if anchored else [*symbols, "char*"]

    def _atom(self) -> str:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._symbol(self._class())
        if char == ".":
            return self._symbol(all_but(_LINE_ENDS))
        if char == "\\":
            return self._symbol(self._escape())
        if char in "^$*+?":
            raise ValueError(f"{char} at character {self.at}")
        return self._symbol([(ord(char), ord(char))])

    def _group(self) -> str:
        if self._next("?") and not self._next(":"):
            raise ValueError("(? groups other than (?:")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} groups in each other")
        symbol = self.alternatives()
        self._depth -= 1
        if not self._next(")"):
            raise ValueError("a group that is not closed")
        return symbol

    def _escape(self) -> list[Range]:
        char = self._take()
        if char.lower() in _SHAPES:
            ranges = _SHAPES[char.lower()]
            return ranges if char.islower() else all_but(_SPACES if char == "S" else ranges)
        if char in _CONTROLS:
            code = _CONTROLS[char]
        elif char in "xu":
            n = 2 if char == "x" else 4
            digits = self._pattern[self.at : self.at + n]
            if len(digits) < n or not set(digits) <= set(hexdigits):
                raise ValueError(f"\\{char} without {n} hexadecimal digits")
            code = int(digits, 16)
            self.at += n
        elif char.isalnum():
            raise ValueError(f"\\{char}")
        else:
            code = ord(char)
        return [(code, code)]

    def _class(self) -> list[Range]:
        negated = self._next("^")
        ranges: list[Range] = []
        while not self._next("]"):
            first = self._member()
            if self._pattern.startswith("-", self.at) and self._pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self._member()
                if len(first) > 1 or len(last) > 1 or first[0][0] != first[0][1] or last[0][0] != last[0][1]:
                    raise ValueError("a range between classes")
                if first[0][0] > last[0][0]:
                    raise ValueError("a range that runs backwards")
                first = [(first[0][0], last[0][0])]
            ranges += first
        return all_but(ranges) if negated else ranges

    def _member(self) -> list[Range]:
        if self._next("\\b"):
            return [(8, 8)]
        char = self._take()
        return self._escape() if char == "\\" else [(ord(char), ord(char))]

    def _quantified(self, symbol: str) -> str:
        for sign, counts in _QUANTIFIERS.items():
            if self._next(sign):
                low, high = counts
                break
        else:
            if not self._next("{"):
                return symbol
            low, high = self._counts()
        self._next("?")  # a lazy quantifier matches the same texts
        if high is None and symbol in self._empty:
            raise ValueError("a repetition without end of what may be empty")
        run = self._empty.get(symbol, 1) * (high or 1)
        if symbol in self._empty and run > MAX_EMPTY:
            raise ValueError(f"{run} repetitions of what may be empty; the limit is {MAX_EMPTY}")
        repeated = self._rules.repeat(symbol, low, high)
        if symbol in self._empty:
            self._empty[repeated] = max(1, run)
        elif low == 0:
            self._empty[repeated] = 1
        return repeated

    def _counts(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self.at)
        low, comma, high = self._pattern[self.at : max(end, self.at)].partition(",")
        if not low.isdecimal() or not (high.isdecimal() or not high):
            raise ValueError("{ that is no quantifier")
        self.at = end + 1
        counts = int(low), int(high) if high else None if comma else int(low)
        if max(counts[0], counts[1] or 0) > MAX_REPEAT or counts[0] > (MAX_REPEAT if counts[1] is None else counts[1]):
            raise ValueError(f"a repetition {{{low}{comma}{high}}}; the limit is {MAX_REPEAT}")
        return counts

    def _symbol(self, ranges: list[Range]) -> str:
        """One character of a JSON string, out of these."""
        plain = all_but(all_but(ranges) + _UNWRITABLE)
        escapes = [literal("\\" + e) for code, e in _SHORT.items() if any(a <= code <= b for a, b in ranges)]
        if not plain and not escapes:
            raise ValueError("a character that JSON has no short form for")
        return self._rules.either([*([char_class(plain)] if plain else []), *escapes])
