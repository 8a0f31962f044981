"""The report's numbers: against numpy on the manifest, and against sizes that others computed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepgguf.cli.main import main
from stepgguf.convert.manifest import manifest_path
from stepgguf.errors import VerifyError
from stepgguf.report import figures, measured
from tests.conftest import real_config
from tests.generate import Shape, config
from tests.report.synthetic import Made, write

SHAPE = Shape(n_mtp=1, n_expert=12)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """5 layers, of which 2 to 4 have 12 experts, and an MTP block."""
    return write(tmp_path / "x.gguf", config(SHAPE), "Q4_K_M")


def ledger(made: Made, name: str, kind: str) -> np.ndarray:
    return np.array(made.manifest["tensors"][name]["ledger"][kind], float)


def test_sizes_of_the_real_model_are_the_published_ones(tmp_path: Path) -> None:
    """118.58 GB for the trunk in Q4_K_M is llama.cpp's figure; 3 MTP heads are 2.58 GB in Q8_0."""
    real = measured.read(write(tmp_path / "x.gguf", real_config(), "Q4_K_M", imatrix=False).path)
    found = figures.summary(real)
    by_group = {group["group"]: group for group in found["groups"]}
    assert f"{(found['bytes'] - by_group['MTP']['bytes']) / 1e9:.2f} GB" == "118.58 GB"
    assert f"{by_group['MTP']['bytes'] / 1e9:.2f} GB" == "2.58 GB"
    assert by_group["routed experts"]["values"] == 42 * 3 * 288 * 1280 * 4096
    assert by_group["routed experts"]["read_per_token"] == by_group["routed experts"]["bytes"] * 8 // 288
    assert by_group["MTP"]["read_per_token"] == 0
    assert by_group["embeddings"]["read_per_token"] == 4096 * 4.5 / 8
    assert sum(group["bytes"] for group in found["groups"]) == found["bytes"]
    assert sum(group["tensors"] for group in found["groups"]) == found["tensors"] == 804


def test_means_are_weighted_by_use(made: Made) -> None:
    lines = {line["name"]: line for line in figures.summary(measured.read(made.path))["errors"]}
    for projection in ("gate", "up", "down"):
        found = lines[f"experts: {projection}"]
        expected = {}
        for layer in (2, 3, 4):
            error = ledger(made, f"blk.{layer}.ffn_{projection}_exps.weight", "error")
            count = ledger(made, f"blk.{layer}.ffn_gate_exps.weight", "count")
            expected[layer] = np.average(error, weights=count)
        assert found["by_layer"] == pytest.approx(expected, rel=1e-12)
        assert found["mean"] == pytest.approx(np.mean([*expected.values()]), rel=1e-12)
    shared = [f"blk.2.ffn_{p}_shexp.weight" for p in ("gate", "up", "down")]
    assert lines["shared experts"]["by_layer"][2] == pytest.approx(
        np.mean([ledger(made, name, "error") for name in shared]), rel=1e-12
    )
    assert [*lines["dense FFN"]["by_layer"]] == [0, 1]


def test_the_worst_experts_come_first(made: Made) -> None:
    found = figures.summary(measured.read(made.path))["worst"]
    every = [
        (error, layer, expert, projection)
        for layer in (2, 3, 4)
        for projection in ("gate", "up", "down")
        for expert, error in enumerate(ledger(made, f"blk.{layer}.ffn_{projection}_exps.weight", "error"))
    ]
    expected = sorted(every, reverse=True)[:20]
    assert [(w["error"], w["layer"], w["expert"], w["projection"]) for w in found] == expected
    first = found[0]
    counts = ledger(made, f"blk.{first['layer']}.ffn_gate_exps.weight", "count")
    errors = ledger(made, f"blk.{first['layer']}.ffn_{first['projection']}_exps.weight", "error")
    assert first["count"] == counts[first["expert"]]
    assert first["use"] == pytest.approx(counts[first["expert"]] / counts.mean(), rel=1e-12)
    assert first["ratio"] == pytest.approx(first["error"] / np.average(errors, weights=counts), rel=1e-12)


def test_unseen_experts_are_listed_by_layer(made: Made) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for expert in (4, 5, 6, 9):
            manifest["tensors"]["blk.3.ffn_gate_exps.weight"]["ledger"]["count"][expert] = 0

    made.rewrite(forget)
    coverage = figures.summary(measured.read(made.path))["coverage"]
    assert coverage["unseen"] == {3: "4-6,9"}
    assert (coverage["n_unseen"], coverage["experts"]) == (4, 36)
    counts = np.concatenate([ledger(made, f"blk.{i}.ffn_gate_exps.weight", "count") for i in (2, 3, 4)])
    counts[[16, 17, 18, 21]] = 0
    assert coverage["median"] == np.median(counts)


def test_without_counts_the_mass_takes_their_place_and_weighs_nothing(made: Made) -> None:
    def drop_counts(manifest: dict[str, Any]) -> None:
        for entry in manifest["tensors"].values():
            entry.get("ledger", {}).pop("count", None)

    made.rewrite(drop_counts)
    subject = measured.read(made.path)
    gate = next(line for line in figures.summary(subject)["errors"] if line["name"] == "experts: gate")
    assert gate["by_layer"][4] == pytest.approx(ledger(made, "blk.4.ffn_gate_exps.weight", "error").mean(), rel=1e-12)
    found = figures.maps(subject)["experts"]
    mass = ledger(made, "blk.4.ffn_gate_exps.weight", "mass")
    assert found["layers"] == [2, 3, 4]
    assert found["use"][2] == [float(f"{x:.5g}") for x in mass / mass.mean()]
    assert found["count"] is None


