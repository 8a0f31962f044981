"""The GGUFs of a folder, finished or in the making, and what belongs to each of them.

    NAME.gguf                          a whole one; of a split one NAME-00001-of-00003.gguf and so on
    NAME.gguf.manifest.json            of each file (manifest.py)
    NAME.gguf.part, NAME.gguf.journal  an interrupted conversion (writer.py); the journal has the first file's name
    NAME.gguf.calibration/             its working files, under the name without parts
    NAME.gguf.header, NAME.gguf.new    what a change of the template leaves that was cut off (rewrite.py)

A file is of stepgguf if it has the program's keys or a manifest, and a .part if a journal names it: other programs have
files that end so too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stepgguf.convert.journal import parse_journal
from stepgguf.convert.manifest import manifest_path
from stepgguf.convert.metadata import TYPE, made_here, recorded_type
from stepgguf.convert.plan import row_ranges, rows_per_unit
from stepgguf.convert.sources.splits import first_file, model_stem, read_headers
from stepgguf.errors import GGUFError, OutputError, StepggufError
from stepgguf.files import disk, gguf_header
from stepgguf.files.gguf_header import Header, TensorInfo
from stepgguf.files.jsonread import Value
from stepgguf.quants.types import row_size

CALIBRATION_ENDING = ".calibration"
_JOURNAL = ".journal"
_WORKING = {"lock", "states"}  # in the folder of a calibration: anything else in it is somebody's own


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """A conversion that was interrupted, or runs now. type: what was asked for. share: of its bytes that are made."""

    journal: Path
    parts: tuple[Path, ...]
    type: str
    share: float


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A GGUF of a folder. path: its name, of a split one that of the first file; there may be no such file yet.

    files: those that are finished. header: of the first of them, if it can be read. problem: why they cannot be used.
    run: what is to become this file. calibration: the folder of a calibration's working files.
    """

    path: Path
    files: tuple[Path, ...]
    header: Header | None
    problem: str | None
    run: UnfinishedRun | None
    calibration: Path | None

    @property
    def is_ours(self) -> bool:
        """Whether stepgguf made it, or is to make it."""
        by_keys = self.header is not None and made_here(self.header)
        return by_keys or not self.files or any(manifest_path(file).exists() for file in self.files)

    @property
    def type(self) -> str | None:
        """What it was made as, or is to be made as; None if nobody says."""
        if self.header is None:
            return self.run.type if self.run else None
        own = self.header.get(TYPE)  # llama-quantize copies it from its source, and writes no manifest
        return own if isinstance(own, str) and manifest_path(self.path).exists() else recorded_type(self.header)

    @property
    def n_bytes(self) -> int:
        """Bytes of the finished files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def working_bytes(self) -> int:
        """What the unfinished run and the calibration take of the disk."""
        parts = self.run.parts if self.run else ()
        calibration = disk.used_bytes(self.calibration) if self.calibration else 0
        return calibration + sum(part.stat().st_blocks * 512 for part in parts)

    @property
    def is_calibrating(self) -> bool:
        """Whether a process works in the folder of the calibration."""
        return self.calibration is not None and disk.is_held(self.calibration / "lock")

    @property
    def is_in_use(self) -> bool:
        """Whether a process works on it."""
        return self.is_calibrating or any(map(disk.is_held, _held_files(self)))


def find_models(folder: Path) -> list[LocalModel]:
    """All GGUFs of a folder, by name. OSError if it cannot be read."""
    entries = sorted(folder.iterdir())
    files: dict[Path, list[Path]] = {}
    for path in entries:
        if path.suffix == ".gguf" and path.is_file():
            files.setdefault(first_file(path), []).append(path)
    runs = {run.journal.with_suffix(""): run for path in entries if (run := _read_run(path)) is not None}
    calibrations = {_calibrated(path, runs): path for path in entries if _is_calibration(path)}
    return [
        LocalModel(path, own, *_read_files(own), runs.get(path), calibrations.get(path))
        for path in sorted({*files, *runs, *calibrations})
        for own in [tuple(files.get(path, ()))]
    ]


def find_model(path: Path) -> LocalModel:
    """The GGUF that a user means by one of its files, or by its name without ending and part.

    A file that stepgguf did not make must be named exactly. OutputError for what is none, or several.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory", hint="Name a GGUF file.")
    models = find_models(path.parent) if path.parent.is_dir() else []
    found = [model for model in models if path in (model.path, *model.files)]
    found = found or [model for model in models if model_stem(model.path) in (path.name, path.name[: -len(".gguf")])]
    if len(found) > 1:
        names = ", ".join(str(model.path) for model in found)
        raise OutputError(f"{path} may be {len(found)} files: {names}", hint="Name the one that you mean exactly.")
    if not found and not path.exists():
        raise OutputError(f"{path}: there is no such file", hint="`stepgguf list` shows what there is.")
    if not found or not (found[0].is_ours or path not in found[0].files or _has_magic(path)):
        raise OutputError(f"{path} is no GGUF file", hint="stepgguf removes GGUF files alone.")
    if not found[0].is_ours and path not in found[0].files:
        hint = "Name it exactly to remove it all the same."
        raise OutputError(f"{found[0].path} was not made by stepgguf", hint=hint)
    return found[0]


