"""What lies in a folder, and what belongs together, of real conversions that are finished, cut off or running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepgguf.calibration.work_folder import work_folder
from stepgguf.cli.main import main
from stepgguf.convert.journal import RECORD_BYTES
from stepgguf.convert.local_models import LocalModel, belongings, find_model, find_models, holding
from stepgguf.convert.manifest import manifest_path
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.writer import Writer
from stepgguf.errors import OutputError
from stepgguf.files import disk
from tests.cli.test_inspect import write as write_foreign
from tests.convert.test_resume import interrupted, plan_for

pytestmark = pytest.mark.slow
PARTS = 5_000_000  # bytes of a part: two of them


@contextmanager
def running(small: Path, dest: Path, **options: object) -> Iterator[Writer]:
    """A conversion in this process, in the middle of its work."""
    with (
        Checkpoint(small) as checkpoint,
        Writer(plan_for(checkpoint, dest, **options), checkpoint.identity()) as writer,
    ):
        yield writer


def interrupt(small: Path, dest: Path, n_units: int, **options: object) -> None:
    with Checkpoint(small) as checkpoint:
        interrupted(checkpoint, dest, n_units, **options)


def names(models: list[LocalModel]) -> list[str]:
    return [model.path.name for model in models]


def test_the_share_of_an_interrupted_run_is_that_of_the_bytes_it_has_made(small: Path, tmp_path: Path) -> None:
    for dest, options in ((tmp_path / "a.gguf", {}), (tmp_path / "b.gguf", {"split_max_size": PARTS})):
        interrupt(small, dest, 60, **options)
    whole, split = find_models(tmp_path)
    assert [whole.path.name, split.path.name] == ["a.gguf", "b-00001-of-00002.gguf"]
    for model, options in ((whole, {}), (split, {"split_max_size": PARTS})):
        dest = tmp_path / f"{model.path.name[0]}.gguf"
        with running(small, dest, **options) as writer:
            sizes = [
                (unit.stop - unit.start) * writer.plan.files[unit.file].tensors[unit.tensor].row_bytes
                for unit in writer.units
            ]
            made = sum(sizes[number] for number in writer.finished)
            assert model.run is not None
            assert model.run.share == pytest.approx(made / writer.plan.n_bytes)
            assert 0.1 < model.run.share < 0.9
        assert (model.is_ours, model.type, model.files, model.is_in_use) == (True, "Q4_K_M", (), False)
        assert model.working_bytes >= made


def test_a_journal_is_read_up_to_what_a_kill_has_cut_off(small: Path, tmp_path: Path) -> None:
    interrupt(small, tmp_path / "a.gguf", 60)
    journal = tmp_path / "a.gguf.journal"
    (before,) = find_models(tmp_path)
    journal.write_bytes(journal.read_bytes()[: -RECORD_BYTES - 1])
    (after,) = find_models(tmp_path)
    assert before.run is not None
    assert after.run is not None
    assert 0 < after.run.share < before.run.share
    (tmp_path / "a.gguf.part").write_bytes(b"")
    assert (found := find_models(tmp_path)[0].run) is not None
    assert found.share == 0


@pytest.mark.parametrize(
    "label",
    [{}, [], {"files": "a.gguf"}, {"files": ["../../b.gguf"], "type": "x"}, {"files": ["b.gguf"], "type": "x"},
     {"files": ["a.gguf", "../mine.gguf"], "type": "x"}, {"files": ["a.gguf"]}],
)  # fmt: skip
def test_what_is_no_journal_of_this_name_is_none(tmp_path: Path, label: object) -> None:
    (tmp_path / "a.gguf.journal").write_text(json.dumps(label) + "\n")
    (tmp_path / "a.gguf.part").write_text("half a download")
    assert find_models(tmp_path) == []


def test_what_belongs_to_a_run_of_two_files(small: Path, tmp_path: Path) -> None:
    dest = tmp_path / "a.gguf"
    assert main(["convert", str(small), str(dest), "-t", "Q8_0", "--mtp", "separate", "-q"]) == 0
    assert names(find_models(tmp_path)) == ["a.gguf", "mtp-a.gguf"]
    with running(small, tmp_path / "b.gguf", mtp="separate"):
        model = find_model(tmp_path / "b.gguf")
        assert [path.name for path in belongings(model)] == ["b.gguf.part", "mtp-b.gguf.part", "b.gguf.journal"]
        assert model.is_in_use
        with pytest.raises(OutputError, match=r"b\.gguf is in use"), holding(model):
            pass


def test_a_calibration_belongs_to_the_run_of_its_name(small: Path, tmp_path: Path) -> None:
    interrupt(small, tmp_path / "a.gguf", 60, split_max_size=PARTS)
    for name in ("a", "b", "mine"):
        (tmp_path / f"{name}.gguf.calibration" / "states").mkdir(parents=True)
    (tmp_path / "mine.gguf.calibration" / "texts").mkdir()
    first, second = find_models(tmp_path)
    assert (first.path.name, first.calibration) == ("a-00001-of-00002.gguf", tmp_path / "a.gguf.calibration")
    assert (second.path.name, second.files, second.run) == ("b.gguf", (), None)
    with work_folder(tmp_path / "b.gguf.calibration", 0):
        assert second.is_in_use
        with pytest.raises(OutputError, match="in use"), holding(second):
            pass
    assert not second.is_in_use


def test_who_made_a_file_its_keys_say_or_its_manifest(small: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    assert main(["convert", str(small), str(ours), "-t", "Q4_K_M", "-q"]) == 0
    foreign = write_foreign(tmp_path / "foreign.gguf", "llama", tensor="output.weight")
    models = {model.path: model for model in find_models(tmp_path)}
    assert models[ours].is_ours
    assert not models[foreign].is_ours
    manifest_path(ours).unlink()
    assert find_model(tmp_path / "ours").is_ours
    manifest_path(foreign).write_text("{}")
    assert find_model(tmp_path / "foreign").is_ours


def test_a_split_file_is_one_and_says_what_it_lacks(small: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(small), str(tmp_path / "a.gguf"), "-t", "Q4_K_M", "--split-max-size", "5M", "-q"]
    assert main(arguments) == 0
    (model,) = find_models(tmp_path)
    assert (model.type, model.problem, len(model.files)) == ("Q4_K_M", None, 2)
    assert model.n_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    for name in ("a", "a.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        assert find_model(tmp_path / name) == model
    (tmp_path / "a-00001-of-00002.gguf").unlink()
    (model,) = find_models(tmp_path)
    assert model.problem is not None
    assert "a-00001-of-00002.gguf is missing" in model.problem
    assert model.is_ours
    with disk.replacing(tmp_path / "a.gguf") as file:
        file.write(model.files[0].read_bytes())
    with pytest.raises(OutputError, match=r"a may be 2 files: .*a-00001-of-00002\.gguf, .*a\.gguf"):
        find_model(tmp_path / "a")
    assert find_model(tmp_path / "a.gguf").files == (tmp_path / "a.gguf",)
