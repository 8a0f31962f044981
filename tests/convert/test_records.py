"""Journals and manifests of another shape: a clean start or an error of ours, and nothing made of them is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.main import main
from stepgguf.convert.journal import FinishedUnit, Journal
from stepgguf.convert.manifest import manifest_path
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.writer import Writer
from stepgguf.errors import OutputError
from stepgguf.files import disk
from stepgguf.quants.kernels import Loss
from stepgguf.quants.recipe_files import load_recipe
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

DEEP = "[" * 500 + "]" * 500
# What anything in a JSON document may become.
VALUES = ("null", "true", "-1", "1e999", "NaN", '"x"', "[]", "{}", '{"a": [1]}', "9" * 5000, DEEP, '"\\ud800"', "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=2, n_dense=1, n_expert=4, dense=256, vocab=768)
    return write_checkpoint(tmp_path_factory.mktemp("records") / "tiny", shape)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "x.gguf"
    assert main(["convert", str(tiny), str(path), "-t", "BF16", "-q"]) == 0
    return path


def mutations(text: str, rng: random.Random, n: int) -> list[bytes]:
    """The document with one member turned into something else, cut off, or with bytes changed."""
    found = []
    for _ in range(n):
        kind = rng.randrange(3)
        if kind == 0:
            found.append(text[: rng.randrange(len(text))].encode())
        elif kind == 1:
            data = bytearray(text.encode())
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            found.append(bytes(data))
        else:
            found.append(replaced(json.loads(text), rng).encode())
    return found


def replaced(document: Any, rng: random.Random) -> str:
    """One member, picked on the way down, becomes one of VALUES."""
    place = document
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            place[key] = "HERE"
            return json.dumps(document).replace('"HERE"', rng.choice(VALUES), 1)
        place = place[key]


def test_a_manifest_of_another_shape_is_an_error_or_found_different(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copy(whole, tmp_path / whole.name))
    good = manifest_path(whole).read_text()
    for content in mutations(good, random.Random(1), 150):
        manifest_path(copy).write_bytes(content)
        code = main(["verify", str(copy), "-q"])
        err = capfd.readouterr().err
        assert code in (0, 1)
        assert code == 0 or err.startswith("error: ")
        if code == 0:  # what verify asks about is as it was
            found = json.loads(content)
            assert found["header_sha256"] == json.loads(good)["header_sha256"]
            for name, entry in json.loads(good)["tensors"].items():
                for key in ("type", "shape", "rows_per_unit", "sha256"):
                    assert found["tensors"][name][key] == entry[key]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(rows_per_unit=0),
        lambda entry: entry.update(rows_per_unit=10**30),
        lambda entry: entry.update(sha256=[]),
        lambda entry: entry.update(sha256=entry["sha256"][:-1]),
        lambda entry: entry.update(sha256=[*entry["sha256"], "00"]),
        lambda entry: entry.update(shape=[1.0, 2.0]),
    ],
)
def test_a_manifest_that_would_check_less_is_noticed(
    change: Callable[[dict[str, Any]], None], whole: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(whole, tmp_path / whole.name))
    manifest = json.loads(manifest_path(whole).read_text())
    change(manifest["tensors"]["blk.1.ffn_up_exps.weight"])
    manifest_path(copy).write_text(json.dumps(manifest))
    assert main(["verify", str(copy), "-q"]) == 1


def test_a_journal_of_another_shape_is_a_clean_start_or_an_error(tiny: Path, whole: Path, tmp_path: Path) -> None:
    with Checkpoint(tiny) as checkpoint:
        plan = plan_source(checkpoint, tmp_path / "x.gguf", Options(load_recipe("BF16")))
        identity = checkpoint.identity()
    with Writer(plan, identity):
        pass
    journal = tmp_path / "x.gguf.journal"
    good = journal.read_text()
    for content in mutations(good.rstrip("\n"), random.Random(2), 150):
        for end in (b"\n", b"\n" + b"\xff" * 640, b""):
            journal.write_bytes(content + end)
            try:
                writer = Writer(plan, identity)
            except OutputError as error:
                assert "--restart" in (error.hint or "")  # noqa: PT017
                continue
            with writer:
                assert not writer.finished
            assert journal.read_bytes().count(b"\n") == 1
    journal.write_text(DEEP)
    command = ["convert", str(tiny), str(tmp_path / "x.gguf"), "-t", "BF16", "-q"]
    assert main(command) == 0
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def test_what_was_entered_is_read_again_up_to_the_first_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    made = {i: FinishedUnit(bytes([i]) * 32, Loss(i, 2 * i, 3 * i) if i % 2 else None) for i in range(10)}
    journal = Journal(path)
    journal.begin({"a": 1})
    journal.add_finished(made)
    journal.close()
    content = path.read_bytes()
    start = len(content) - 640
    for at in range(start, len(content), 37):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        journal = Journal(path)
        label, found = journal.read_finished(10) or ({}, {})
        whole = (at - start) // 64
        assert (label, found) == ({"a": 1}, {i: made[i] for i in range(whole)})
        journal.resume()
        journal.add_finished({i: made[i] for i in range(whole, 10)})
        journal.close()
        assert path.read_bytes() == content


def test_finishing_goes_from_the_data_to_the_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which the system is told: data, manifest, its name, the file's name, the journal's end."""
    from stepgguf.convert import pipeline

    events: list[str] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def name(fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"sync {name(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append(f"{a.name} -> {b.name}"), replace(a, b))[1])
    monkeypatch.setattr(Path, "unlink", lambda path, **o: (events.append(f"remove {path.name}"), unlink(path, **o))[1])
    with Checkpoint(tiny) as checkpoint:
        plan = plan_source(checkpoint, tmp_path / "x.gguf", Options(load_recipe("BF16")))
        writer = Writer(plan, checkpoint.identity())
        pipeline.make_files(checkpoint, writer)
    folder = f"sync {tmp_path.name}"
    assert events[events.index("sync x.gguf.part") :] == [
        "sync x.gguf.part",
        "sync x.gguf.manifest.json.new",
        "x.gguf.manifest.json.new -> x.gguf.manifest.json",
        folder,
        "x.gguf.part -> x.gguf",
        folder,
        "remove x.gguf.journal",
        folder,
    ]


def test_a_file_that_is_held_is_the_one_at_its_path(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        disk.hold(path)
    fd = disk.hold(path, make=True)
    with pytest.raises(BlockingIOError):
        disk.hold(path)
    path.unlink()
    assert not disk.is_at(fd, path)
    other = disk.hold(path, make=True)
    assert disk.is_at(other, path)
    os.close(fd)
    os.close(other)
