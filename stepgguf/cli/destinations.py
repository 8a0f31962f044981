"""Where a command writes: a file, or a folder in which the file gets a name.

models/x.gguf   this file, in a folder that is there
models          an existing folder, or else a slip: a file has the ending
models/         a folder, made if it is not there
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stepgguf.errors import OutputError

_PART = re.compile(r"(.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True)
class Destination:
    """What was given as DEST. ending: what the name of the file must end in."""

    text: str
    ending: str = ".gguf"

    @property
    def path(self) -> Path:
        return Path(self.text)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or says by a slash at its end that it shall be one."""
        return self.text.endswith((os.sep, f"{os.sep}.")) or (self.text != "" and self.path.is_dir())

    def file_path(self, name: str) -> Path:
        """The file to write: in a folder, `name` with the ending. OutputError for a name without the ending."""
        if self.is_folder:
            return self.path / f"{name.replace(os.sep, '-')}{self.ending}"  # a slash would leave the folder
        meant = self._path_meant()
        if meant != self.path:
            raise OutputError(
                f"{self.text or 'an empty name'} cannot be the name of the file: it does not end in {self.ending}"
                if self.path.suffix != self.ending
                else f"{self.text} is the name of a part of a split file",
                hint=f"Write to {meant}, or into a folder: {self.path if self.text else 'models'}{os.sep}",
            )
        return self.path

    def make_folder(self) -> None:
        """Make the folder if a slash says that it is one. OutputError if that cannot be."""
        if not self.is_folder:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.text}: {error.strerror}", hint="Choose another folder.") from error

    def _path_meant(self) -> Path:
        """The path itself if it can be written, else the one that was probably meant."""
        path = self.path
        if path.suffix == self.ending:
            match = _PART.fullmatch(path.stem)
            return path.with_name(match[1] + self.ending) if match and self.ending == ".gguf" else path
        if path.suffix[1:].isalpha():  # .txt, .bin, .GGUF; but .5 and .q4_0 are parts of a name
            return path.with_suffix(self.ending)
        return path.with_name(path.name + self.ending) if path.name else Path(f"model{self.ending}")
