"""A GGUF in several files: which files belong together, given any of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from gguf import Keys

from stepgguf.convert.sources.hub import hub_address, hub_id, snapshot_folder
from stepgguf.errors import BadMetadata, GGUFError, MissingShard
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Header
from stepgguf.files.jsonread import shown

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def split_files(path: Path) -> list[Path]:
    """The files of the GGUF that a path means, in order: of a split one all of them, whichever is given.

    GGUFError for what cannot be one, MissingShard if a part is not there. What is in the files is not looked at.
    """
    if (address := hub_address(path)) is not None:
        raise GGUFError(
            f"{path} is on the Hub, and the file must be on this disk for this",
            hint=f"Download it first: {address.download_command}",
        )
    if path.is_dir():
        folder = snapshot_folder(path)
        inside = sorted([*folder.glob("*.gguf"), *folder.glob("*/*.gguf")])
        hint = "Give a file that `stepgguf convert` wrote, or another GGUF file."
        if inside:
            hint = f"Give a file in it: {inside[0]}"
        elif (path / "config.json").exists():
            hint = f"Convert it first: stepgguf convert {quote(str(path))} DEST.gguf --type Q4_K_S"
        raise GGUFError(f"{path} is a directory and not a GGUF file", hint=hint)
    if not path.exists() and (model := hub_id(path)) is not None:
        hint = (
            f"Give hf:{model} to read it from there, or download it first: hf download {model} --include '*.gguf' "
            f"--local-dir {model.split('/')[1]}"
        )
        raise GGUFError(f"{path}: there is no such file; it looks like a model on the Hugging Face Hub", hint=hint)
    return files_beside(path, Path.exists)


def files_beside(path: Path, exists: Callable[[Path], bool]) -> list[Path]:
    """All files of the GGUF that a file's name says it is of, in order. MissingShard if one does not exist."""
    match = _NAME.fullmatch(path.name)
    if match is None:  # whole, or a part under another name: then its header says so, in check_parts
        return [path]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise BadMetadata(f"{path}: its name says part {number} of {count}", hint="Give the file its right name.")
    files = []
    for i in range(count):
        file = split_path(path.with_name(match[1] + ".gguf"), i, count)
        files.append(file)
        if not exists(file):
            raise MissingShard(
                f"{file} is missing ({path.name} is one of {count} parts)",
                hint="All parts must lie in one directory under the names that they were made with.",
            )
    return files


def model_stem(path: Path) -> str:
    """A GGUF's file name without ".gguf" and the number of its part."""
    match = _NAME.fullmatch(path.name)
    return match[1] if match else path.stem


def first_file(path: Path) -> Path:
    """The name of the first file of a GGUF: of a split one that of part 1, of a whole one its own."""
    match = _NAME.fullmatch(path.name)
    return split_path(path.with_name(f"{match[1]}.gguf"), 0, int(match[3])) if match else path


def split_path(path: Path, index: int, count: int) -> Path:
    """llama.cpp's name of split `index` (from 0) of `count`."""
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}.gguf")


def read_headers(path: Path) -> list[Header]:
    """The headers of all files of a GGUF, which must be parts of one model. Raises GGUFError, MissingShard."""
    return check_parts([gguf_header.read(file) for file in split_files(path)])


def check_parts(headers: list[Header]) -> list[Header]:
    """The headers of a GGUF's files, which must be parts of one model. BadMetadata if they are not."""
    names: set[str] = set()
    for i, header in enumerate(headers):
        number = header.get(Keys.Split.LLM_KV_SPLIT_NO, i)
        count = header.get(Keys.Split.LLM_KV_SPLIT_COUNT) or len(headers)  # 0: it is whole
        if (number, count) != (i, len(headers)):
            raise BadMetadata(
                f"{header.path} is part {i + 1} of {len(headers)} by its name, but its header has split.no "
                f"{shown(number)} (from 0) and split.count {shown(count)}",
                hint="Give the parts the names that they were made with: NAME-00001-of-00003.gguf.",
            )
        repeated = names.intersection(tensor.name for tensor in header.tensors)
        if repeated:
            raise BadMetadata(
                f"{header.path}: tensor {min(repeated)} is in an earlier part too",
                hint="The parts are of different models.",
            )
        names.update(tensor.name for tensor in header.tensors)
    promised = headers[0].get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if promised is not None and promised != len(names):
        raise BadMetadata(
            f"{headers[0].path}: {Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT} is {promised}, the files hold {len(names)} "
            "tensors",
            hint="The parts are of different models, or one is damaged.",
        )
    return headers
