"""The files of one GGUF, opened, with their headers: on this disk, or in a repository on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from stepgguf.convert.sources.hub import HubAddress
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.place import LocalFolder, Place, Repository, is_gguf_name
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.convert.sources.splits import check_parts, files_beside, first_file, read_headers
from stepgguf.errors import GGUFError, TruncatedFile
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Header

_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class GGUFFiles:
    """All files of one GGUF, in order, and the place in which they lie. files: as many as headers."""

    place: Place
    headers: Sequence[Header]
    files: Sequence[RandomAccessFile]

    def close(self) -> None:
        for file in self.files:
            file.close()
        self.place.close()


def open_local_gguf(path: Path) -> GGUFFiles:
    """The GGUF that a path means, by any of its files. Raises GGUFError, MissingShard."""
    with ExitStack() as opened:
        headers = read_headers(path)
        files = [opened.enter_context(closing(LocalFile(h.path, truncated=TruncatedFile))) for h in headers]
        opened.pop_all()
        return GGUFFiles(LocalFolder(headers[0].path.parent), headers, files)


def open_remote_gguf(repository: Repository, address: HubAddress, kept: KeptFolder | None = None) -> GGUFFiles:
    """The GGUF that an address means in its repository. Raises GGUFError, MissingShard, HubError."""
    with ExitStack() as opened:
        paths = _choose_gguf(repository, address)
        if kept is not None:
            repository.keep([str(path.relative_to(repository.path)) for path in paths], kept)
        files = [opened.enter_context(closing(repository.open_file(path))) for path in paths]
        headers = check_parts([_read_header(file) for file in files])
        opened.pop_all()
        return GGUFFiles(repository, headers, files)


def _read_header(file: RandomAccessFile) -> Header:
    return gguf_header.read_by_parts(
        file.path, file.size, lambda into, offset: file.read_at(into, offset, f"{file.path}, header")
    )


def _choose_gguf(repository: Repository, address: HubAddress) -> list[Path]:
    """The files of the GGUF that is meant. GGUFError, which names what there is, if it is none or one of several."""
    names = sorted(filter(is_gguf_name, repository.names))
    inside = [name for name in names if address.file in (None, name) or name.startswith(f"{address.file}/")]
    models = sorted({first_file(Path(name)) for name in inside})
    if len(models) == 1:
        known = {repository.path / name for name in names}
        return files_beside(repository.path / models[0], known.__contains__)
    found = models or sorted({first_file(Path(name)) for name in names})
    listed = ", ".join(map(str, found[:_MOST_NAMED])) + (", ..." if len(found) > _MOST_NAMED else "")
    if models:
        problem = f"{address.path} holds {len(models)} GGUFs: {listed}"
    else:
        problem = f"{address.path}: the repository has no such GGUF; it holds {listed or 'none at all'}"
    example = repository.path / found[0] if found else address.repository / "FILE.gguf"
    raise GGUFError(problem, hint=f"Give the one that is meant, such as {example}")
