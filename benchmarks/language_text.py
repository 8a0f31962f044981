"""The text that the language model of benchmarks/language.py learns and is measured on, from Debian's packages.

    same kind    Python's standard library and documentation, Debian's handbook in four languages, policy and
                 developer's reference, git's documentation: code, reST, AsciiDoc, prose. About 32 million characters
    other kind   fortunes in English and German, entries of a dictionary (GCIDE), German and French manual pages

Documents of the same kind are in one of three splits, by a hash of their name: training, calibration (5 %), held out
(5 %). A page of the handbook has one name in all languages: translators leave paragraphs in English, and a split that
tore the languages apart would show training what is held out.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepgguf.errors import StepggufError

PACKAGES = (
    "python3.11-doc", "debian-handbook", "debian-policy", "developers-reference", "git-doc", "fortunes", "fortunes-de",
    "dict-gcide", "manpages-de", "manpages-fr",
)  # fmt: skip

DOC = Path("/usr/share/doc")
# Long tables, another's tests, and pydoc_data, which holds the documentation a second time.
DULL_LIBRARY = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
HANDBOOK_LANGUAGES = ("en-US", "de-DE", "fr-FR", "es-ES")
ENTRIES_IN_A_DOCUMENT = 20  # of the dictionary
OTHER_CHARACTERS = 1_000_000  # of each source of the other kind


@dataclass(frozen=True)
class Document:
    """A text that is read when it is asked for. `name` decides its split."""

    name: str
    read: Callable[[], str]

    @property
    def place(self) -> int:
        """A number from the name, evenly spread: the order of documents, and by its remainder their split."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")

    @property
    def split(self) -> str:
        """training, calibration or held-out."""
        return {0: "held-out", 1: "calibration"}.get(self.place % 20, "training")


def documents(split: str) -> list[Document]:
    """A split of the text of the same kind, in an order that mixes its sources. StepggufError if text is missing."""
    found = [document for source in SOURCES for document in at_least_one(source)]
    return sorted((d for d in found if d.split == split), key=lambda d: (d.place, d.name))


def other_documents() -> list[list[Document]]:
    """The documents of each source of the other kind, in mixed order. StepggufError if text is missing."""
    return [sorted(at_least_one(source), key=lambda d: (d.place, d.name)) for source in OTHER_SOURCES]


def at_least_one(source: Callable[[], Iterable[Document]]) -> list[Document]:
    """The documents of a source. StepggufError says what to install if it has none."""
    try:
        found = list(source())
    except FileNotFoundError:
        found = []
    if not found:
        raise StepggufError(
            f"The text of {source.__name__.replace('_', ' ')} is not on this machine.",
            hint=f"On Debian 12: apt-get install {' '.join(PACKAGES)}",
        )
    return found


def from_files(prefix: str, root: Path, pattern: str, skip: Iterable[str] = ()) -> Iterator[Document]:
    """A document for each file below `root`, named by its path there, except below folders named in `skip`."""
    for path in root.rglob(pattern):
        parts = path.relative_to(root).parts
        if path.is_file() and not set(skip).intersection(parts):
            yield Document(f"{prefix}/{'/'.join(parts)}", lambda path=path: decode(path))  # type: ignore[misc]


def decode(path: Path) -> str:
    """The text of a file, unpacked; what is no UTF-8 becomes the replacement character."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")


def python_library() -> Iterator[Document]:
    return from_files("python", Path(sysconfig.get_path("stdlib")), "*.py", DULL_LIBRARY)


def python_documentation() -> Iterator[Document]:
    return from_files("python-doc", DOC / "python3.11" / "html" / "_sources", "*.rst.txt")


def debian_handbook() -> Iterator[Document]:
    for language in HANDBOOK_LANGUAGES:
        for page in from_files("handbook", DOC / "debian-handbook" / "html" / language, "*.html"):
            yield Document(page.name, lambda page=page: page_text(page.read()))  # type: ignore[misc]


def page_text(page: str) -> str:
    """The text of a page of the handbook, without its navigation. One line for each paragraph."""
    body = page.partition('<ul class="docnav top">')[2].partition("</ul>")[2].rpartition('<ul class="docnav">')[0]
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|div|h\d|li|dt|dd)>", "\n", body)))
    return re.sub(r"\s*\n[\s]*\n\s*", "\n\n", re.sub(r"\n\t+", "\n", text)).strip()


def debian_policy() -> Iterator[Document]:
    return from_files("policy", DOC / "debian-policy" / "policy.html" / "_sources", "*.rst.txt")


def developers_reference() -> Iterator[Document]:
    return from_files("developers", Path("/usr/share/developers-reference/_sources"), "*.rst.txt")


def git_documentation() -> Iterator[Document]:
    return from_files("git", DOC / "git", "*.txt")


def english_fortunes() -> Iterator[Document]:
    return fortunes("en", Path("/usr/share/games/fortunes"))


def german_fortunes() -> Iterator[Document]:
    return fortunes("de", Path("/usr/share/games/fortunes/de"))


def fortunes(language: str, folder: Path) -> Iterator[Document]:
    """A document for each fortune. Files are there twice, the second time as a link that ends in .u8."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.suffix:
            for i, text in enumerate(decode(path).split("\n%\n")):
                yield Document(f"fortunes/{language}/{path.name}/{i}", lambda text=text: text)  # type: ignore[misc]


def dictionary() -> Iterator[Document]:
    entries = decode(Path("/usr/share/dictd/gcide.dict.dz")).split("\n\n")
    for i in range(0, len(entries), ENTRIES_IN_A_DOCUMENT):
        text = "\n\n".join(entries[i : i + ENTRIES_IN_A_DOCUMENT])
        yield Document(f"dictionary/{i}", lambda text=text: text)  # type: ignore[misc]


def manual_pages() -> Iterator[Document]:
    """German and French, as they are written, with troff's commands."""
    for language in ("de", "fr"):
        yield from from_files(f"man/{language}", Path("/usr/share/man") / language, "*.gz")


def limited_texts(documents: Iterable[Document], characters: int) -> Iterator[str]:
    """Texts of documents until `characters` are exceeded."""
    for document in documents:
        if characters < 0:
            return
        text = document.read()
        characters -= len(text)
        yield text


SOURCES = (
    python_library,
    python_documentation,
    debian_handbook,
    debian_policy,
    developers_reference,
    git_documentation,
)
OTHER_SOURCES = (english_fortunes, german_fortunes, dictionary, manual_pages)
