"""Where a checkpoint lies: a path or an address, as a place with its files."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from stepgguf.convert.sources.hub import checkpoint_folder, hub_address
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.place import SHARD, LocalFolder, Place, Repository, is_gguf_name
from stepgguf.errors import UnsupportedCheckpoint


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


def keep_checkpoint(repository: Repository, kept: KeptFolder) -> None:
    """Keep a repository's checkpoint."""
    repository.keep([name for name in repository.names if "/" not in name and name.endswith(SHARD)], kept)
