"""A repository of the Hub as far as the Hub's cache holds it: what an address means under HF_HUB_OFFLINE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepgguf.convert.sources.hub import HubAddress, cached_snapshot
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.random_access import LocalFile
from stepgguf.errors import HubError


class CachedRepository:
    """The snapshot of an address' revision. HubError if it was not downloaded.

    Commit and versions are those that the Hub gives, so a conversion that was begun on the network goes on without.
    """

    def __init__(self, address: HubAddress) -> None:
        self.path = self.folder = cached_snapshot(address)
        self.identity = {f"hf:{address.hub_id}@{self.folder.name}": self.folder.name}

    @property
    def names(self) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def keep(self, names: Sequence[str], kept: KeptFolder) -> None:
        raise HubError(
            f"{kept.path} keeps what is read from the Hub, and HF_HUB_OFFLINE keeps from it",
            hint=f"Leave --keep out: the cache has the files ({self.folder}).",
        )

    def list_files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def open_file(self, path: Path) -> LocalFile:
        blob = path.resolve()  # whose name is the digest that the Hub lists
        return LocalFile(path, f"{blob.stat().st_size} {blob.name}")

    def stop_waiting(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
