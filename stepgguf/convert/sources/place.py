"""Where a checkpoint lies: its small files in a folder, its shards there too or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stepgguf.convert.sources.hub import checkpoint_folder, hub_address
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.errors import CheckpointError


class CheckpointPlace(Protocol):
    """A place with a checkpoint's files."""

    @property
    def path(self) -> Path:
        """What messages call the place; the paths of its files lie in it."""

    @property
    def folder(self) -> Path:
        """The folder on this disk in which the files beside the shards are."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What tells it from a changed one, besides its shards."""

    def list_files(self) -> Sequence[Path]:
        """The paths of all files, in order."""

    def open_file(self, path: Path) -> RandomAccessFile:
        """Open one of them. CheckpointError if it cannot be read."""

    def stop_waiting(self) -> None:
        """As TensorSource has it."""

    def close(self) -> None: ...


class LocalFolder:
    """A folder on this disk, as checkpoint_folder finds it. CheckpointError if there is none."""

    def __init__(self, path: Path) -> None:
        self.path = self.folder = checkpoint_folder(path)
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


def open_place(path: Path) -> CheckpointPlace:
    """The place that a path or an address (hf:ORG/NAME) means. CheckpointError if there is no such place."""
    address = hub_address(path)
    if address is None:
        return LocalFolder(path)
    from stepgguf.convert.sources.hub_repository import HubRepository

    return HubRepository(address)
