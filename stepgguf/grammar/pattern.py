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
from stepgguf.grammar.gbnf import MAX_REPEAT, CodeRange, GrammarRules, all_but, char_class, literal

MAX_LENGTH = 1000  # characters: no pattern that a person wrote is longer
MAX_DEPTH = 32  # groups in groups

_CLASS_ESCAPES: dict[str, list[CodeRange]] = {
    "d": [(48, 57)],
    "w": [(48, 57), (65, 90), (95, 95), (97, 122)],
    "s": [(9, 13), (32, 32)],
}
# all that any engine counts as white space; \S must be none of it
_SPACES: list[CodeRange] = [(9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)]
_SPACES += [(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
_LINE_ENDS: list[CodeRange] = [(10, 10), (13, 13), (0x2028, 0x2029)]
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_SHORT_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}  # how JSON escapes a character
_UNWRITABLE: list[CodeRange] = [(0, 31), (34, 34), (92, 92)]  # not as themselves, in a JSON string


def translate_pattern(pattern: str, rules: GrammarRules) -> str:
    """Add the rules for what stands between a string's quotes, and return their symbol. `rules` have JSON's `char`.

    ValueError says what in the pattern is not supported, or why it is no regular expression.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, the limit is {MAX_LENGTH}")
    reader = _PatternReader(pattern, rules)
    symbol = reader.read_alternatives(top=True)
    if reader.at < len(pattern):
        raise ValueError("unbalanced )")
    return symbol


class _PatternReader:
    """Reads a pattern by recursive descent, one method a line of the grammar above, and writes rules as it goes."""

    def __init__(self, pattern: str, rules: GrammarRules) -> None:
        self._pattern = pattern
        self._rules = rules
        self._depth = 0
        self._empty: dict[str, int] = {}  # symbols that may stand for no character: in how many in a row of it
        self.at = 0

    def _accept(self, text: str) -> bool:
        """Step over this text if it comes next."""
        found = self._pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def _next_character(self) -> str:
        if self.at >= len(self._pattern):
            raise ValueError("it ends too early")
        self.at += 1
        return self._pattern[self.at - 1]

    def read_alternatives(self, *, top: bool = False) -> str:
        """Read up to a parenthesis or the end. top: outside of all groups, where a pattern may be anchored."""
        sequences = [self._read_sequence(top)]
        while self._accept("|"):
            sequences.append(self._read_sequence(top))
        symbol = self._rules.either_of(" ".join(symbols) or '""' for symbols in sequences)
        # a sequence may be empty if all of its symbols may
        runs = [sum(map(self._empty.__getitem__, s)) for s in sequences if self._empty.keys() >= set(s)]
        if runs:
            self._empty[symbol] = max(1, *runs, self._empty.get(symbol, 0))
        return symbol

    def _read_sequence(self, top: bool) -> list[str]:
        symbols = ["char*"] if top and not self._accept("^") else []  # not anchored: any text before it
        anchored = not top
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            if top and self._accept("$"):
                anchored = True
                if self.at < len(self._pattern) and self._pattern[self.at] != "|":
                    raise ValueError("$ before the end")
                break
            symbols.append(self._read_quantifier(self._read_atom()))
        return symbols if anchored else [*symbols, "char*"]

    def _read_atom(self) -> str:
        char = self._next_character()
        if char == "(":
            return self._read_group()
        if char == "[":
            return self._symbol_of(self._read_class())
        if char == ".":
            return self._symbol_of(all_but(_LINE_ENDS))
        if char == "\\":
            return self._symbol_of(self._read_escape())
        if char in "^$*+?":
            raise ValueError(f"{char} at character {self.at}")
        return self._symbol_of([(ord(char), ord(char))])

    def _read_group(self) -> str:
        if self._accept("?") and not self._accept(":"):
            raise ValueError("(? groups other than (?:")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} groups in each other")
        symbol = self.read_alternatives()
        self._depth -= 1
        if not self._accept(")"):
            raise ValueError("a group that is not closed")
        return symbol

    def _read_escape(self) -> list[CodeRange]:
        char = self._next_character()
        if char.lower() in _CLASS_ESCAPES:
            ranges = _CLASS_ESCAPES[char.lower()]
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

    def _read_class(self) -> list[CodeRange]:
        negated = self._accept("^")
        ranges: list[CodeRange] = []
        while not self._accept("]"):
            first = self._read_class_member()
            if self._pattern.startswith("-", self.at) and self._pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self._read_class_member()
                if len(first) > 1 or len(last) > 1 or first[0][0] != first[0][1] or last[0][0] != last[0][1]:
                    raise ValueError("a range between classes")
                if first[0][0] > last[0][0]:
                    raise ValueError("a range that runs backwards")
                first = [(first[0][0], last[0][0])]
            ranges += first
        return all_but(ranges) if negated else ranges

    def _read_class_member(self) -> list[CodeRange]:
        if self._accept("\\b"):  # a backspace in a class, and a word boundary outside of it
            return [(8, 8)]
        char = self._next_character()
        return self._read_escape() if char == "\\" else [(ord(char), ord(char))]

    def _read_quantifier(self, symbol: str) -> str:
        for sign, counts in _QUANTIFIERS.items():
            if self._accept(sign):
                low, high = counts
                break
        else:
            if not self._accept("{"):
                return symbol
            low, high = self._read_counts()
        self._accept("?")  # a lazy quantifier matches the same texts
        # llama.cpp follows each way to read what was written, and an empty symbol can be left out at each place: the
        # ways multiply with every repetition around it
        if high is None and symbol in self._empty:
            raise ValueError("a repetition without end of what may be empty")
        run = self._empty.get(symbol, 1) * (high or 1)
        if symbol in self._empty and run > MAX_EMPTY:
            raise ValueError(f"{run} repetitions of what may be empty; the limit is {MAX_EMPTY}")
        repeated = self._rules.repeat_symbol(symbol, low, high)
        if symbol in self._empty:
            self._empty[repeated] = max(1, run)
        elif low == 0:
            self._empty[repeated] = 1
        return repeated

    def _read_counts(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self.at)
        low, comma, high = self._pattern[self.at : max(end, self.at)].partition(",")
        if not low.isdecimal() or not (high.isdecimal() or not high):
            raise ValueError("{ that is no quantifier")
        self.at = end + 1
        counts = int(low), int(high) if high else None if comma else int(low)
        if max(counts[0], counts[1] or 0) > MAX_REPEAT or counts[0] > (MAX_REPEAT if counts[1] is None else counts[1]):
            raise ValueError(f"a repetition {{{low}{comma}{high}}}; the limit is {MAX_REPEAT}")
        return counts

    def _symbol_of(self, ranges: list[CodeRange]) -> str:
        """One character of a JSON string, out of these; ValueError if none of them can be written."""
        plain = all_but(all_but(ranges) + _UNWRITABLE)
        escapes = [literal("\\" + e) for code, e in _SHORT_ESCAPES.items() if any(a <= code <= b for a, b in ranges)]
        if not plain and not escapes:
            raise ValueError("a character that JSON has no short form for")
        return self._rules.either_of([*([char_class(plain)] if plain else []), *escapes])
