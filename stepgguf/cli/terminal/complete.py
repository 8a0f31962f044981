"""What Tab offers for the text before the cursor, and files that a question inlines with @path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepgguf.errors import RequestError
from stepgguf.files import textfile

_MENTION = re.compile(r'(?<![^\s(])@(?:"([^"\n]+)"|([^\s"]+))')
_PARTIAL = re.compile(r'(?:^|(?<=[\s(]))@("?)([^\s"]*)$')
_TRAILING = ".,;:!?)"  # belong to the sentence if no file is called so
_MOST = 50  # paths in a menu
_MOST_BYTES = 16 * 2**20  # more than any context holds


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text file that goes with a question."""

    name: str
    text: str

    def fenced(self) -> str:
        """Return it as the model gets it: its name, then the text between fences that are longer than any in it."""
        longest = max((len(run) for run in re.findall(r"`{3,}", self.text)), default=2)
        fence = "`" * (longest + 1)
        return f"{self.name}:\n{fence}{Path(self.name).suffix[1:]}\n{self.text.rstrip()}\n{fence}"


def read_file(name: str) -> Attachment:
    """Read a file to be attached. RequestError: there is none of this name, or it is not text."""
    return Attachment(name, textfile.read(Path(os.path.expanduser(name)), RequestError, most=_MOST_BYTES))


def mentioned_files(question: str) -> list[str]:
    """Return the names of files that a question mentions as @path or @"a path". Other @words are words."""
    names = []
    for match in _MENTION.finditer(question):
        # first as it is written, then without what may be the sentence's punctuation
        for name in (match[1] or match[2], (match[2] or "").rstrip(_TRAILING)):
            if name and os.path.isfile(os.path.expanduser(name)):  # pathlib's raise for "~nobody" and long names
                names.append(name)
                break
    return list(dict.fromkeys(names))


def completions(text: str, words: Callable[[str], Iterable[str]]) -> Iterator[tuple[str, int]]:
    """Yield completions of the text before the cursor, and how many of its characters each replaces.

    words: what may follow "/command "; for "" the commands. A word that ends with "@" stands for any path.
    """
    if mention := _PARTIAL.search(text):
        for path in _paths(mention[2]):
            # no closing quote yet: it may be a folder
            quoted = f'"{path}' if mention[1] or " " in path else path
            yield quoted, len(mention[1] + mention[2])
        return
    if not text.startswith("/") or text.startswith("//") or "\n" in text:
        return
    command, space, argument = text.partition(" ")
    if not space:
        yield from ((word, len(command)) for word in words("") if word.startswith(command))
        return
    last = argument.rpartition(" ")[2]
    for word in words(command):
        if word == "@":
            yield from ((path, len(last)) for path in _paths(last))
        elif word.startswith(last) and (" " not in argument):
            yield word, len(last)


def _paths(start: str) -> list[str]:
    folder, slash, name = start.rpartition("/")
    try:
        entries = sorted(Path(os.path.expanduser(folder + slash or ".")).iterdir())
    except (OSError, ValueError):
        return []
    found = [e for e in entries if e.name.startswith(name) and (name.startswith(".") or not e.name.startswith("."))]
    return [f"{folder}{slash}{e.name}{'/' if os.path.isdir(e) else ''}" for e in found[:_MOST]]
