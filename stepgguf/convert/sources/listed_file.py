"""What the Hub lists of a file in a repository: its size and a digest of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepgguf.errors import HubError
from stepgguf.files import disk


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a repository at one commit.

    path: in the repository. digest: in hex, the SHA-256 of a large file (LFS), git's hash of the blob of another.
    """

    path: str
    size: int
    digest: str
    is_lfs: bool

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def version(self) -> str:
        """What changes when its content does."""
        return f"{self.size} {self.digest}"

    def check(self, stored: Path, step: Callable[[int], None] = lambda n: None) -> None:
        """HubError if a file on this disk is not what the Hub lists. step: called with the bytes that were read."""
        if self.is_lfs:
            found = disk.sha256(stored, step)
        else:  # a small one: large ones are LFS
            data = stored.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            step(len(data))
        if found != self.digest:
            raise HubError(
                f"{stored} is not {self.path} as the Hub lists it: its {'SHA-256' if self.is_lfs else 'git hash'} is "
                f"{found}, expected {self.digest}",
                hint=f"Remove {stored} and repeat the command, which fetches it again.",
            )
