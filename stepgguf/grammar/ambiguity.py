"""How much work a grammar of a user's is for llama.cpp, told before it has any.

llama.cpp keeps a stack for each way to read what was written so far, and compares each new one with all others, within
one call that nothing interrupts. Three things make that hours and all memory: rules that begin in very many ways,

    a ::= b | b "x"    b ::= c | c "x"    ...        2^n ways to begin

long runs of what may be empty, where each symbol may be followed by each later one: x{0,2000} with x ::= "a"?, and
counts that run backward: x{5,2}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_WAYS = 1 << 14  # to begin one rule: llama.cpp compares them in a second
MAX_EMPTY = 512  # symbols in a row that may all be empty: half a second for a character

# What is not closed reaches to the end: to look for its end at each place would take the square of the time.
_TOKEN = re.compile(
    r'#[^\n]*|(?P<terminal>"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|!?<[^>\n]*>?|\.)'
    r"|(?P<rule>[a-zA-Z0-9-]+)\s*::=|(?P<name>[a-zA-Z0-9-]+)|(?P<sign>[()|])|(?P<repeat>[*+?]|\{[^}\n]*\}?)",
    re.DOTALL,
)


@dataclass(slots=True)
class _Item:
    """A symbol of a sequence: a terminal, a rule's name, or the sequences of a group."""

    of: str | list[list[_Item]]
    low: int = 1
    high: int | None = 1


@dataclass(frozen=True, slots=True)
class _Cost:
    """Whether it may be empty, in how many ways it begins, how many symbols of it in a row may be empty."""

    empty: bool
    ways: int
    run: int


_TERMINAL = _Cost(False, 1, 0)
_NOTHING = _Cost(False, 0, 0)


def problem(gbnf: str) -> str | None:
    """What makes the grammar too much work, if anything does. What is wrong with its syntax llama.cpp says better."""
    rules = _read(gbnf)
    if (least := next(_backward(rules), None)) is not None:
        return f"repeats something at least {least.low} and at most {least.high} times"
    meter = _Meter(rules)
    try:
        costs = [meter.rule(name) for name in rules]
    except RecursionError:
        return "nests its rules too deep"
    if any(cost.ways > MAX_WAYS for cost in costs):
        return f"has a rule that begins in more than {MAX_WAYS:,} ways"
    if any(cost.run > MAX_EMPTY for cost in costs):
        return f"has more than {MAX_EMPTY} symbols in a row that may be empty"
    return None


def _read(gbnf: str) -> dict[str, list[list[_Item]]]:
    rules: dict[str, list[list[_Item]]] = {}
    open_groups: list[list[list[_Item]]] = [[[]]]
    for match in _TOKEN.finditer(gbnf):
        alternatives = open_groups[-1]
        if match["rule"]:
            open_groups = [rules.setdefault(match["rule"], [])]
            open_groups[0].append([])
        elif match["terminal"] or match["name"]:
            alternatives[-1].append(_Item(match["name"] or ""))
        elif match["sign"] == "|":
            alternatives.append([])
        elif match["sign"] == "(":
            open_groups.append([[]])
        elif match["sign"] == ")" and len(open_groups) > 1:
            open_groups.pop()
            open_groups[-1][-1].append(_Item(alternatives))
        elif match["repeat"] and alternatives[-1]:
            item = alternatives[-1].pop()
            alternatives[-1].append(_Item([[item]], *_counts(match["repeat"])))
    return rules


def _backward(rules: dict[str, list[list[_Item]]]) -> Iterator[_Item]:
    """Repeats with more times at least than at most: llama.cpp counts up from the first until all memory is used."""
    open_ = [item for alternatives in rules.values() for items in alternatives for item in items]
    while open_:
        item = open_.pop()
        if item.high is not None and item.high < item.low:
            yield item
        if not isinstance(item.of, str):
            open_ += [inner for items in item.of for inner in items]


def _counts(repeat: str) -> tuple[int, int | None]:
    if repeat in ("*", "+", "?"):
        return int(repeat == "+"), 1 if repeat == "?" else None
    low, comma, high = (part.strip() for part in repeat[1:-1].partition(","))
    least = int(low[:9]) if low.isdecimal() else 0
    return least, int(high[:9]) if high.isdecimal() else None if comma else least


class _Meter:
    def __init__(self, rules: dict[str, list[list[_Item]]]) -> None:
        self._rules = rules
        self._costs: dict[str, _Cost] = {}

    def rule(self, name: str) -> _Cost:
        """Of a rule in itself, which llama.cpp refuses at the start of one, only what stands before it counts."""
        if name not in self._costs:
            self._costs[name] = _NOTHING
            self._costs[name] = self._either(self._rules.get(name, []))
        return self._costs[name]

    def _either(self, alternatives: list[list[_Item]]) -> _Cost:
        costs = [self._sequence(items) for items in alternatives]
        return _Cost(any(c.empty for c in costs), sum(c.ways for c in costs), max((c.run for c in costs), default=0))

    def _sequence(self, items: list[_Item]) -> _Cost:
        ways, starts, run, longest = 0, True, 0, 0
        for item in items:
            cost = self._item(item)
            if starts:
                ways += cost.ways
                starts = cost.empty
            run = run + max(1, cost.run) if cost.empty else 0
            longest = max(longest, run, cost.run)
        return _Cost(starts, ways, longest)

    def _item(self, item: _Item) -> _Cost:
        if isinstance(item.of, str):
            return self.rule(item.of) if item.of else _TERMINAL
        cost = self._either(item.of)
        many = max(item.low, item.high or 1)
        if cost.empty:
            return _Cost(True, cost.ways * many, max(1, cost.run) * many)
        if item.low == 0:
            return _Cost(True, cost.ways, max(1, cost.run))
        return cost