def belongings(model: LocalModel) -> list[Path]:
    """All files of a model, in an order of removal after each step of which the rest is still known to belong here."""
    parts = model.run.parts if model.run else ()
    unfinished = [path for part in parts if not (path := part.with_suffix("")).exists()]
    candidates: list[Path] = []
    for file in (*model.files, *unfinished):
        left = (file.with_name(f"{file.name}{end}") for end in (".new", ".header", ".manifest.json.new"))
        candidates += [*left, manifest_path(file), file]
    journal = [model.run.journal] if model.run else []
    return [path for path in (*parts, *candidates, *journal) if path.is_file()]


@contextmanager
def holding(model: LocalModel) -> Iterator[None]:
    """Keep other processes off a model's files for the block. OutputError while one works on them."""
    with ExitStack() as held:
        with disk.disk_errors(model.path):
            try:
                for path in _held_files(model):
                    held.callback(os.close, disk.hold(path))
            except BlockingIOError:
                raise _in_use(model) from None
        if model.is_calibrating:
            raise _in_use(model)
        yield


def _in_use(model: LocalModel) -> OutputError:
    hint = "Wait for it to end, or stop it."
    return OutputError(f"{model.path} is in use: another stepgguf works on it", hint=hint)


def _held_files(model: LocalModel) -> list[Path]:
    """What a process that works on the model holds."""
    return [*([model.run.journal, *model.run.parts] if model.run else []), *model.files]


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read_files(files: tuple[Path, ...]) -> tuple[Header | None, str | None]:
    """The header of a GGUF's first file that is there, and what is wrong with the whole."""
    if not files:
        return None, None
    try:
        return read_headers(files[0])[0], None
    except StepggufError as error:
        problem = error.message
    try:
        return gguf_header.read(files[0], check_size=False), problem
    except GGUFError:
        return None, problem


def _is_calibration(path: Path) -> bool:
    """Whether it is the folder of a calibration's working files."""
    if not path.name.endswith(f".gguf{CALIBRATION_ENDING}") or not path.is_dir() or path.is_symlink():
        return False
    return {entry.name for entry in path.iterdir()} <= _WORKING


def _calibrated(folder: Path, runs: Iterable[Path]) -> Path:
    """The GGUF that a calibration is for; its run may be one of a split file."""
    whole = folder.with_suffix("")
    return next((path for path in runs if model_stem(path) == whole.stem), whole)


def _read_run(path: Path) -> UnfinishedRun | None:
    """The conversion that a journal is of; None for what is no journal, or has not begun."""
    if not path.name.endswith(f".gguf{_JOURNAL}") or not path.is_file():
        return None
    found = parse_journal(path.read_bytes(), path)
    if found is None:
        return None
    label, finished, _ = found
    try:
        names = [name.text() for name in Value(label, str(path))["files"].array()]
        type_name = Value(label, str(path))["type"].text()
    except StepggufError:  # of another program
        return None
    if not names or names[0] != path.stem or any(Path(name).name != name for name in names):
        return None
    targets = [path.with_name(name) for name in names]
    parts = tuple(part for target in targets if (part := target.with_name(f"{target.name}.part")).is_file())
    return UnfinishedRun(path, parts, type_name, _finished_share(targets, finished.keys()))


def _finished_share(targets: list[Path], finished: AbstractSet[int]) -> float:
    """The share of the files' tensor bytes that is in finished units."""
    try:
        infos = [info for target in targets for info in _part_header(target).tensors]
    except GGUFError:  # it was interrupted before there was a header
        return 0.0
    sizes = [size for info in infos for size in _unit_sizes(info)]
    return sum(size for number, size in enumerate(sizes) if number in finished) / max(1, sum(sizes))


def _part_header(target: Path) -> Header:
    """The header of a file in the making, which may have its final name already."""
    part = target.with_name(f"{target.name}.part")
    return gguf_header.read(part if part.is_file() else target, check_size=False)


def _unit_sizes(info: TensorInfo) -> Iterator[int]:
    row_bytes = row_size(info.ggml_type, info.shape[-1])
    return ((stop - start) * row_bytes for start, stop in row_ranges(info.shape, rows_per_unit(info.shape)))
