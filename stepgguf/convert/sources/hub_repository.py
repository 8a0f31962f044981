"""A repository on the Hugging Face Hub as the place of a model, whose weights stay there.

    revision      its commit, asked for once: whatever is pushed meanwhile, all that follows is of this commit
    listing       size, and sha256 (LFS) or git hash, of each file
    small files   *.json, *.jinja and the model card: downloaded by huggingface_hub into its cache
    weights       remote_file.RemoteFile, or LocalFile where the cache holds them; kept_file.KeptFile over it, if kept

Endpoint (HF_ENDPOINT), cache (HF_HOME, HF_HUB_CACHE) and token (HF_TOKEN, `hf auth login`) are huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

from stepgguf import __version__
from stepgguf.convert.sources.attempts import AGAIN, PassingFailure, until_done
from stepgguf.convert.sources.cached_repository import CachedRepository
from stepgguf.convert.sources.hub import HubAddress
from stepgguf.convert.sources.kept_folder import KeptFolder
from stepgguf.convert.sources.listed_file import ListedFile
from stepgguf.convert.sources.place import SHARD, Repository
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.convert.sources.read_ahead import BufferedFile, ReadAhead
from stepgguf.convert.sources.remote_file import RemoteFile, RemoteVersion, asked_pause, describe_failure, is_passing
from stepgguf.errors import HubError

TIMEOUT_SECONDS = 30.0
FIRST_ATTEMPTS = 4  # while somebody looks on; about four seconds
_SMALL_FILES = ("*.json", "*.jinja", "README.md")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
_MAY_READ = "Use the token of somebody who may read it, with the permission to read such repositories (HF_TOKEN)."
T = TypeVar("T")


class HubRepository:
    """A repository at one commit. HubError if there is no such one, or it cannot be reached.

    commit: the hash that the address' revision has now. identity: repository and commit.
    """

    def __init__(self, address: HubAddress) -> None:
        self.path, self._hub_id = address.repository, address.hub_id
        self._api = HfApi(library_name="stepgguf", library_version=__version__)
        self._authorization = build_hf_headers(library_name="stepgguf", library_version=__version__)
        self._stop, self._ahead = Event(), ReadAhead()
        self._kept: KeptFolder | None = None
        self.commit, self._files = self._describe(address.revision)
        self.identity = {f"hf:{self._hub_id}@{self.commit}": self.commit}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @cached_property
    def folder(self) -> Path:
        """The folder of the Hub's cache with the small files, which are downloaded when they are first asked for."""
        names = [name for name in self._files if _is_read(name)]
        if not names:
            raise HubError(f"{self.path} holds no config.json", hint="Give the address of a model in safetensors.")
        return self._download_all(names)[0].parent

    def keep(self, names: Sequence[str], kept: KeptFolder) -> None:
        is_checkpoint = any(name.endswith(SHARD) for name in names)
        beside = [name for name, file in self._files.items() if is_checkpoint and _is_beside_shards(file)]
        kept.begin(self.path, [self._files[name] for name in (*names, *beside)], self._stop)
        self._kept = kept
        for name, source in zip(beside, self._download_all(beside), strict=True):
            kept.copy(self._files[name], source)

    def list_files(self) -> list[Path]:
        return sorted(self.path / name for name in self._files if "/" not in name)

    def open_file(self, path: Path) -> RandomAccessFile:
        file = self._files[str(path.relative_to(self.path))]
        if self._kept is None:
            opened = self._open_unkept(path, file)
        else:
            opened = self._kept.open_file(path, file, partial(self._open_unkept, path, file))
        return opened if isinstance(opened, LocalFile) else BufferedFile(opened, self._ahead)

    def stop_waiting(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self.stop_waiting()
        self._ahead.close()
        if self._kept is not None:
            self._kept.close()

    def _open_unkept(self, path: Path, file: ListedFile) -> RandomAccessFile:
        """The file in the Hub's cache, if somebody has downloaded it, else on the Hub."""
        cached = try_to_load_from_cache(self._hub_id, file.path, revision=self.commit)
        if isinstance(cached, str):
            return LocalFile(path, file.version, stored_at=Path(cached))
        url = hf_hub_url(self._hub_id, file.path, revision=self.commit, endpoint=self._api.endpoint)
        version = RemoteVersion(url, self.commit, file.size, file.digest)
        return RemoteFile(path, version, self._authorization, self._stop)

    def _describe(self, revision: str | None) -> tuple[str, dict[str, ListedFile]]:
        """The commit of a revision, and its files by their paths."""
        ask = partial(
            self._api.model_info, self._hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
        info = self._until_answered(ask)
        assert info.sha is not None
        return info.sha, {file.rfilename: _listed(file) for file in info.siblings or []}

    def _download_all(self, names: Sequence[str]) -> list[Path]:
        """Where huggingface_hub has put these files in its cache."""
        with disable_progress_bars():
            return [Path(self._until_answered(partial(self._download, name))) for name in names]

    def _download(self, name: str) -> str:
        return self._api.hf_hub_download(self._hub_id, name, revision=self.commit)

    def _until_answered(self, ask: Callable[[], T]) -> T:
        """What huggingface_hub answers, asked again where that may help."""

        def ask_once() -> T:
            with _hub_errors(self.path, self._api.endpoint):
                return ask()

        return until_done(ask_once, str(self.path), self._stop, FIRST_ATTEMPTS)


@contextmanager
def _hub_errors(path: Path, endpoint: str) -> Iterator[None]:
    """Turns huggingface_hub's errors into HubError with what to do, or into PassingFailure."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"{path}: HF_HUB_OFFLINE keeps from the network", hint="Unset it, or give a folder.") from error
    except HFValidationError as error:
        raise HubError(f"{path}: {error}", hint="Give the address of a model: hf:ORG/NAME") from error
    except LocalEntryNotFoundError as error:  # after attempts of its own
        raise HubError(f"{path}: {endpoint} could not be reached", hint=AGAIN) from error
    except HfHubHTTPError as error:
        raise _explain_answer(error, path, endpoint) from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
        raise HubError(f"{path}: {endpoint} is no address of a server", hint="Set HF_ENDPOINT, or unset it.") from error
    except httpx2.HTTPError as error:
        raise PassingFailure(f"{endpoint} could not be reached: {describe_failure(error)}") from error
    except ValueError as error:
        raise PassingFailure(f"{endpoint} answered with something else than JSON") from error


def _explain_answer(error: HfHubHTTPError, path: Path, endpoint: str) -> HubError | PassingFailure:
    """What an answer that is an error means."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        page = f"{endpoint}/{str(path).removeprefix('hf:').partition('@')[0]}"
        return HubError(f"{path}: its owner asks for consent", hint=f"Accept its terms at {page}. {_LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{path}: there is no such revision", hint="Give a branch, a tag or a commit, with %2F for a slash in it."
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{path}: there is no such model at {endpoint}, or it is private",
            hint=f"Check its name. If it is private: {_LOG_IN[0].lower()}{_LOG_IN[1:]}",
        )
    if status == 401:
        return HubError(
            f"{path}: {endpoint} does not accept the token that it was given",
            hint="Log in anew with `hf auth login`, or set HF_TOKEN to a token that is valid, or unset it.",
        )
    said = f"{endpoint} answered {status} {error.response.reason_phrase}".rstrip()
    if is_passing(status):
        return PassingFailure(said, asked_pause(error.response.headers))
    return HubError(f"{path}: {said}", hint=_MAY_READ if status == 403 else AGAIN)


def open_repository(address: HubAddress) -> Repository:
    """The repository of an address: on the Hub, or with HF_HUB_OFFLINE as far as its cache holds it."""
    return CachedRepository(address) if is_offline_mode() else HubRepository(address)


def _listed(file: RepoSibling) -> ListedFile:
    digest = file.lfs.sha256 if file.lfs else file.blob_id
    assert file.size is not None  # as files_metadata asks for
    assert digest is not None
    return ListedFile(file.rfilename, file.size, digest, file.lfs is not None)


def _is_beside_shards(file: ListedFile) -> bool:
    """Whether it belongs into a checkpoint's folder, shards aside: what is read, and all that is small."""
    is_other = not file.is_lfs and "/" not in file.path and not file.path.startswith(".")
    return (is_other and not file.path.endswith(SHARD)) or _is_read(file.path)


def _is_read(name: str) -> bool:
    """Whether it is one of the files beside the shards that say what they hold."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _SMALL_FILES)
