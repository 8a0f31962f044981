"""Where a checkpoint lies and what it is called: folders, the Hugging Face Hub's cache, Hub ids.

models--ORG--NAME/            the Hub's cache folder of a model: its snapshot is used, the one of refs/main first
    refs/main                     the commit's hash
    snapshots/HASH/               the files, links into blobs/
    blobs/SHA256[.incomplete]
ORG/NAME                      a Hub id, where no such folder is: its cache folder, if it was downloaded
hf:ORG/NAME[@REVISION]        a repository on the Hub, whose weights stay there (hub_repository.py)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from stepgguf.errors import CheckpointError, UnsupportedCheckpoint

HUB = "https://huggingface.co"
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
_ADDRESS = re.compile(r"hf:/?([^/@]+/[^/@]+)(?:@(.+))?")  # Path makes one slash of the two of hf://
_GIVE_FOLDER = "Give the directory that holds config.json and the *.safetensors."
_PARTS = ("config.json", ".safetensors", ".safetensors.index.json")  # ends of the names of a checkpoint's own files


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """What a checkpoint's path says about it: the name of the model, and whose it is on the Hub."""

    name: str
    organization: str | None = None

    @property
    def hub_id(self) -> str | None:
        """ORG/NAME; None where the path does not say whose it is."""
        return f"{self.organization}/{self.name}" if self.organization else None


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository on the Hub, ORG/NAME, at a branch, a tag or a commit; None: its main branch."""

    hub_id: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The address as it is written on a command line."""
        return Path(f"hf:{self.hub_id}" + (f"@{self.revision}" if self.revision else ""))


def hub_address(path: Path) -> HubAddress | None:
    """The address that begins with hf:, None for any other path. CheckpointError for one that names no repository."""
    if not is_hub_address(path):
        return None
    match = _ADDRESS.fullmatch(str(path))
    if match is None or not is_hub_id(match[1]):
        raise CheckpointError(
            f"{path}: not the address of a model on the Hugging Face Hub",
            hint="Write hf:ORG/NAME or hf:ORG/NAME@REVISION, such as hf:stepfun-ai/Step-3.5-Flash",
        )
    return HubAddress(match[1], match[2])


def is_hub_address(path: Path) -> bool:
    """Whether a path is meant as an address on the Hub."""
    return str(path).startswith("hf:")


def model_origin(folder: Path) -> ModelOrigin:
    """Where a checkpoint's folder says it comes from: of a snapshot its cache folder's name says it, else its own."""
    resolved = folder.resolve()
    cached = _CACHE_FOLDER.fullmatch(resolved.parent.parent.name) if resolved.parent.name == "snapshots" else None
    return ModelOrigin(cached[2], cached[1]) if cached else ModelOrigin(resolved.name)


def checkpoint_folder(path: Path) -> Path:
    """The folder with config.json that a user means: also by one of its files, its cache folder or its Hub id.

    CheckpointError if there is nothing, UnsupportedCheckpoint for a file that is no part of a checkpoint.
    """
    try:
        return _find_folder(path)
    except OSError as error:  # a name that is too long, a directory that may not be entered
        raise CheckpointError(f"{path}: {error.strerror}", hint=_GIVE_FOLDER) from error


def is_part(path: Path) -> bool:
    """Whether a file's name is that of a checkpoint's own file."""
    return path.name.endswith(_PARTS)


def _find_folder(path: Path) -> Path:
    """checkpoint_folder, but for what the operating system refuses."""
    if path.is_file():
        if is_part(path):
            return path.parent
        if path.suffix.lower() == ".gguf":
            hint = (
                f"It is converted already; to quantize it: stepgguf quantize {quote(str(path))} DEST.gguf --type Q4_K_S"
            )
            raise UnsupportedCheckpoint(f"{path} is a GGUF file and no checkpoint", hint=hint)
        raise UnsupportedCheckpoint(f"{path} is a file and not a checkpoint's directory", hint=_GIVE_FOLDER)
    if path.is_dir():
        return snapshot_folder(path)
    if path.exists():
        raise CheckpointError(f"{path}: neither a file nor a directory", hint=_GIVE_FOLDER)
    found = hub_id(path)
    if found is None:
        raise CheckpointError(f"{path}: no such file or directory", hint=_GIVE_FOLDER)
    cached = _hub_cache() / f"models--{found.replace('/', '--')}"
    if cached.is_dir():
        return snapshot_folder(cached)
    raise CheckpointError(
        f"{path}: there is no such directory; it looks like a model on the Hugging Face Hub",
        hint=f"Give hf:{found} to read it from there, or download it first: hf download {found} --local-dir "
        f"{found.split('/')[1]}",
    )


def hub_id(path: Path) -> str | None:
    """The Hub id that a path or an address may be meant as: two words, and no folder of the first."""
    parts = path.parts[2:4] if path.parts[:2] == ("https:", "huggingface.co") else path.parts
    name = "/".join(parts)
    return name if is_hub_id(name) and not Path(parts[0]).exists() else None


def is_hub_id(text: str) -> bool:
    """Whether a text is ORG/NAME."""
    words = text.split("/")
    return len(words) == 2 and all(_WORD.fullmatch(word) for word in words)


def unfinished_downloads(folder: Path) -> list[Path]:
    """What downloads into a folder have left half done: the Hub's, aria2's and browsers'. Not a GGUF in the making."""
    blobs = folder.resolve().parent.parent / "blobs" if folder.resolve().parent.name == "snapshots" else None
    places = [folder, folder / ".cache" / "huggingface" / "download", *([blobs] if blobs else [])]
    ends = (".incomplete", ".aria2", ".safetensors.part", ".crdownload", ".download")
    return sorted(f for place in places if place.is_dir() for f in place.iterdir() if f.name.endswith(ends))


def snapshot_folder(folder: Path) -> Path:
    """The snapshot of a cache folder; any other folder itself."""
    if folder.name == "snapshots" and _CACHE_FOLDER.fullmatch(folder.resolve().parent.name):
        folder = folder.parent
    if not _CACHE_FOLDER.fullmatch(folder.resolve().name) or (folder / "config.json").exists():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        # What is in the file may be anything: only a hash whose folder is there is a path.
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{7,64}", commit) and (folder / "snapshots" / commit).is_dir():
            return folder / "snapshots" / commit
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    if not snapshots:
        raise CheckpointError(
            f"{folder} is a cache folder of the Hugging Face Hub without a snapshot: nothing was downloaded into it",
            hint=f"Download the model: hf download {'/'.join(folder.resolve().name.split('--')[1:])}",
        )
    # Of several revisions without refs/main, as `hf download --revision` leaves them, the newest.
    return max(snapshots, key=lambda path: path.stat().st_mtime)


def _hub_cache() -> Path:
    """The Hub's cache, where huggingface_hub looks for it."""
    for name, inside in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / inside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"
