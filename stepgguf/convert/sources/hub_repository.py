"""A repository on the Hugging Face Hub as the place of a checkpoint, whose weights stay there.

    revision      its commit, asked for once: whatever is pushed meanwhile, all that follows is of this commit
    listing       size, and sha256 (LFS) or git hash, of each file at the top
    small files   *.json, *.jinja and the model card: downloaded by huggingface_hub into its cache
    shards        remote_file.RemoteFile, or LocalFile where the cache holds them

Endpoint (HF_ENDPOINT), cache (HF_HOME, HF_HUB_CACHE) and token (HF_TOKEN, `hf auth login`) are huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_url
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
from stepgguf.convert.sources.hub import HubAddress
from stepgguf.convert.sources.random_access import LocalFile, RandomAccessFile
from stepgguf.convert.sources.read_ahead import ReadAhead
from stepgguf.convert.sources.remote_file import RemoteFile, RemoteVersion, asked_pause, describe_failure, is_passing
from stepgguf.errors import HubError

TIMEOUT_SECONDS = 30.0
FIRST_ATTEMPTS = 4  # while somebody looks on; about four seconds
_SMALL_FILES = ("*.json", "*.jinja", "README.md")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
T = TypeVar("T")


class HubRepository:
    """A repository at one commit. HubError if there is no such one, or it cannot be reached.

    commit: the hash that the address' revision has now. identity: repository and commit.
    """

    def __init__(self, address: HubAddress) -> None:
        self.path, self._hub_id = address.path, address.hub_id
        self._api = HfApi(library_name="stepgguf", library_version=__version__)
        self._authorization = build_hf_headers(library_name="stepgguf", library_version=__version__)
        self._stop, self._ahead = Event(), ReadAhead()
        self.commit, self._files = self._describe(address.revision)
        self.folder = self._download_small_files()
        self.identity = {f"hf:{self._hub_id}@{self.commit}": self.commit}

    def list_files(self) -> list[Path]:
        return sorted(self.path / name for name in self._files)

    def open_file(self, path: Path) -> RandomAccessFile:
        file = self._files[path.name]
        etag = file.lfs.sha256 if file.lfs else file.blob_id
        assert file.size is not None  # as files_metadata asks for
        assert etag is not None
        url = hf_hub_url(self._hub_id, path.name, revision=self.commit, endpoint=self._api.endpoint)
        version = RemoteVersion(url, self.commit, file.size, etag)
        if (self.folder / path.name).is_file():  # somebody has downloaded it
            return LocalFile(self.folder / path.name, str(version))
        return RemoteFile(path, version, self._authorization, self._ahead, self._stop)

    def stop_waiting(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self.stop_waiting()
        self._ahead.close()

    def _describe(self, revision: str | None) -> tuple[str, dict[str, RepoSibling]]:
        """The commit of a revision, and the files at its top by their names."""
        ask = partial(
            self._api.model_info, self._hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
        info = self._until_answered(ask)
        assert info.sha is not None
        return info.sha, {file.rfilename: file for file in info.siblings or [] if "/" not in file.rfilename}

    def _download_small_files(self) -> Path:
        """The folder of the Hub's cache that holds them."""
        names = [name for name in self._files if any(fnmatch(name, pattern) for pattern in _SMALL_FILES)]
        if not names:
            raise HubError(f"{self.path} holds no config.json", hint="Give the address of a model in safetensors.")
        with disable_progress_bars():
            paths = [self._until_answered(partial(self._download, name)) for name in names]
        return Path(paths[0]).parent

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
        return HubError(f"{path}: there is no such revision", hint="Give a branch, a tag or a commit.")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"{path}: there is no such model at {endpoint}, or it is private", hint=_LOG_IN)
    said = f"{endpoint} answered {status} {error.response.reason_phrase}".rstrip()
    if is_passing(status):
        return PassingFailure(said, asked_pause(error.response.headers))
    return HubError(f"{path}: {said}", hint=_LOG_IN if status in (401, 403) else AGAIN)
