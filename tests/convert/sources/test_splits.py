"""Split GGUFs: any part stands for all, and parts that do not belong together are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest

from stepgguf.cli.main import main
from stepgguf.convert import metadata
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.splits import model_stem, read_headers, split_files
from stepgguf.errors import BadMetadata, GGUFError, MissingShard
from stepgguf.files import gguf_header
from tests.convert.test_bytes import same_tensors


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A model in parts; one more, without tensors, goes before them, as `llama-gguf-split --no-tensor-first-split` has
    it."""
    folder = tmp_path_factory.mktemp("split")
    options = ["-t", "BF16", "--mtp", "drop", "--split-max-size", "3M", "-q"]
    assert main(["convert", str(small), str(folder / "whole.gguf"), *options]) == 0
    assert main(["convert", str(small), str(folder / "x.gguf"), *options[:4], "-q"]) == 0
    parts = sorted(folder.glob("whole-*.gguf"))
    first, n = gguf_header.read(parts[0]), len(parts) + 1
    total = first.get("split.tensors.count")
    for i, part in enumerate([None, *parts]):
        header = gguf_header.read(part) if part else first
        keys = [key for name, key in header.keys.items() if not name.startswith("split.")]
        keys = (keys if i == 0 else keys[:1]) + metadata.split_keys(i, n, total)
        data = part.read_bytes()[header.data_start :] if part else b""
        head = gguf_header.encode(keys, header.tensors if part else [])
        (folder / f"first-{i + 1:05d}-of-{n:05d}.gguf").write_bytes(head + data)
    return tuple(sorted(folder.glob("first-*.gguf")))


def test_a_first_part_without_tensors_is_what_gguf_py_reads_too(made: tuple[Path, ...]) -> None:
    assert not gguf.GGUFReader(made[0]).tensors
    assert gguf_header.read(made[0]).tensors == ()


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1, -1])
def test_any_part_stands_for_all_in_every_command(
    made: tuple[Path, ...], part: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = str(made[part])
    assert main(["quantize", given, str(tmp_path / "q.gguf"), "-t", "Q8_0", "-q"]) == 0
    assert main(["quantize", str(made[0].parent / "x.gguf"), str(tmp_path / "r.gguf"), "-t", "Q8_0", "-q"]) == 0
    same_tensors(tmp_path / "q.gguf", tmp_path / "r.gguf")
    assert gguf_header.read(tmp_path / "q.gguf").get("stepgguf.source") == made[0].name
    capfd.readouterr()
    assert main(["inspect", given]) == 0
    assert "5 layers and no MTP blocks" in capfd.readouterr().out
    assert main(["template", given]) == 0
    assert "im_start" in capfd.readouterr().out
    assert main(["plan", given, "--machine", "spark"]) == 0
    assert main(["doctor", given]) in (0, 1)
    assert "first-0000" in capfd.readouterr().out
    assert main(["verify", given, "--against", str(made[0].parent / "x.gguf"), "-q"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 2])
def test_a_split_model_answers_whichever_part_is_given(
    demo_gguf: Path, tmp_path: Path, part: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    options = ["-t", "BF16", "--split-max-size", "2M", "-q"]
    assert main(["quantize", str(demo_gguf), str(tmp_path / "demo.gguf"), *options]) == 0
    parts = sorted(tmp_path.glob("demo-*.gguf"))
    assert main(["chat", str(parts[part]), "-p", "What is 2 + 3?", "--temperature", "0", "--ctx", "512", "-q"]) == 0
    assert "5" in capfd.readouterr().out


def test_a_link_into_the_hubs_blobs_keeps_its_own_name(made: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "step.gguf").symlink_to(made[0].parent / "x.gguf")
    with GGUFSource(tmp_path / "step.gguf") as source:
        assert source.name == "step"


def test_the_name_of_what_is_made_of_a_part_has_no_number(made: tuple[Path, ...], tmp_path: Path) -> None:
    assert main(["quantize", str(made[1]), str(tmp_path), "-t", "Q8_0", "-q"]) == 0
    assert (tmp_path / "first-Q8_0.gguf").exists()
    assert model_stem(Path("a-b.gguf")) == "a-b"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x-00001-of-00000.gguf", "its name says part 1 of 0"),
        ("x-00000-of-00002.gguf", "its name says part 0 of 2"),
        ("x-00003-of-00002.gguf", "its name says part 3 of 2"),
    ],
)
def test_a_name_that_cannot_be_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadMetadata, match=text):
        split_files(tmp_path / name)


