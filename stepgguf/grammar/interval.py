"""Numbers between two bounds as GBNF, digit by digit and exact.

    [0, 17.5]  ->  "0" any | ([1-9] | "1" [0-6]) any | "17" ("." ([0-4] digits | "5" zeros))?

A bound is tight while all digits so far are its own; the first digit that differs makes it hold for the rest. Bounded
numbers are written without exponent. Any number has at most DIGITS digits on each side of the point: a double holds
17, and models that start to repeat a digit do not stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import NamedTuple

DIGITS = 20
# Rules that the expressions here refer to; whoever uses them defines these first.
SHARED_RULES = {
    "digits": f"[0-9]{{0,{DIGITS}}}",
    "more-digits": f"[0-9]{{1,{DIGITS}}}",
    "zeros": f'"0"{{1,{DIGITS}}}',
    "fraction": '("." more-digits)?',
}


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of an interval. `open`: the value itself is not in it."""

    value: Decimal
    open: bool = False


class _TightBound(NamedTuple):
    """What a bound still demands of the digits to come: `digits` are its own, without zeros at the end."""

    digits: str
    open: bool


def integers_between(low: Bound | None, high: Bound | None) -> str | None:
    """Return one symbol for the integers of an interval (a bound that is None is none); None if it has no integer."""
    first = last = None
    if low is not None:
        first = int(low.value.to_integral_value(ROUND_CEILING))
        first += low.open and first == low.value
    if high is not None:
        last = int(high.value.to_integral_value(ROUND_FLOOR))
        last -= high.open and last == high.value
    options = _natural_numbers(max(first or 0, 0), last)
    if first is None or first < 0:
        below = _natural_numbers(max(1, -last) if last is not None else 1, None if first is None else -first)
        options += [f'"-" {option}' for option in below]
    return _group_options(options)


def numbers_between(low: Bound | None, high: Bound | None) -> str | None:
    """Return one symbol for the decimal numbers of an interval; None if it is empty."""
    zero = Bound(Decimal(0))
    options = []
    if high is None or high.value > 0 or (high.value == 0 and not high.open):
        options += _magnitudes(low if low is not None and low.value >= 0 else zero, high)
    if low is None or low.value < 0:  # below zero, magnitudes run the other way: the upper bound is the near one
        near = high if high is not None and high.value < 0 else Bound(Decimal(0), open=True)
        far = None if low is None else Bound(-low.value, low.open)
        options += [f'"-" {option}' for option in _magnitudes(Bound(-near.value, near.open), far)]
    return _group_options(options)


def _group_options(options: list[str]) -> str | None:
    return f"({' | '.join(options)})" if options else None


# whole numbers -------------------------------------------------------------------------------------------------------


def _natural_numbers(first: int, last: int | None) -> list[str]:
    """The integers 0 <= first to last (None: without end) as alternatives, one or more for each number of digits."""
    last = min(10**DIGITS - 1, 10**DIGITS if last is None else last)
    if first > last:
        return []
    return [
        _digit_strings(str(max(first, 10 ** (n - 1) if n > 1 else 0)), str(min(last, 10**n - 1)))
        for n in range(len(str(first)), len(str(last)) + 1)
    ]


def _digit_strings(low: str, high: str) -> str:
    """The digit strings from low to high, which have the same length."""
    n = len(low)
    if not n:
        return ""
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return _digit_class(low[0], high[0]) + (f" [0-9]{{{n - 1}}}" if n > 1 else "")
    if low[0] == high[0]:
        return f"{_digit_class(low[0], low[0])} {_digit_strings(low[1:], high[1:])}"
    options = [f"{_digit_class(low[0], low[0])} {_digit_strings(low[1:], '9' * (n - 1))}"]
    if int(high[0]) - int(low[0]) > 1:
        options.append(f"{_digit_class(chr(ord(low[0]) + 1), chr(ord(high[0]) - 1))} [0-9]{{{n - 1}}}")
    options.append(f"{_digit_class(high[0], high[0])} {_digit_strings('0' * (n - 1), high[1:])}")
    return f"({' | '.join(options)})"


def _digit_class(low: str, high: str) -> str:
    return f"[{low}]" if low == high else f"[{low}-{high}]"


# fractions -----------------------------------------------------------------------------------------------------------


def _magnitudes(low: Bound, high: Bound | None) -> list[str]:
    """The decimals 0 <= low to high (None: without end) as alternatives."""
    first, above = _split_at_point(low)
    if high is None:
        edges, middle = [(first, _fraction_between(above, None))], _natural_numbers(first + 1, None)
    else:
        last, below = _split_at_point(high)
        if first > last or (first == last and above.digits > below.digits):
            return []
        if first == last:
            edges, middle = [(first, _fraction_between(above, below))], []
        else:
            edges = [(first, _fraction_between(above, None)), (last, _fraction_between(None, below))]
            middle = _natural_numbers(first + 1, last - 1)
    edge = [f'"{whole}" {fraction}' for whole, fraction in edges if fraction is not None and whole < 10**DIGITS]
    return edge + [f"{option} fraction" for option in middle]


def _split_at_point(bound: Bound) -> tuple[int, _TightBound]:
    whole, _, fraction = f"{bound.value:f}".partition(".")
    return int(whole), _TightBound(fraction.rstrip("0"), bound.open)


def _fraction_between(low: _TightBound | None, high: _TightBound | None) -> str | None:
    """What may follow the whole part of a number, point included; None: nothing, and it may not end there either.

    A bound that is None is not tight: it holds already.
    """
    digits = _more_digits(low, high)
    ends = _may_end(low, high)
    if digits is None:
        return '""' if ends else None
    return f'("." {digits}){"?" if ends else ""}'


def _may_end(low: _TightBound | None, high: _TightBound | None) -> bool:
    reaches_low = low is None or (not low.digits and not low.open)
    return reaches_low and (high is None or bool(high.digits) or not high.open)


def _more_digits(low: _TightBound | None, high: _TightBound | None) -> str | None:
    """At least one digit more, or None if none may come."""
    if low is not None and not low.digits and not low.open:
        low = None  # reached: whatever follows is above it
    if high is not None and not high.digits:
        return None if high.open or low is not None else "zeros"
    if high is None and (low is None or not low.digits):
        return "more-digits" if low is None else "digits [1-9] digits"
    first, last = ((low.digits if low else "") or "0")[0], (high.digits if high else "9")[0]
    if first > last:
        return None
    above, below = _after_digit(low), _after_digit(high)
    if low is not None and high is not None and first == last:
        options = [(first, first, _any_rest(above, below))]
    else:
        # between the bounds' own digits all is free; at one of them that bound stays tight
        inner_first, inner_last = int(first) + (low is not None), int(last) - (high is not None)
        options = [(str(inner_first), str(inner_last), "digits")] if inner_first <= inner_last else []
        if low is not None:
            options.append((first, first, _any_rest(above, None)))
        if high is not None:
            options.append((last, last, _any_rest(None, below)))
    return _group_options([f"{_digit_class(a, b)} {rest}" for a, b, rest in options if rest is not None])


def _after_digit(bound: _TightBound | None) -> _TightBound | None:
    """A bound after a digit that was its own."""
    return None if bound is None else bound._replace(digits=bound.digits[1:])


def _any_rest(low: _TightBound | None, high: _TightBound | None) -> str | None:
    """Any number of digits more, none included where the number may end."""
    if low is None and high is None:
        return "digits"
    digits = _more_digits(low, high)
    ends = _may_end(low, high)
    if digits is None:
        return '""' if ends else None
    return f"({digits}){'?' if ends else ''}"
