"""A body's bytes as JSON that is safe to look at: nothing that comes after has more work with it than it is worth.

Python's parser holds the interpreter while it reads, so an event loop beside it stands still. It needs 15 ms for 8 MB
in one string, but 250 ms for as much in half a million keys. So what has many values is bounded, and read by the parser
that is written in Python, which is slower and lets others run.
"""

from __future__ import annotations

import json
import re
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from stepgguf.server.problem import Refusal

MOST_SIGNS = 300_000  # of commas, or of brackets. In a text each is about a token: the longest context is 262,144
FAST_PARSER_SIGNS = 30_000  # so few that the parser in C is done before anybody waits
MOST_OBJECTS = 65_536  # an agent's history that fills the context has a tenth of that

# Escapes of a JSON string. The group is what may stay: pairs of surrogates, and whatever is no surrogate.
_ESCAPE = re.compile(
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\[^u]|\\u(?![dD][89a-fA-F]))"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def parse_json(body: bytes, depth: int) -> Any:
    """Return the value. Refusal: it is not JSON, nested deeper than `depth`, or has more in it than any prompt.

    A lone surrogate, which clients make when they cut a text in the middle of a character, becomes U+FFFD.
    """
    # Counted and not parsed: whatever the parser makes of them takes longer than looking for two bytes.
    n_signs = max(body.count(b","), body.count(b"[") + body.count(b"{"))
    if n_signs > MOST_SIGNS:
        raise _invalid_json(
            f"the body has {n_signs:,} commas or brackets, more than {MOST_SIGNS:,}: no context holds as much"
        )
    if b"\\ud" in body or b"\\uD" in body:
        body = _ESCAPE.sub(lambda escape: escape[1] or rb"\ufffd", body)
    try:
        decoder = json.JSONDecoder if n_signs <= FAST_PARSER_SIGNS else _PatientDecoder
        value = decoder(parse_constant=_refuse_constant).decode(body.decode(json.detect_encoding(body)))
        _check_nesting(value, depth)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _invalid_json(f"the body is not JSON: {error}") from None
    return value


class _PatientDecoder(json.JSONDecoder):
    """A decoder that runs json's own Python code, which is there for when its C code is not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scan_once = py_make_scanner(self)


def _check_nesting(value: object, depth: int) -> None:
    """Refuse what is too deep or has too many objects. It goes level by level: a check that recursed would need the
    depth that it looks for."""
    level, n_objects = [value], 0
    for _ in range(depth):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                n_objects += 1
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if n_objects > MOST_OBJECTS:
            raise _invalid_json(f"the body has more than {MOST_OBJECTS:,} objects")
        level = inner
        if not level:
            return
    raise _too_deep()


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _too_deep() -> Refusal:
    return _invalid_json("the body is nested too deeply")


def _invalid_json(message: str) -> Refusal:
    return Refusal(400, message, code="invalid_json")
