"""Text that somebody else wrote, from a file of theirs: recipes, templates, what a question inlines."""

from __future__ import annotations

from pathlib import Path

from stepgguf.errors import StepggufError
from stepgguf.files import disk


def read(path: Path, error: type[StepggufError], *, most: int) -> str:
    """The text of a file of at most so many bytes. `error`, which names it, for what is no file and no UTF-8 text."""
    try:
        with disk.open_regular(path) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise error(f"{path}: more than {most:,} bytes", hint="Give a text file.")
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        found = f"byte {problem.start} is {problem.object[problem.start]:#04x}"
        raise error(f"{path}: not UTF-8 text, {found}", hint="Give a text file.") from None
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}", hint="Give a file that can be read.") from None
