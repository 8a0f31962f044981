"""JSON that somebody else wrote: config.json, tokenizers, shard headers, manifests, journals, sessions.

    document = jsonread.read(path, BadConfig)               refuses what is no JSON: encoding, nesting, double keys
    document["layers"].array()[3].integer(1, 4096)           "config.json: layers[3] is 'x', expected an integer ..."

`read` and `parse` raise one kind of error, which the caller names, and it says file and place. A `Value` is what stands
at one place; its methods give the Python value of the wanted shape or raise that error. What nobody asks for may have
any shape: a config may carry keys that are newer than this program.

Python's json alone lets through what fails later and far away: lone surrogates, numbers beyond every type, nesting that
exhausts the stack, NaN. NaN and infinities stay readable here, since transformers writes them; `number` refuses them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.errors import StepggufError
from stepgguf.files import disk

MAX_BYTES = 256 * 2**20  # the published tokenizer.json has 9 MB
MAX_DEPTH = 100  # containers in each other; Python's own limit is the stack, at about a thousand
_INT64 = 2**63 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Value:
    """What stands at `place` ("" is the root, else "layers[3].name") of `document`. Errors are made by `error`."""

    raw: Any
    document: str
    error: type[StepggufError] = StepggufError
    hint: str | None = None
    place: str = ""

    def wrong(self, expected: str) -> StepggufError:
        """The error for a value that is not what was expected, to be raised."""
        name = self.place or "the document"
        return self.error(f"{self.document}: {name} is {shown(self.raw)}, expected {expected}", hint=self.hint)

    def __getitem__(self, key: str) -> Value:
        """The member of an object, which must be there and not null."""
        found = self.get(key)
        if found is None:
            inside = f" in {self.place}" if self.place else ""
            raise self.error(f"{self.document}: key {key!r} is missing{inside}", hint=self.hint)
        return found

    def get(self, key: str) -> Value | None:
        """The member of an object; None if it is not there or null."""
        member = self.object().get(key)
        return None if member is None else self._member(key, member)

    def object(self) -> dict[str, Any]:
        """The members of an object, as Python's json gives them."""
        if not isinstance(self.raw, dict):
            raise self.wrong("a JSON object")
        return self.raw

    def members(self) -> Iterator[tuple[str, Value]]:
        """The names and values of an object."""
        return ((key, self._member(key, member)) for key, member in self.object().items())

    def array(self) -> list[Value]:
        """The items of a list, each with its place."""
        if not isinstance(self.raw, list | tuple):
            raise self.wrong("a list")
        return [
            Value(item, self.document, self.error, self.hint, f"{self.place}[{i}]") for i, item in enumerate(self.raw)
        ]

    def integer(self, least: int = 0, most: int = _INT64) -> int:
        """A whole number in [least, most]. true and 1.0 are refused."""
        if isinstance(self.raw, bool) or not isinstance(self.raw, int) or not least <= self.raw <= most:
            raise self.wrong(
                f"an integer from {least} to {most}" if most < _INT64 else f"an integer of at least {least}"
            )
        return self.raw

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in [least, most]."""
        if isinstance(self.raw, int | float) and not isinstance(self.raw, bool):
            try:
                value = float(self.raw)
            except OverflowError:
                value = math.inf
            if math.isfinite(value) and least <= value <= most:
                return value
        bounded = math.isfinite(least) or math.isfinite(most)
        raise self.wrong(f"a number from {least:g} to {most:g}" if bounded else "a finite number")

    def text(self) -> str:
        if not isinstance(self.raw, str):
            raise self.wrong("a text")
        return self.raw

    def flag(self) -> bool:
        if not isinstance(self.raw, bool):
            raise self.wrong("true or false")
        return self.raw

    def _member(self, key: str, member: Any) -> Value:
        name = key if len(key) <= 80 else f"{key[:80]}..."
        return Value(member, self.document, self.error, self.hint, f"{self.place}.{name}" if self.place else name)


def read(path: Path, error: type[StepggufError], hint: str | None = None) -> Value:
    """The JSON document in a file. `error`, with `hint`, if it cannot be read or is no JSON."""
    try:
        with disk.open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except disk.NotAFile as problem:
        raise error(f"{path}: not a file", hint=hint) from problem
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}", hint=hint) from problem
    return parse(data, str(path), error, hint)


def parse(data: bytes, document: str, error: type[StepggufError], hint: str | None = None) -> Value:
    """The JSON document in data, UTF-8 with or without a byte order mark. `document` names it in errors."""
    problem, value = None, None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        if data.startswith(b"version https://git-lfs"):
            raise error(f"{document}: is a git-lfs pointer", hint="Fetch the real file with: git lfs pull")
        text = data.decode("utf-8-sig")  # Windows editors begin a file with a byte order mark
        value = json.loads(text, object_pairs_hook=_object_of_pairs)
        if _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        if _SURROGATE.search(text):  # json lets half of a pair through, and no file can be written with it
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as found:
        # ASCII in UTF-16 has a zero in every second byte.
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]
        problem = f"byte {found.start} is not UTF-8" + (", it looks like UTF-16" if utf16 else "")
    except UnicodeEncodeError as found:
        problem = f"half of a surrogate pair, \\u{ord(found.object[found.start]):04x}, is no text"
    except RecursionError:
        problem = f"nested more than {MAX_DEPTH} levels deep"
    except ValueError as found:
        problem = str(found)
    if problem is not None:
        raise error(f"{document}: not valid JSON ({problem})", hint=hint)
    return Value(value, document, error, hint)


def shown(value: Any) -> str:
    """A value in an error's sentence: containers by their size, long texts cut."""
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)  # json keeps the last of a name that is there twice
    if len(result) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"key {shown(twice)} is there twice")
    return result


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether containers lie more than `limit` levels inside each other. Level by level, so without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            member
            for container in level
            for member in (container.values() if isinstance(container, dict) else container)
            if isinstance(member, dict | list)
        ]
    return bool(level)
