"""What somebody may have meant by a type that there is not: names from elsewhere, sizes, bits per weight.

100gb, 96 GiB            a size of files             --fit
4.25, 4.25bpw            bits per weight             --target-bpw
q4, 4bit, int4, fp4,     so many bits in a block     the types that start from it
nvfp4, UD-Q4_K_XL
Q4-K-M, q4km             a slip                      the type that is spelled like it
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from stepgguf.errors import UnknownType
from stepgguf.quants.mixtures import BASE_TYPES
from stepgguf.quants.types import TABLE

_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?([KMGT])(I?)B?")
_BPW = re.compile(r"(\d{1,2}\.\d{1,4}|\d{1,2})[ -]?BPW|(\d{1,2}\.\d{1,4})")
_BITS = re.compile(r"(?:UD[-_ ]?)?(?P<family>[A-Z]*?)[-_ ]?(?P<bits>\d{1,2})(?!\d)")


def unknown_type(text: str, others: Iterable[str] = ()) -> UnknownType:
    """The error for a type that there is not. others: names that are known besides the types, such as recipes."""
    known = (*BASE_TYPES, *others)
    shown = repr(text if len(text) <= 80 else f"{text[:80]}...")
    what = f"unknown type or recipe {shown}" if others else f"unknown type {shown}"
    wanted = text.upper().strip()
    # Sizes and rates first: "4G" and "4.25" begin like names of 4-bit types too.
    if size := _SIZE.fullmatch(wanted):
        amount = f"{size[1]}{size[2]}{size[3].lower()}B"
        hint = f"For files of that size: --fit {amount}. For a machine of that memory: stepgguf plan SRC."
        return UnknownType(f"{what}; it is a size", hint=hint)
    if bpw := _BPW.fullmatch(wanted):
        hint = f"For so many bits per weight: --target-bpw {bpw[1] or bpw[2]}."
        return UnknownType(f"{what}; it is a rate", hint=hint)
    near = _types_near(wanted)
    same = [name for name in BASE_TYPES if _strip_separators(name) == _strip_separators(wanted)]
    # Where bits tell what is near, a guess by spelling must be a good one: "nvfp4" is not MXFP4 spelled wrongly.
    guess = f"; did you mean {same[0]}?" if same else did_you_mean(text, known, 0.81 if near else 0.6)
    hint = f"Give a stock type ({', '.join(BASE_TYPES)}){_or_recipe(others)}."
    if near and not guess:
        hint = f"Types that come near: {', '.join(near)}."
    return UnknownType(f"{what}{guess}", hint=hint, near=near)


def check_type_name(name: str) -> str:
    """A stock type's canonical name. UnknownType if it is none."""
    if name.upper() not in BASE_TYPES:
        raise unknown_type(name)
    return name.upper()


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The tail of a message: "; did you mean X?", whatever the case, or nothing."""
    spelled = {other.lower(): other for other in known}
    found = get_close_matches(word.lower()[:80], spelled, 1, cutoff)
    return f"; did you mean {spelled[found[0]]}?" if found else ""


def _types_near(wanted: str) -> tuple[str, ...]:
    """Types of as many bits as the name says, of its family if there is such a one, fewest bits first."""
    found = _BITS.match(wanted)
    if found is None:
        return tuple(row.name for row in TABLE if wanted in row.aliases)
    bits = int(found["bits"])
    same = [name for name in BASE_TYPES if (number := re.search(r"\d+", name)) and int(number[0]) == bits]
    return tuple(name for name in same if name.startswith(f"{found['family']}{bits}")) or tuple(same)


def _strip_separators(name: str) -> str:
    """The name without what separates its parts: Q4KM."""
    return re.sub(r"[-_. ]", "", name)


def _or_recipe(others: Iterable[str]) -> str:
    names = ", ".join(others)
    return f", a recipe ({names}) or a .toml file" if names else ""
