"""Where a model's files lie: in a folder on this disk, or in a repository on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

from stepgguf.convert.sources.hub import checkpoint_folder, hub_address
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.errors import CheckpointError, UnsupportedCheckpoint

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


def open_place(path: Path, kept: KeptFolder | None = None) -> Place:
    """The place of the checkpoint that a path or an address means. CheckpointError if there is no such place.

    kept: where the files of a repository are kept.
    """
    address = hub_address(path)
    if address is None:
        return LocalFolder(checkpoint_folder(path))
    if address.file is not None:
        raise UnsupportedCheckpoint(
            f"{address.path} is a file or a folder in a repository, and no checkpoint",
            hint=f"If it is a GGUF: stepgguf quantize {address.path} DEST.gguf; the checkpoint is {address.repository}",
        )
    from stepgguf.convert.sources.hub_repository import open_repository

    with ExitStack() as opened:
        repository = opened.enter_context(closing(open_repository(address)))
        if holds_gguf_alone(repository):
            raise UnsupportedCheckpoint(
                f"{address.path} holds GGUF files and no safetensors",
                hint=f"Quantize one of them: stepgguf quantize {address.path} DEST.gguf",
            )
        if kept is not None:
            keep_checkpoint(repository, kept)
        opened.pop_all()
        return repository


def holds_gguf_alone(repository: Repository) -> bool:
    """Whether a repository's model is a GGUF, and no checkpoint."""
    is_checkpoint = any(name.endswith(SHARD) and "/" not in name for name in repository.names)
    return not is_checkpoint and any(map(is_gguf_name, repository.names))


def is_gguf_name(name: str) -> bool:
    """Whether a file's name is a GGUF's."""
    return name.lower().endswith(".gguf")


def keep_checkpoint(repository: Repository, kept: KeptFolder) -> None:
    """Keep a repository's checkpoint."""
    repository.keep([name for name in repository.names if "/" not in name and name.endswith(SHARD)], kept)
