"""Numbers between two bounds as GBNF, digit by digit and exact.

    [0, 17.5]  ->  "0" any | ([1-9] | "1" [0-6]) any | "17" ("." ([0-4] digits | "5" zeros))?

A bound is tight while all digits so far are its own; the first digit that differs makes it hold for the rest. Bounded
numbers are written without exponent. Any number has at most DIGITS digits on each side of the point: a double holds
17, and models that start to repeat a digit do not stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

DIGITS = 20
# Rules that the expressions here refer to
RULES = {
    "digits": f"[0-9]{{0,{DIGITS}}}",
    "more-digits": f"[0-9]{{1,{DIGITS}}}",
    "zeros": f'"0"{{1,{DIGITS}}}',
    "fraction": '("." more-digits)?',
}


@dataclass(frozen=True, slots=True)
class Bound:
    """`open`: the value itself is not in the interval."""

    value: Decimal
    open: bool = False


def integers(low: Bound | None, high: Bound | None) -> str | None:
    """The integers of an interval as one symbol; None if there are none."""
    first = last = None
    if low is not None:
        first = int(low.value.to_integral_value(ROUND_CEILING))
        first += low.open and first == low.value
    if high is not None:
        last = int(high.value.to_integral_value(ROUND_FLOOR))
        last -= high.open and last == high.value
    options = _whole(max(first or 0, 0), last)
    if first is None or first < 0:
        below = _whole(max(1, -last) if last is not None else 1, None if first is None else -first)
        options += [f'"-" {option}' for option in below]
    return _group(options)


def numbers(low: Bound | None, high: Bound | None) -> str | None:
    """The decimal numbers of an interval as one symbol; None if there are none."""
    zero = Bound(Decimal(0))
    options = []
    if high is None or high.value > 0 or (high.value == 0 and not high.open):
        options += _magnitudes(low if low is not None and low.value >= 0 else zero, high)
    if low is None or low.value < 0:
        near = high if high is not None and high.value < 0 else Bound(Decimal(0), open=True)
        far = None if low is None else Bound(-low.value, low.open)
        options += [f'"-" {option}' for option in _magnitudes(Bound(-near.value, near.open), far)]
    return _group(options)


def _group(options: list[str]) -> str | None:
    return f"({' | '.join(options)})" if options else None


def _whole(first: int, last: int | None) -> list[str]:
    """The integers 0 <= first to last (None: without end) as alternatives, one or more for each number of digits."""
    last = min(10**DIGITS - 1, 10**DIGITS if last is None else last)
    if first > last:
        return []
    return [
        _between(str(max(first, 10 ** (n - 1) if n > 1 else 0)), str(min(last, 10**n - 1)))
        for n in range(len(str(first)), len(str(last)) + 1)
    ]


def _between(low: str, high: str) -> str:
    """Digit strings of one length."""
    n = len(low)
    if not n:
        return ""
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return _digit(low[0], high[0]) + (f" [0-9]{{{n - 1}}}" if n > 1 else "")
    if low[0] == high[0]:
        return f"{_digit(low[0], low[0])} {_between(low[1:], high[1:])}"
    options = [f"{_digit(low[0], low[0])} {_between(low[1:], '9' * (n - 1))}"]
    if int(high[0]) - int(low[0]) > 1:
        options.append(f"{_digit(chr(ord(low[0]) + 1), chr(ord(high[0]) - 1))} [0-9]{{{n - 1}}}")
    options.append(f"{_digit(high[0], high[0])} {_between('0' * (n - 1), high[1:])}")
    return f"({' | '.join(options)})"


def _digit(low: str, high: str) -> str:
    return f"[{low}]" if low == high else f"[{low}-{high}]"


def _magnitudes(low: Bound, high: Bound | None) -> list[str]:
    """Decimals 0 <= low to high as alternatives."""
    first, above = _split(low.value)
    if high is None:
        edges, middle = [(first, _fraction(above, low.open, None, False))], _whole(first + 1, None)
    else:
        last, below = _split(high.value)
        if first > last or (first == last and above > below):
            return []
        if first == last:
            edges, middle = [(first, _fraction(above, low.open, below, high.open))], []
        else:
            edges = [
                (first, _fraction(above, low.open, None, False)),
                (last, _fraction(None, False, below, high.open)),
            ]
            middle = _whole(first + 1, last - 1)
    edge = [f'"{whole}" {fraction}' for whole, fraction in edges if fraction is not None and whole < 10**DIGITS]
    return edge + [f"{option} fraction" for option in middle]


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _fraction(low: str | None, low_open: bool, high: str | None, high_open: bool) -> str | None:
    """What may follow the whole part of a number, between the fractions of two bounds (digits; None: not tight)."""
    digits = _more(low, low_open, high, high_open)
    ends = _may_end(low, low_open, high, high_open)
    if digits is None:
        return '""' if ends else None
    return f'("." {digits}){"?" if ends else ""}'


def _may_end(low: str | None, low_open: bool, high: str | None, high_open: bool) -> bool:
    return (low is None or (not low and not low_open)) and (high is None or bool(high) or not high_open)


def _more(low: str | None, low_open: bool, high: str | None, high_open: bool) -> str | None:
    """At least one digit more."""
    if low == "" and not low_open:
        low = None
    if high == "":
        return None if high_open or low is not None else "zeros"
    if high is None and not low:
        return "more-digits" if low is None else "digits [1-9] digits"
    first, last = (low or "0")[0], (high or "9")[0]
    low_rest = None if low is None else low[1:]
    high_rest = None if high is None else high[1:]
    if first > last:
        return None
    if low is not None and high is not None and first == last:
        options = [(first, first, _rest(low_rest, low_open, high_rest, high_open))]
    else:
        inner_first, inner_last = int(first) + (low is not None), int(last) - (high is not None)
        options = [(str(inner_first), str(inner_last), "digits")] if inner_first <= inner_last else []
        if low is not None:
            options.append((first, first, _rest(low_rest, low_open, None, False)))
        if high is not None:
            options.append((last, last, _rest(None, False, high_rest, high_open)))
    texts = [f"{_digit(a, b)} {rest}" for a, b, rest in options if rest is not None]
    return _group(texts)


def _rest(low: str | None, low_open: bool, high: str | None, high_open: bool) -> str | None:
    if low is None and high is None:
        return "digits"
    digits = _more(low, low_open, high, high_open)
    ends = _may_end(low, low_open, high, high_open)
    if digits is None:
        return '""' if ends else None
    return f"({digits}){'?' if ends else ''}"
