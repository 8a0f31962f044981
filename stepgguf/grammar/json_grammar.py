r"""JSON itself as GBNF: the rules that the grammars of schemas refer to, and the formats of strings that can be held.

White space is bounded: one space, or a line break and an indentation. Models that begin to write white space do not
stop, and a grammar without a bound would let them.
"""

from __future__ import annotations

from stepgguf.grammar import interval
from stepgguf.grammar.gbnf import GrammarRules, all_but, char_class, character_ranges

NOT_PLAIN = '"\\' + "".join(map(chr, range(32)))  # characters that a JSON string holds as an escape only
SHORT_ESCAPES = '"\\bfnrt'  # what may stand behind a backslash, but for \u and the needless \/

_HEX = "[0-9a-fA-F]"
_DATE = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
_ZONE = '("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
_TIME = f'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{{1,9}})? {_ZONE}'
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": f'{_HEX}{{8}} "-" ({_HEX}{{4}} "-"){{3}} {_HEX}{{12}}',
}
_JSON_RULES = {
    **interval.SHARED_RULES,
    "ws": r'| " " | "\n" [ \t]{0,40}',
    "hex": _HEX,
    "char": char_class(all_but(character_ranges(NOT_PLAIN))) + r' | "\\" (["\\/bfnrt] | "u" escaped)',
    # no lone surrogate: a high one is followed by a low one
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


def define_json(rules: GrammarRules) -> None:
    """Add a rule for each type of JSON under the type's name, `value` for any, and the parts that they consist of."""
    for name, body in _JSON_RULES.items():
        rules.define_rule(name, body)


def split_escapes(inside: str) -> list[str]:
    """Return what stands between a JSON string's quotes as its characters and escapes."""
    symbols, i = [], 0
    while i < len(inside):
        n = 1 if inside[i] != "\\" else 6 if inside[i + 1] == "u" else 2
        symbols.append(inside[i : i + n])
        i += n
    return symbols
