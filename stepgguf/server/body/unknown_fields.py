"""Fields that this server does not know.

A misspelt `temprature` must not be a silent default, so a name close to a known one is refused and the known one named.
Any other is an extra of some vendor's, which servers that do not know it pass over: it is ignored, and the log says so
once for each name. A strict server refuses them all.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import SequenceMatcher

log = logging.getLogger(__name__)
MOST_NAMES = 1000  # that are remembered, and so said: a client chooses them
MOST_OF_ONE_REQUEST = 256  # each is compared with all known ones; no vendor has as many
LONGEST_NAME = 64
ALIKE = 0.8  # of 1: `choise` and `choice` are 0.83, `enable` and `disable` 0.62
SHORTEST_WORD = 6  # of words that may differ by a letter: `mode`, `top_a` and `min_tokens` are other fields
# What dialects and servers call the same thing. Passing over one of them would lose its meaning.
NAMESAKES = (
    (
        *("max_completion_tokens", "max_output_tokens", "max_tokens"),
        *("n_predict", "num_predict", "max_new_tokens", "max_length"),
    ),
    ("stop", "stop_sequences", "stop_strings"),
    ("input", "messages", "prompt"),
    ("system", "instructions"),
    ("reasoning_effort", "reasoning", "output_config", "effort"),
    ("logprobs", "n_probs"),
    ("temperature", "temp"),
)
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")


class UnknownFields:
    """What one server does with unknown fields, and which of them its log has named. Thread-safe."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._logged: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def ignore(self, what: str, names: Iterable[str]) -> None:
        """Name those in the log that it has not named before. what: a noun, such as "field"."""
        for name in (name[:LONGEST_NAME] for name in names):
            with self._lock:
                new = (what, name) not in self._logged and len(self._logged) < MOST_NAMES
                if new:
                    self._logged.add((what, name))
            if new:
                log.warning("ignored a %s that is not known here (said once): %a", what, name)


@dataclass(frozen=True, slots=True)
class RequestUnknowns:
    """What was ignored in one request, and in which of its objects: of a long list of alike objects only one is looked
    at."""

    server: UnknownFields = field(default_factory=UnknownFields)
    ignored: set[tuple[type, str]] = field(default_factory=set)

    def ignore(self, owner: type, names: Sequence[str]) -> None:
        """Note these fields of an object of class `owner`, and have the server's log name them once."""
        self.ignored.update((owner, name) for name in names)
        self.server.ignore("field", names)


# FastAPI validates a body without a way to hand something through to its models.
REQUEST: ContextVar[RequestUnknowns] = ContextVar("REQUEST")


def near_miss(name: str, known: Collection[str]) -> str | None:
    """Return the known name that is written with the same words, or with one of them misspelt; None if there is
    none."""
    words = _words(name[:LONGEST_NAME])
    for other in known:
        others = _words(other)
        if "".join(words) == "".join(others):
            return other
        if len(words) == len(others):
            differing = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
            if len(differing) == 1 and _misspelt(*differing[0]):
                return other
    return None


def namesake(name: str, known: Collection[str]) -> str | None:
    """Return the known name of what other dialects call `name`, if there is one."""
    return next((other for names in NAMESAKES if name in names for other in names if other in known), None)


def _words(name: str) -> list[str]:
    """The words of a name in small letters: topP and top_p have the same two."""
    return [word.lower() for word in _WORD.findall(name)]


def _misspelt(word: str, right: str) -> bool:
    if word == right + "s" or word + "s" == right or sorted(word) == sorted(right):
        return True
    return max(len(word), len(right)) >= SHORTEST_WORD and SequenceMatcher(None, word, right).ratio() >= ALIKE
