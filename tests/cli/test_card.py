"""stepgguf card on real conversions."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects

from stepgguf.cli.main import main
from stepgguf.convert.manifest import manifest_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, and one in three parts. Read-only."""
    folder = tmp_path_factory.mktemp("converted")
    assert main(["convert", str(small), str(folder / "a b[1].gguf"), "-t", "Q4_K_M", "-q"]) == 0
    assert main(["convert", str(small), str(folder / "s.gguf"), "-t", "Q8_0", "--split-max-size", "5M", "-q"]) == 0
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "files"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_card_is_beside_the_files_and_its_checksums_are_theirs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, part = folder / "a b[1].gguf", folder / "s-00002-of-00003.gguf"
    assert main(["card", str(one), str(part), str(part.with_name("s-00001-of-00003.gguf"))]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    text = (folder / "README.md").read_text()
    assert metadata_load(folder / "README.md") is not None
    lines = text.split("\n```\n")[-2].splitlines()
    assert len(lines) == 4
    tool = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]
    checked = subprocess.run([*tool, "--check"], input="\n".join(lines) + "\n", text=True, cwd=folder, check=True,
                             capture_output=True)  # fmt: skip
    assert checked.stdout.count(": OK\n") == 4
    assert "llama-server -m 'a b[1].gguf' -c 4096" in text
    assert "--include 's-*-of-00003.gguf' --local-dir ." in text
    assert "warning: the files do not say which model on the Hub they are made of" in err
    assert f"wrote {folder / 'README.md'}\n" in err


def test_the_command_that_it_shows_uploads_what_belongs_together(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "notes.txt").write_text("mine")
    page = tmp_path / "card.md"
    paths = [str(folder / "a b[1].gguf"), str(folder / "s-00001-of-00003.gguf")]
    assert main(["card", *paths, "-o", str(page), "--repo", "me/x"]) == 0
    commands = [shlex.split(line) for line in capfd.readouterr().err.splitlines() if line.startswith("  hf upload")]
    assert [command[:5] for command in commands] == [
        ["hf", "upload", "me/x", str(folder), "."],
        ["hf", "upload", "me/x", str(page), "README.md"],
    ]
    patterns = [word for word in commands[0][5:] if word != "--include"]
    names = [path.name for path in folder.iterdir()]
    assert sorted(filter_repo_objects(names, allow_patterns=patterns)) == sorted({*names} - {"notes.txt"})


def test_a_digest_is_kept_in_the_manifest_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    path, template = folder / "a b[1].gguf", tmp_path / "new.jinja"

    def card() -> str:
        assert main(["card", str(path), "-o", f"{tmp_path}/", "--overwrite", "-q"]) == 0
        return (tmp_path / "README.md").read_text()

    def change(**fields: str) -> None:
        manifest_path(path).write_text(json.dumps(json.loads(manifest_path(path).read_text()) | fields))

    assert digest(path) in card()
    change(sha256="5" * 64)
    assert "5" * 64 in card(), "it was computed again"
    assert main(["verify", str(path), "-q"]) == 0
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' }}")
    assert main(["template", str(path), str(template)]) == 0
    assert digest(path) in card(), "it is the old header's"
    change(header_sha256="0", sha256="5" * 64)
    assert digest(path) in card(), "the manifest is of another file"


def test_what_cannot_be_is_refused_before_anything_is_read(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, page = folder / "a b[1].gguf", folder / "README.md"
    page.write_text("mine")
    assert main(["card", str(path)]) == 1
    assert page.read_text() == "mine"
    assert f"error: {page} exists\nhint: " in capfd.readouterr().err
    (folder / "s-00003-of-00003.gguf").unlink()
    assert main(["card", str(path), str(folder / "s-00001-of-00003.gguf"), "--overwrite"]) == 1
    assert "s-00003-of-00003.gguf is missing" in capfd.readouterr().err
    assert main(["card", str(path), "--repo", "no name"]) == 2
    assert page.read_text() == "mine"
    assert "sha256" not in json.loads(manifest_path(path).read_text())


def test_mtp_blocks_alone_are_said_to_be_that(small: Path, tmp_path: Path) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "Q8_0", "--mtp", "separate", "-q"]) == 0
    assert main(["card", str(tmp_path / "mtp-x.gguf"), str(tmp_path / "x.gguf"), "-q"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| machine | x.gguf |" in text
    assert "llama-server -m x.gguf" in text
    assert "- MTP blocks alone" in text
    assert main(["card", str(tmp_path / "mtp-x.gguf"), "-q", "--overwrite"]) == 0
    assert "llama-server" not in (tmp_path / "README.md").read_text()
