"""Where a model's files lie: in a folder on this disk, or in a repository on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.errors import CheckpointError

SHARD = ".safetensors"


class Place(Protocol):
    """A place with files."""

    @property
    def path(self) -> Path:
        """What messages call the place; the paths of its files lie in it."""

    @property
    def folder(self) -> Path:
        """The folder on this disk in which the files beside a checkpoint's shards are."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What tells it from a changed one, besides its files."""

    def list_files(self) -> Sequence[Path]:
        """The paths of the files at its top, in order."""

    def open_file(self, path: Path) -> RandomAccessFile:
        """Open one of them. CheckpointError if it cannot be read."""

    def stop_waiting(self) -> None:
        """As TensorSource has it."""

    def close(self) -> None: ...


class Repository(Place, Protocol):
    """A repository on the Hub, at one commit."""

    @property
    def names(self) -> Sequence[str]:
        """The paths of all its files, in it."""

    def keep(self, names: Sequence[str], kept: KeptFolder) -> None:
        """Keep these files, and what else makes a folder with them complete; those that are opened from now on."""


class LocalFolder:
    """A folder on this disk."""

    def __init__(self, folder: Path) -> None:
        self.path = self.folder = folder
        self.identity: dict[str, str] = {}

    def list_files(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error.strerror}", hint="Check its permissions.") from error

    def open_file(self, path: Path) -> LocalFile:
        return LocalFile(path)

    def stop_waiting(self) -> None:
        pass

    def close(self) -> None:
        pass


def is_gguf_name(name: str) -> bool:
    """Whether a file's name is a GGUF's."""
    return name.lower().endswith(".gguf")
