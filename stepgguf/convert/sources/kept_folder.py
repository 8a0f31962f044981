"""The folder of --keep: a repository's files, kept as a conversion reads them.

    begin       the folder, and room for what is missing; small files are copied
    open_file   what is read of a large one is written there (kept_file.py)
    complete    what was not read is fetched; each file is compared with the digest that the Hub lists, then named

Afterwards the folder is a checkpoint, or holds a GGUF, whose every file is the Hub's. Whatever interrupts it, the same
command goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

from stepgguf.convert.sources.kept_file import KeptFile
from stepgguf.convert.sources.listed_file import ListedFile
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.convert.sources.read_ahead import CONNECTIONS
from stepgguf.errors import OutputError
from stepgguf.files import disk
from stepgguf.files.byte_sizes import readable_size


class KeptFolder:
    """A folder in which files of one repository are kept. Nothing is made before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[ListedFile] = []
        self._parts: dict[str, KeptFile] = {}
        self._stop = Event()

    def begin(self, address: Path, files: Sequence[ListedFile], stop: Event) -> None:
        """Make the folder. OutputError if the disk has no room for these files, or other ones have their names.

        stop: ends all that waits for the network.
        """
        self._files, self._stop = list(files), stop
        with disk.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for file in files:
                stored = self.path / file.name
                if stored.exists() and stored.stat().st_size != file.size:
                    raise OutputError(
                        f"{stored} has {stored.stat().st_size:,} bytes, and {address / file.path} has {file.size:,}",
                        hint="Keep the repository in a folder of its own, or remove that file.",
                    )
            need, free = self.missing_bytes, shutil.disk_usage(self.path).free
        if need > free:
            raise OutputError(
                f"{self.path} has {readable_size(free)} free, what is missing of {address} takes {readable_size(need)}",
                hint="Free some space, or choose a folder on another disk with --keep.",
            )

    @property
    def missing_bytes(self) -> int:
        """What its files will take of the disk besides what they take now."""
        return sum(self._missing_of(file) for file in self._files)

    def missing_bytes_on(self, folder: Path) -> int:
        """missing_bytes, if this folder is on the same disk, else 0."""
        return self.missing_bytes if folder.stat().st_dev == self.path.stat().st_dev else 0

    @property
    def n_files(self) -> int:
        return len(self._files)

    @property
    def n_bytes(self) -> int:
        """The bytes of all its files, when they are whole."""
        return sum(file.size for file in self._files)

    @property
    def unchecked_bytes(self) -> int:
        """The bytes that `complete` fetches and compares."""
        return self.n_bytes + sum(part.missing_bytes for part in self._parts.values())

    def refuse_names(self, outputs: Sequence[Path]) -> None:
        """OutputError if one of these files would take the place of one that is kept."""
        kept = {(self.path / file.name).resolve() for file in self._files}
        for path in outputs:
            if path.resolve() in kept:
                raise OutputError(f"{path} is where the source is kept", hint="Write to another name or folder.")

    def copy(self, file: ListedFile, source: Path) -> None:
        """Keep a small file, which lies at `source`. HubError if it is not what the Hub lists."""
        stored = self.path / file.name
        if not stored.exists():
            file.check(source)
            with disk.disk_errors(stored):
                disk.replace(stored, source.read_bytes())

    def open_file(
        self, path: Path, file: ListedFile, open_unkept: Callable[[], RandomAccessFile]
    ) -> LocalFile | KeptFile:
        """The kept file, if it is whole; else one that reads the file that is not kept, and keeps what it reads."""
        stored = self.path / file.name
        if stored.exists():
            return LocalFile(path, file.version, stored_at=stored)
        with ExitStack() as opened:
            part = KeptFile(opened.enter_context(closing(open_unkept())), file, stored)
            opened.pop_all()
        self._parts[file.name] = part
        return part

    def complete(self, step: Callable[[int], None]) -> None:
        """Fetch what was not read, compare each file with its digest, and give it its name.

        HubError for a file that is not what the Hub lists. step: called with bytes that are done.
        """
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="keep")
        try:
            for part in self._parts.values():
                for n in pool.map(part.fetch, part.missing_runs()):
                    step(n)
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        for file in self._files:
            self._check(file, step)

    def close(self) -> None:
        """Let go of the files, when nothing reads them any longer."""
        while self._parts:
            self._parts.popitem()[1].release()

    def _check(self, file: ListedFile, step: Callable[[int], None]) -> None:
        stored, part = self.path / file.name, self._parts.get(file.name)
        if part is None:
            file.check(stored, step)
            return
        part.finish()
        file.check(part.part, step)
        with disk.disk_errors(stored):
            part.part.replace(stored)
            disk.sync_folder(self.path)

    def _missing_of(self, file: ListedFile) -> int:
        part = self.path / f"{file.name}.part"
        if (self.path / file.name).exists():
            return 0
        return max(0, file.size - part.stat().st_blocks * 512) if part.exists() else file.size