def test_without_an_imatrix_no_use_is_claimed(tmp_path: Path) -> None:
    subject = measured.read(write(tmp_path / "x.gguf", config(SHAPE), "Q4_K_M", imatrix=False).path)
    found = figures.summary(subject)
    assert figures.maps(subject)["experts"]["use"] is None
    assert found["coverage"] is None
    assert found["worst"][0]["use"] is None
    assert ["--imatrix FILE" in text for text in found["missing"]] == [True]


def test_a_figure_that_could_not_be_had_is_left_out(made: Made) -> None:
    """0 / 0, of an expert whose weights are all zero."""

    def lose(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blk.2.ffn_up_exps.weight"]["ledger"]["error"][:] = [math.nan] * 12
        manifest["tensors"]["blk.3.ffn_up_exps.weight"]["ledger"]["error"][0] = None

    made.rewrite(lose)
    subject = measured.read(made.path)
    up = next(line for line in figures.summary(subject)["errors"] if line["name"] == "experts: up")
    assert up["by_layer"][2] is None
    error = ledger(made, "blk.3.ffn_up_exps.weight", "error")[1:]
    count = ledger(made, "blk.3.ffn_gate_exps.weight", "count")[1:]
    assert up["by_layer"][3] == pytest.approx(np.average(error, weights=count), rel=1e-12)
    heat = figures.maps(subject)["experts"]["error"]["up"]
    assert heat[0] == [None] * 12
    assert heat[1][0] is None


def test_a_file_of_an_older_version_has_sizes_and_types_and_says_what_is_missing(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "-q"]) == 0
    text = manifest_path(path).read_text()
    manifest_path(path).write_text(text.replace('"ledger"', '"other"'))
    subject = measured.read(path)
    found = figures.summary(subject)
    assert found["bytes"] == sum(t.info.n_bytes for t in subject.tensors)
    assert found["errors"] == found["worst"] == []
    assert ["no ledger" in text for text in found["missing"]] == [True]
    assert found["type"] == "Q8_0"


def test_the_manifests_of_all_splits_are_gathered(small: Path, tmp_path: Path) -> None:
    arguments = ["-t", "Q8_0", "-q", "--name", "x"]
    assert main(["convert", str(small), str(tmp_path / "whole.gguf"), *arguments]) == 0
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), *arguments, "--split-max-size", "4M"]) == 0
    files = sorted(tmp_path.glob("x-*.gguf"))
    assert len(files) > 1
    whole = figures.summary(measured.read(tmp_path / "whole.gguf"))
    split = figures.summary(measured.read(files[-1]))
    assert len(whole["worst"]) == 20
    assert [line["name"] for line in whole["errors"]][:3] == ["experts: gate", "experts: up", "experts: down"]
    assert split["files"] == [file.name for file in files]
    assert {**split, "files": []} == {**whole, "files": []}
    manifest_path(files[1]).unlink()
    with pytest.raises(VerifyError, match="is not there") as raised:
        measured.read(files[0])
    assert raised.value.hint is not None


DAMAGE = {
    "has no numbers as error": lambda ledger: ledger.update(error=["many"]),
    "has no numbers as rmse": lambda ledger: ledger.pop("rmse"),
    "has no numbers as count": lambda ledger: ledger["count"].__setitem__(3, 10**400),
    "has 11 numbers as mass, expected 12": lambda ledger: ledger["mass"].pop(),
    "has a negative or infinite error": lambda ledger: ledger["error"].__setitem__(3, -1.0),
}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_ledger_is_named(made: Made, text: str) -> None:
    made.rewrite(lambda manifest: DAMAGE[text](manifest["tensors"]["blk.3.ffn_up_exps.weight"]["ledger"]))
    with pytest.raises(VerifyError) as raised:
        measured.read(made.path)
    assert raised.value.message.endswith(f"the ledger of blk.3.ffn_up_exps.weight {text}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a manifest"),
        ('{"tensors": 3}', "not a manifest"),
        ("\xff", "not valid JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(made: Made, content: str, text: str) -> None:
    manifest_path(made.path).write_bytes(content.encode("latin-1"))
    with pytest.raises(VerifyError, match=text):
        measured.read(made.path)


def test_a_manifest_of_another_file_is_refused(made: Made) -> None:
    def retype(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blk.3.attn_q.weight"]["type"] = "Q8_0"

    made.rewrite(retype)
    with pytest.raises(VerifyError, match=r"blk.3.attn_q.weight is \['Q8_0', .*, the file has \['Q4_K', "):
        measured.read(made.path)
    made.rewrite(lambda manifest: manifest["tensors"].pop("output.weight"))
    with pytest.raises(VerifyError, match=r"output.weight is \[None, None\]"):
        measured.read(made.path)


def test_what_the_manifest_says_of_its_making_is_only_text(made: Made) -> None:
    def odd(manifest: dict[str, Any]) -> None:
        manifest.update(type=7, recipe=["x"], imatrix={"file": 3, "datasets": [1, None], "extra": math.inf})

    made.rewrite(odd)
    subject = measured.read(made.path)
    assert subject.type == "Q4_K_M"  # the header's
    assert subject.recipe is None
    assert subject.imatrix == measured.Imatrix(None, None, ("1", "None"))
    before = copy.deepcopy(made.manifest)
    made.rewrite(lambda manifest: manifest.update(imatrix="step.gguf"))
    assert measured.read(made.path).imatrix is None
    assert made.manifest == before
