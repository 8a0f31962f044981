"""Files of JSON lines that are only ever appended to, so that a kill or a full disk loses the last line at most.

    {"a": 1}
    {"a": 2}
    {"a"                   cut off by a kill
                           a blank line, which ends it when the file is opened again
    {"a": 3}

Reading keeps to the lines: a damaged one is an error of its own, and those after it hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stepgguf.errors import StepggufError
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, without its end. is_whole: False for what stands behind the last newline."""

    path: Path
    number: int
    data: bytes
    is_whole: bool

    def parse(self, error: type[StepggufError], hint: str | None = None) -> Value:
        """The line's JSON document. `error`, which names file and line, if it has none."""
        return jsonread.parse(self.data, f"{self.path}: line {self.number}", error, hint)


def read_lines(path: Path) -> list[Line]:
    """The first line, be it empty, and all that are not blank. OSError if the file cannot be read."""
    lines = path.read_bytes().split(b"\n")
    numbered = [Line(path, number, data, number < len(lines)) for number, data in enumerate(lines, 1)]
    return [line for line in numbered if line.number == 1 or line.data.strip()]


class LineWriter:
    """Appends JSON lines to an open file. `sync`: lines are on the disk when `append` returns."""

    def __init__(self, file: BinaryIO, *, sync: bool = False) -> None:
        self._file, self._sync = file, sync
        if file.tell():
            file.write(b"\n")  # ends a line that was cut off

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add a line for each record. Half of a surrogate pair, which is no text, becomes a question mark."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.write(lines.encode(errors="replace"))
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. What could not be written was an error of `append`, and is none again."""
        with suppress(OSError):
            self._file.close()
