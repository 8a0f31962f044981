"""Where a model lies and what it is called: folders, the Hugging Face Hub's cache, Hub ids, addresses on the Hub.

models--ORG--NAME/            the Hub's cache folder of a model: its snapshot is used, the one of refs/main first
    refs/main                     the commit's hash
    snapshots/HASH/               the files, links into blobs/
    blobs/SHA256[.incomplete]
ORG/NAME                      a Hub id, where no such folder is: its cache folder, if it was downloaded

hf:ORG/NAME[@REVISION][/FILE]                       a repository on the Hub, which stays there (hub_repository.py)
https://huggingface.co/ORG/NAME[/tree/REVISION]     the same, as a browser shows it
https://huggingface.co/ORG/NAME/blob/REVISION/FILE

An address is written as huggingface_hub writes it (hf://ORG/NAME@REVISION/FILE). FILE is a GGUF, of a split one any
part, or a folder with one. Without FILE it is the checkpoint at the repository's top, or the only GGUF in it. A branch
whose name has a slash is written with %2F; refs/pr/N may stay as it is.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from stepgguf.errors import CheckpointError, HubError, UnsupportedCheckpoint

HUB = "https://huggingface.co"
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
# Path makes one slash of the two of hf:// and https://.
_ADDRESS = re.compile(r"hf:/*([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?")
_PAGE = re.compile(r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+")
_PAGE_PATH = re.compile(r"([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/(refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(.+))?)?/?")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
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
    """What lies in a repository on the Hub, ORG/NAME, at a branch, a tag or a commit.

    revision None: its main branch. file: a file or a folder in it; None: what is at its top.
    """

    hub_id: str
    revision: str | None = None
    file: str | None = None

    @property
    def repository(self) -> Path:
        """The address of the whole repository, as it is written on a command line."""
        return Path(f"hf:{self.hub_id}" + (f"@{self._spelled_revision}" if self.revision else ""))

    @property
    def path(self) -> Path:
        """The address as it is written on a command line."""
        return self.repository / self.file if self.file else self.repository

    @property
    def download_command(self) -> str:
        """The command that downloads the GGUF, all parts of a split one."""
        file = self.file or "*.gguf"
        pattern = _SPLIT.sub("-*.gguf", file) if file.endswith(".gguf") else f"{file}/*"
        words = ["hf", "download", self.hub_id, "--include", pattern]
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join([*words, "--local-dir", self.hub_id.split("/")[1]])

    @property
    def _spelled_revision(self) -> str:
        revision = self.revision or ""
        return revision if revision.startswith("refs/") else revision.replace("/", "%2F")


def hub_address(path: Path) -> HubAddress | None:
    """The address on the Hub that is written as hf:... or as its page's; None for any other path.

    CheckpointError for one that names no repository.
    """
    text = str(path)
    if page := _PAGE.match(text):
        match = _PAGE_PATH.fullmatch(re.sub(r"[?#].*", "", text[page.end() :]))
    elif text.startswith("hf:"):
        match = _ADDRESS.fullmatch(text)
    else:
        return None
    if match is None or not is_hub_id(match[1]):
        raise CheckpointError(
            f"{path}: not the address of a model on the Hugging Face Hub",
            hint="Write hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME/FILE.gguf, such as "
            "hf:stepfun-ai/Step-3.5-Flash",
        )
    return HubAddress(match[1], unquote(match[2]) if match[2] else None, match[3])


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
            command = f"stepgguf quantize {shlex.quote(str(path))} DEST.gguf --type Q4_K_S"
            hint = f"It is converted already; to quantize it: {command}"
            raise UnsupportedCheckpoint(f"{path} is a GGUF file and no checkpoint", hint=hint)
        raise UnsupportedCheckpoint(f"{path} is a file and not a checkpoint's directory", hint=_GIVE_FOLDER)
    if path.is_dir():
        return snapshot_folder(path)
    if path.exists():
        raise CheckpointError(f"{path}: neither a file nor a directory", hint=_GIVE_FOLDER)
    found = hub_id(path)
    if found is None:
        raise CheckpointError(f"{path}: no such file or directory", hint=_GIVE_FOLDER)
    cached = _cache_folder(found)
    if cached.is_dir():
        return snapshot_folder(cached)
    raise CheckpointError(
        f"{path}: there is no such directory; it looks like a model on the Hugging Face Hub",
        hint=f"Give hf:{found} to read it from there, or download it first: hf download {found} --local-dir "
        f"{found.split('/')[1]}",
    )


def hub_id(path: Path) -> str | None:
    """The Hub id that a path may be meant as: two words, and no folder of the first."""
    name = "/".join(path.parts)
    return name if is_hub_id(name) and not Path(path.parts[0]).exists() else None


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
    if (main := _snapshot_of(folder, "main")) is not None:
        return main
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if not snapshots:
        raise CheckpointError(
            f"{folder} is a cache folder of the Hugging Face Hub without a snapshot: nothing was downloaded into it",
            hint=f"Download the model: hf download {'/'.join(folder.resolve().name.split('--')[1:])}",
        )
    if len(snapshots) > 1:  # as `hf download --revision` leaves them
        raise CheckpointError(
            f"{folder} holds {len(snapshots)} snapshots, and refs/main names none of them",
            hint=f"Give the one that is meant: {' or '.join(map(str, snapshots))}",
        )
    return snapshots[0]


def cached_snapshot(address: HubAddress) -> Path:
    """The folder in the Hub's cache that holds an address' repository. HubError if nothing of it was downloaded."""
    folder = _cache_folder(address.hub_id)
    if folder.is_dir():
        found = snapshot_folder(folder) if address.revision is None else _snapshot_of(folder, address.revision)
        if found is not None:
            return found
    raise HubError(
        f"{address.repository}: HF_HUB_OFFLINE keeps from the network, and {folder} does not hold it",
        hint="Unset HF_HUB_OFFLINE to read it from the Hub, or give a folder.",
    )


def _snapshot_of(folder: Path, revision: str) -> Path | None:
    """The snapshot of a cache folder that a branch, a tag or a commit means; None if it was not downloaded."""
    ref = folder / "refs" / revision
    # What is in the file may be anything: only a hash whose folder is there is a path.
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-f]{7,64}", commit) and snapshot.is_dir() else None


def _cache_folder(hub_id: str) -> Path:
    return _hub_cache() / f"models--{hub_id.replace('/', '--')}"


def _hub_cache() -> Path:
    """The Hub's cache, where huggingface_hub looks for it."""
    for name, inside in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / inside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"
