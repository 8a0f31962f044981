"""The pages that users read, taken apart: their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- needs (?P<needs>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """needs: what a test does not have, as <!-- needs ... --> before the block says."""

    page: Path
    language: str
    text: str
    needs: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text()):
        if found["language"] in languages:
            yield Block(page, found["language"], found["text"], found["needs"])


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block; quotes and backslashes may join lines."""
    lines = iter(block.text.splitlines())
    for line in lines:
        while True:
            text = line.rstrip("\\") if line.endswith("\\") else line
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quote that is still open
                line += "\n" + next(lines)
                continue
            if not line.endswith("\\"):
                break
            line = text + next(lines)
        yield from _split_at(words, "&&")


def _split_at(words: list[str], separator: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, separator]:
        if word != separator:
            part.append(word)
        elif part:
            yield part
            part = []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
