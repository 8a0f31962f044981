"""A Hub on the loopback for those who read from it, and a disk that is soon full."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import pytest

from stepgguf.convert.sources import attempts, remote_file
from tests.convert.hub_server import Hub, serving, set_endpoint


@pytest.fixture(scope="module")
def repository(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a model card."""
    folder = tmp_path_factory.mktemp("repository") / "files"
    shutil.copytree(small, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub for this process, with an empty cache, no token, and a client that is soon out of patience."""
    with serving(Hub(repository)) as hub:
        set_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(attempts, "LONGEST_PAUSE", 0.05)
        monkeypatch.setattr(remote_file, "TIMEOUT", httpx2.Timeout(0.4, pool=None))
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
