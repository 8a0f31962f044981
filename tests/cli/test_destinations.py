"""Where output goes: names of files have their ending, folders have a slash, and slips are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepgguf.cli.destinations import Destination
from stepgguf.cli.main import main
from stepgguf.errors import OutputError

SLIPS = {
    "models": "models.gguf",
    "x.txt": "x.gguf",
    "x.GGUF": "x.gguf",
    "x.ggml": "x.gguf",
    "x.bin": "x.gguf",
    "step-3.5": "step-3.5.gguf",
    "step.q4_k_s": "step.q4_k_s.gguf",
    "x.gguf.part": "x.gguf.gguf",
    "/dev/full": "/dev/full.gguf",
    "x-00001-of-00003.gguf": "x.gguf",
    ".gguf": ".gguf.gguf",
    "": "model.gguf",
}


@pytest.mark.parametrize("given", SLIPS)
def test_a_name_without_the_ending_is_refused_with_the_one_that_was_meant(given: str) -> None:
    with pytest.raises(OutputError) as caught:
        Destination(given).file_path("model-Q4_K_S")
    assert f"Write to {SLIPS[given]}, or into a folder" in (caught.value.hint or "")


def test_folders_give_the_file_a_name(tmp_path: Path) -> None:
    for text in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/new/", f"{tmp_path}/new/deep/", f"{tmp_path}/new/."):
        assert Destination(text).is_folder
        assert Destination(text).file_path("a.b-Q4").name == "a.b-Q4.gguf"
    assert not Destination(f"{tmp_path}/new").is_folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Step/Fun 3.5", "../evil", "/evil"])
def test_a_models_name_does_not_lead_out_of_the_folder(name: str, small: Path, tmp_path: Path) -> None:
    assert main(["convert", str(small), f"{tmp_path}/a/", "-t", "BF16", "-q", "--mtp", "drop", "--name", name]) == 0
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in made} == {tmp_path / "a"}
    assert f"{name.replace('/', '-')}-BF16.gguf" in [path.name for path in made]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_slash_at_the_end_makes_the_folder(command: str, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "models"
    assert main([command, str(small), f"{folder}/", "-t", "BF16", "-q", "--dry-run"]) == 0
    assert not folder.exists()
    assert main([command, str(small), f"{folder}/", "-t", "BF16", "-q"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["small-BF16.gguf", "small-BF16.gguf.manifest.json"]


@pytest.mark.parametrize("command", ["convert", "quantize"])
@pytest.mark.parametrize("name", ["models", "x.txt", "x-00001-of-00003.gguf"])
def test_slips_write_nothing(
    command: str, name: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(small), str(tmp_path / name), "-t", "BF16", "-q"]) == 1
    assert f"Write to {tmp_path / SLIPS[name]}" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def odd(folder: Path) -> dict[str, tuple[str, str]]:
    """Destinations that cannot be, and what is said of them."""
    (folder / "file").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (folder / "nowhere.gguf").symlink_to("missing/x.gguf")
    (folder / "taken.gguf.part").mkdir()
    return {
        "in a file": (f"{folder}/file/x.gguf", "is not a directory"),
        "a folder in a file": (f"{folder}/file/new/", "Not a directory"),
        "in a folder that is not there": (f"{folder}/none/x.gguf", "mkdir -p"),
        "a loop": (f"{folder}/loop.gguf", "loop.gguf is there and not a file"),
        "in a loop": (f"{folder}/loop/x.gguf", "is not a directory"),
        "a folder in a loop": (f"{folder}/loop/", ""),
        "a link to nowhere": (f"{folder}/nowhere.gguf", "nowhere.gguf is there and not a file"),
        "too long": (f"{folder}/{'x' * 300}.gguf", "File name too long"),
        "too long for a manifest": (f"{folder}/{'x' * 240}.gguf", "File name too long"),
        "a folder where the part goes": (f"{folder}/taken.gguf", "Is a directory"),
        "where nobody may write": ("/proc/x.gguf", "/proc/x.gguf"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "in a file", "a folder in a file", "in a folder that is not there", "a loop", "in a loop", "a folder in a loop",
    "a link to nowhere", "too long", "too long for a manifest", "a folder where the part goes",
    "where nobody may write",
])  # fmt: skip
def test_a_place_that_cannot_be_is_an_error_of_ours(
    kind: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dest, text = odd(tmp_path)[kind]
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(small), dest, "-t", "BF16", "-q"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert text in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
