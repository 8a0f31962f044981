"""What a path on a command line means: one answer for all commands."""

from __future__ import annotations

from pathlib import Path

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.hub import is_hub_address, is_part
from stepgguf.convert.sources.source import TensorSource


def open_source(path: Path) -> TensorSource:
    """A GGUF, by any of its files; or a checkpoint, by its directory, its files, its cache folder, its Hub id or
    its address on the Hub."""
    return GGUFSource(path) if is_gguf(path) else Checkpoint(path)


def is_gguf(path: Path) -> bool:
    """Whether the path means a GGUF, and not a checkpoint."""
    if is_hub_address(path):
        return False
    return path.suffix.lower() == ".gguf" or (path.is_file() and not is_part(path))
