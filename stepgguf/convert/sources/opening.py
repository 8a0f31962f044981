"""What a path on a command line means: one answer for all commands.

FILE.gguf, any part of a split one          a GGUF
hf:ORG/NAME[@REVISION]/FILE.gguf            a GGUF on the Hub; also without FILE, if the repository has but one
a folder or a file of a checkpoint,
a cache folder of the Hub, ORG/NAME         a checkpoint
hf:ORG/NAME[@REVISION]                      a checkpoint on the Hub
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.checkpoint_place import holds_gguf_alone, keep_checkpoint, open_place
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.gguf_files import GGUFFiles, open_local_gguf, open_remote_gguf
from stepgguf.convert.sources.hub import hub_address, is_part
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.place import Place
from stepgguf.convert.sources.source import TensorSource


def open_source(path: Path, kept: KeptFolder | None = None) -> TensorSource:
    """The model that a path or an address means. kept: where files of the Hub are kept as they are read."""
    found = open_files(path, kept)
    return GGUFSource(found) if isinstance(found, GGUFFiles) else Checkpoint(found)


def open_files(path: Path, kept: KeptFolder | None = None) -> GGUFFiles | Place:
    """The files of the GGUF that is meant, or the place of the checkpoint, which may hold something else."""
    address = hub_address(path)
    if address is None:
        return open_local_gguf(path) if is_gguf(path) else open_place(path)
    from stepgguf.convert.sources.hub_repository import open_repository

    with ExitStack() as opened:
        repository = opened.enter_context(closing(open_repository(address)))
        if address.file is not None or holds_gguf_alone(repository):
            found: GGUFFiles | Place = open_remote_gguf(repository, address, kept)
        else:
            found = repository
            if kept is not None:
                keep_checkpoint(repository, kept)
        opened.pop_all()
        return found


def is_gguf(path: Path) -> bool:
    """Whether the path means a GGUF on this disk."""
    if hub_address(path) is not None:
        return False
    return path.suffix.lower() == ".gguf" or (path.is_file() and not is_part(path))
