"""The Hub's cache: its snapshot is used, with the model's name and not a commit's hash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepgguf.cli.main import main
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.hub import ModelOrigin, checkpoint_folder, hub_id, model_origin
from stepgguf.errors import CheckpointError, MissingShard
from stepgguf.files import gguf_header

pytestmark = pytest.mark.slow

OLD, NEW = "0" * 40, "1f" * 20


@pytest.fixture
def cached(small: Path, tmp_path: Path) -> Path:
    """The cache folder of a model as huggingface_hub lays it out: links into blobs/, and refs/main."""
    folder = tmp_path / "hub" / "models--stepfun-ai--Step-3.5-Flash"
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots" / NEW).mkdir(parents=True)
    for file in small.iterdir():
        blob = folder / "blobs" / f"blob-of-{file.name}"
        blob.write_bytes(file.read_bytes())
        (folder / "snapshots" / NEW / file.name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    return folder


def later(folder: Path) -> Path:
    """Another snapshot, made after the one of refs/main."""
    (folder / "snapshots" / OLD).mkdir()
    os.utime(folder / "snapshots" / OLD, (4e9, 4e9))
    return folder


@pytest.mark.parametrize("inside", ["", "snapshots", f"snapshots/{NEW}", f"snapshots/{NEW}/config.json"])
def test_the_snapshot_of_main_is_used_whatever_of_the_folder_is_given(
    cached: Path, inside: str, capfd: pytest.CaptureFixture[str]
) -> None:
    later(cached)
    dest = cached.parent / "models"
    dest.mkdir()
    assert main(["convert", str(cached / inside), str(dest), "-t", "Q8_0", "-q"]) == 0
    header = gguf_header.read(dest / "Step-3.5-Flash-Q8_0.gguf")
    assert header.get("general.name") == "Step-3.5-Flash"
    assert header.get("general.organization") == "Stepfun Ai"
    assert header.get("general.repo_url") == "https://huggingface.co/stepfun-ai/Step-3.5-Flash"
    assert header.get("stepgguf.source").startswith("Step-3.5-Flash (")


def test_without_refs_the_only_snapshot_is_used_and_of_several_none(cached: Path) -> None:
    (cached / "refs" / "main").unlink()
    assert checkpoint_folder(cached).name == NEW
    with pytest.raises(CheckpointError, match="holds 2 snapshots, and refs/main names none of them") as caught:
        checkpoint_folder(later(cached))
    assert f"{cached}/snapshots/{OLD} or {cached}/snapshots/{NEW}" in (caught.value.hint or "")


@pytest.mark.parametrize("commit", ["../../..", "", "x" * 5000, OLD])
def test_a_ref_that_names_no_snapshot_is_passed_over(cached: Path, commit: str) -> None:
    (cached / "refs" / "main").write_text(commit)
    assert checkpoint_folder(cached).name == NEW


def test_a_cache_folder_without_snapshots_says_what_to_download(tmp_path: Path) -> None:
    folder = tmp_path / "models--stepfun-ai--Step-3.5-Flash"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="nothing was downloaded into it") as caught:
        checkpoint_folder(folder)
    assert "hf download stepfun-ai/Step-3.5-Flash" in (caught.value.hint or "")


def test_a_download_that_stopped_is_named_with_the_models_id(cached: Path) -> None:
    shard = cached / "blobs" / "blob-of-model-00002.safetensors"
    shard.rename(shard.with_name("1a2b.incomplete"))
    (cached / "snapshots" / NEW / "model-00002.safetensors").unlink()
    with pytest.raises(MissingShard, match=r"has not finished \(1a2b\.incomplete\)") as caught:
        Checkpoint(cached)
    assert "hf download stepfun-ai/Step-3.5-Flash (" in (caught.value.hint or "")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_a_hub_id_is_the_model_in_the_cache(
    cached: Path, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(cached.parent if variable == "HF_HUB_CACHE" else tmp_path))
    with Checkpoint(Path("stepfun-ai/Step-3.5-Flash")) as checkpoint:
        assert checkpoint.path.name == NEW
        assert checkpoint.name == "Step-3.5-Flash"
    with pytest.raises(CheckpointError, match="looks like a model on the Hugging Face Hub") as caught:
        Checkpoint(Path("stepfun-ai/Step-3.7-Flash"))
    assert caught.value.hint == (
        "Give hf:stepfun-ai/Step-3.7-Flash to read it from there, or download it first: "
        "hf download stepfun-ai/Step-3.7-Flash --local-dir Step-3.7-Flash"
    )


def test_what_can_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert hub_id(Path("stepfun-ai/Step-3.5-Flash")) == "stepfun-ai/Step-3.5-Flash"
    for text in ("models/step", "step", "/stepfun-ai/Step", "a/b/c", "../x", "./x", "a b/c"):
        assert hub_id(Path(text)) is None


def test_other_folders_have_their_own_names(tmp_path: Path) -> None:
    for name in ("Step-3.5-Flash", "snapshots", "models--a--b"):
        (tmp_path / name).mkdir()
        assert model_origin(tmp_path / name) == ModelOrigin(name)