def test_a_missing_part_is_named(made: tuple[Path, ...], tmp_path: Path) -> None:
    shutil.copy(made[1], tmp_path)
    with pytest.raises(MissingShard, match=r"first-00001-of-\d+\.gguf is missing"):
        split_files(tmp_path / made[1].name)
    with pytest.raises(MissingShard, match=r"y-00001-of-99999\.gguf is missing"):
        split_files(tmp_path / "y-99999-of-99999.gguf")


def test_parts_under_others_names_are_named(made: tuple[Path, ...], tmp_path: Path) -> None:
    for i, part in enumerate(reversed(made)):
        shutil.copy(part, tmp_path / made[i].name)
    with pytest.raises(BadMetadata, match=r"is part 1 of 7 by its name, but its header has split\.no 6"):
        read_headers(tmp_path / made[0].name)
    shutil.copy(made[2], tmp_path / "alone.gguf")
    with pytest.raises(
        BadMetadata, match=r"is part 1 of 1 by its name, but .* split\.no 2 \(from 0\) and split\.count 7"
    ):
        read_headers(tmp_path / "alone.gguf")


def test_a_tensor_in_two_parts_is_named(made: tuple[Path, ...], tmp_path: Path) -> None:
    for part in made:
        shutil.copy(part, tmp_path)
    header = gguf_header.read(made[1])
    keys = dict(gguf_header.read(made[2]).keys)
    data = made[1].read_bytes()[header.data_start :]
    (tmp_path / made[2].name).write_bytes(gguf_header.encode(keys.values(), header.tensors) + data)
    with pytest.raises(BadMetadata, match=r"00003-of-00007\.gguf: tensor .* is in an earlier part too"):
        read_headers(tmp_path / made[2].name)


def test_a_part_that_holds_less_than_promised_is_named(made: tuple[Path, ...], tmp_path: Path) -> None:
    for part in made:
        shutil.copy(part, tmp_path)
    (tmp_path / made[-1].name).write_bytes(gguf_header.encode(gguf_header.read(made[-1]).keys.values(), []))
    with pytest.raises(BadMetadata, match=r"split\.tensors\.count is \d+, the files hold \d+ tensors"):
        read_headers(tmp_path / made[0].name)


def test_a_folder_and_a_hub_id_are_named(
    made: tuple[Path, ...], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GGUFError, match="is a directory and not a GGUF file") as caught:
        split_files(made[0].parent)
    assert made[0].name in (caught.value.hint or "")
    cached = tmp_path / "models--a--b-GGUF" / "snapshots" / ("0" * 40) / "Q8_0"
    cached.mkdir(parents=True)
    (cached / "b.gguf").touch()
    with pytest.raises(GGUFError, match="is a directory and not a GGUF file") as caught:
        split_files(tmp_path / "models--a--b-GGUF")
    assert str(cached / "b.gguf") in (caught.value.hint or "")
    with pytest.raises(GGUFError, match="is a directory and not a GGUF file") as caught:
        split_files(small)
    assert f"stepgguf convert {small}" in (caught.value.hint or "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GGUFError, match="looks like a model on the Hugging Face Hub") as caught:
        split_files(Path("stepfun-ai/Step-3.5-Flash-GGUF"))
    assert "hf download stepfun-ai/Step-3.5-Flash-GGUF" in (caught.value.hint or "")
