"""How much work a user's own grammar would be for llama.cpp, estimated before llama.cpp gets it.

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
class _GrammarItem:
    """One symbol of a sequence and how often it may come (high None: without end).

    of: a rule's name, "" for a terminal, or the alternatives of a group.
    """

    of: str | _Alternatives
    low: int = 1
    high: int | None = 1


_Alternatives = list[list[_GrammarItem]]  # each a sequence


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a symbol costs: may it be empty, how many ways it begins, how many symbols in a row of it may be empty."""

    empty: bool
    ways: int
    run: int


_TERMINAL = _Cost(False, 1, 0)
_NOTHING = _Cost(False, 0, 0)


def find_problem(gbnf: str) -> str | None:
    """Return what makes the grammar too much work, as the end of a sentence about it; None if nothing does.

    Wrong syntax is passed over: llama.cpp names it better.
    """
    rules = _parse_rules(gbnf)
    if (least := next(_backward_repeats(rules), None)) is not None:
        return f"repeats something at least {least.low} and at most {least.high} times"
    meter = _CostMeter(rules)
    try:
        costs = [meter.rule_cost(name) for name in rules]
    except RecursionError:
        return "nests its rules too deep"
    if any(cost.ways > MAX_WAYS for cost in costs):
        return f"has a rule that begins in more than {MAX_WAYS:,} ways"
    if any(cost.run > MAX_EMPTY for cost in costs):
        return f"has more than {MAX_EMPTY} symbols in a row that may be empty"
    return None


def _parse_rules(gbnf: str) -> dict[str, _Alternatives]:
    rules: dict[str, _Alternatives] = {}
    open_groups: list[_Alternatives] = [[[]]]  # the innermost last
    for match in _TOKEN.finditer(gbnf):
        alternatives = open_groups[-1]
        if match["rule"]:
            open_groups = [rules.setdefault(match["rule"], [])]
            open_groups[0].append([])
        elif match["terminal"] or match["name"]:
            alternatives[-1].append(_GrammarItem(match["name"] or ""))
        elif match["sign"] == "|":
            alternatives.append([])
        elif match["sign"] == "(":
            open_groups.append([[]])
        elif match["sign"] == ")" and len(open_groups) > 1:
            open_groups.pop()
            open_groups[-1][-1].append(_GrammarItem(alternatives))
        elif match["repeat"] and alternatives[-1]:
            item = alternatives[-1].pop()
            alternatives[-1].append(_GrammarItem([[item]], *_parse_counts(match["repeat"])))
    return rules


def _backward_repeats(rules: dict[str, _Alternatives]) -> Iterator[_GrammarItem]:
    """Repeats with more times at least than at most: llama.cpp counts up from the first until all memory is used."""
    open_ = [item for alternatives in rules.values() for items in alternatives for item in items]
    while open_:
        item = open_.pop()
        if item.high is not None and item.high < item.low:
            yield item
        if not isinstance(item.of, str):
            open_ += [inner for items in item.of for inner in items]


def _parse_counts(repeat: str) -> tuple[int, int | None]:
    if repeat in ("*", "+", "?"):
        return int(repeat == "+"), 1 if repeat == "?" else None
    low, comma, high = (part.strip() for part in repeat[1:-1].partition(","))
    least = int(low[:9]) if low.isdecimal() else 0
    return least, int(high[:9]) if high.isdecimal() else None if comma else least


class _CostMeter:
    """Works out the cost of each rule once, whatever refers to it."""

    def __init__(self, rules: dict[str, _Alternatives]) -> None:
        self._rules = rules
        self._costs: dict[str, _Cost] = {}

    def rule_cost(self, name: str) -> _Cost:
        """Return the cost of a rule by its name; a rule that is not defined costs nothing."""
        if name not in self._costs:
            # In a rule that refers to itself only what stands before counts: at its very start llama.cpp refuses it.
            self._costs[name] = _NOTHING
            self._costs[name] = self._cost_of_either(self._rules.get(name, []))
        return self._costs[name]

    def _cost_of_either(self, alternatives: _Alternatives) -> _Cost:
        costs = [self._cost_of_sequence(items) for items in alternatives]
        return _Cost(any(c.empty for c in costs), sum(c.ways for c in costs), max((c.run for c in costs), default=0))

    def _cost_of_sequence(self, items: list[_GrammarItem]) -> _Cost:
        ways, starts, run, longest = 0, True, 0, 0
        for item in items:
            cost = self._cost_of_item(item)
            if starts:  # all before it may be empty, so the sequence may begin with it
                ways += cost.ways
                starts = cost.empty
            run = run + max(1, cost.run) if cost.empty else 0
            longest = max(longest, run, cost.run)
        return _Cost(starts, ways, longest)

    def _cost_of_item(self, item: _GrammarItem) -> _Cost:
        if isinstance(item.of, str):
            return self.rule_cost(item.of) if item.of else _TERMINAL
        cost = self._cost_of_either(item.of)
        many = max(item.low, item.high or 1)
        if cost.empty:
            return _Cost(True, cost.ways * many, max(1, cost.run) * many)
        if item.low == 0:
            return _Cost(True, cost.ways, max(1, cost.run))
        return cost
