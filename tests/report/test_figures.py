"""The report's numbers: against numpy on the manifest, and against sizes that others computed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from stepgguf.cli.main import main
from stepgguf.convert.manifest import manifest_path
from stepgguf.errors import UnsupportedModel, VerifyError
from stepgguf.report import experts, figures, measured
from tests.conftest import real_config
from tests.generate import Shape, config
from tests.oracle import llama_quantize
from tests.report.synthetic import Made, write

SHAPE = Shape(n_mtp=1, n_expert=12)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """5 layers, of which 2 to 4 have 12 experts, and an MTP block."""
    return write(tmp_path / "x.gguf", config(SHAPE), "Q4_K_M")


def ledger(made: Made, name: str, kind: str) -> np.ndarray:
    return np.array(made.manifest["tensors"][name]["ledger"][kind], float)


@pytest.mark.slow
def test_sizes_of_the_real_model_are_the_published_ones(tmp_path: Path) -> None:
    """118.58 GB for the trunk in Q4_K_M is llama.cpp's figure; 3 MTP heads are 2.58 GB in Q8_0."""
    real = measured.read_file(write(tmp_path / "x.gguf", real_config(), "Q4_K_M", imatrix=False).path)
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
    lines = {line["name"]: line for line in figures.summary(measured.read_file(made.path))["errors"]}
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


def test_errors_by_layer_are_also_over_the_level_of_their_type(made: Made) -> None:
    """The level is the median over all that has the type: 12 figures of a tensor of experts, 1 of a dense one."""
    entries = made.manifest["tensors"]
    found = figures.summary(measured.read_file(made.path))
    levels = {
        type: np.median(np.concatenate([e["ledger"]["error"] for e in entries.values() if e["type"] == type]))
        for type in ("Q4_K", "Q6_K", "Q8_0")
    }
    assert found["levels"] == pytest.approx(levels, rel=1e-12)
    lines = {line["name"]: line for line in found["errors"]}
    for layer in (2, 3, 4):
        name = f"blk.{layer}.ffn_down_exps.weight"
        mean = np.average(
            ledger(made, name, "error"), weights=ledger(made, f"blk.{layer}.ffn_gate_exps.weight", "count")
        )
        assert lines["experts: down"]["relative"][layer] == pytest.approx(
            mean / levels[entries[name]["type"]], rel=1e-12
        )
    dense = [entries[f"blk.0.ffn_{p}.weight"] for p in ("gate", "up", "down")]
    expected = np.mean([e["ledger"]["error"][0] / levels[e["type"]] for e in dense])
    assert lines["dense FFN"]["relative"][0] == pytest.approx(expected, rel=1e-12)


def test_only_experts_that_stand_out_from_their_tensor_are_named(made: Made) -> None:
    """Of errors within a third of each other none does; a doubled one does, in the tensor where the others are low."""

    def even(manifest: dict[str, Any]) -> None:
        for layer in (2, 3, 4):
            for projection in ("gate", "up", "down"):
                errors = [0.01 * layer * (1 + 0.03 * expert) for expert in range(12)]
                manifest["tensors"][f"blk.{layer}.ffn_{projection}_exps.weight"]["ledger"]["error"] = errors

    def stand_out(manifest: dict[str, Any]) -> None:
        even(manifest)
        manifest["tensors"]["blk.2.ffn_up_exps.weight"]["ledger"]["error"][7] = 0.06
        manifest["tensors"]["blk.4.ffn_gate_exps.weight"]["ledger"]["error"][3] = 0.4

    made.rewrite(even)
    found = figures.summary(measured.read_file(made.path))
    assert (found["worst"], found["n_worst"]) == ([], 0)
    made.rewrite(stand_out)
    found = figures.summary(measured.read_file(made.path))
    assert [(w["layer"], w["expert"], w["projection"], w["error"]) for w in found["worst"]] == [
        (4, 3, "gate", 0.4),
        (2, 7, "up", 0.06),
    ]
    first = found["worst"][0]
    errors = [0.04 * (1 + 0.03 * expert) for expert in range(12) if expert != 3] + [0.4]
    counts = ledger(made, "blk.4.ffn_gate_exps.weight", "count")
    assert first["ratio"] == pytest.approx(0.4 / np.exp(np.median(np.log(errors))), rel=1e-12)
    assert first["count"] == counts[3]
    assert first["use"] == pytest.approx(counts[3] / counts.mean(), rel=1e-12)


def test_what_varies_by_chance_alone_does_not_stand_out() -> None:
    """36,288 log-normal figures in 126 tensors, as of the real model, of which one file in a hundred has one."""
    logs = np.random.default_rng(0).normal(size=(126, 288))
    for sigma in (0.01, 0.2):
        bounds = [experts.outstanding_bound(np.exp(sigma * row)) for row in logs]
        assert not any((np.exp(sigma * row) > least).any() for row, (_, least) in zip(logs, bounds, strict=True))


def test_unseen_experts_are_listed_by_layer(made: Made) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for expert in (4, 5, 6, 9):
            manifest["tensors"]["blk.3.ffn_gate_exps.weight"]["ledger"]["count"][expert] = 0

    made.rewrite(forget)
    coverage = figures.summary(measured.read_file(made.path))["coverage"]
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
    subject = measured.read_file(made.path)
    gate = next(line for line in figures.summary(subject)["errors"] if line["name"] == "experts: gate")
    assert gate["by_layer"][4] == pytest.approx(ledger(made, "blk.4.ffn_gate_exps.weight", "error").mean(), rel=1e-12)
    found = figures.tensor_maps(subject)["experts"]
    mass = ledger(made, "blk.4.ffn_gate_exps.weight", "mass")
    assert found["layers"] == [2, 3, 4]
    assert found["use"][2] == [float(f"{x:.5g}") for x in mass / mass.mean()]
    assert found["count"] is None


def test_without_an_imatrix_no_use_is_claimed(tmp_path: Path) -> None:
    subject = measured.read_file(write(tmp_path / "x.gguf", config(SHAPE), "Q4_K_M", imatrix=False).path)
    found = figures.summary(subject)
    assert figures.tensor_maps(subject)["experts"]["use"] is None
    assert found["coverage"] is None
    assert ["--imatrix FILE" in text for text in found["missing"]] == [True]


def test_a_figure_that_could_not_be_had_is_left_out(made: Made) -> None:
    """0 / 0, of an expert whose weights are all zero."""

    def lose(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blk.2.ffn_up_exps.weight"]["ledger"]["error"][:] = [math.nan] * 12
        manifest["tensors"]["blk.3.ffn_up_exps.weight"]["ledger"]["error"][0] = None

    made.rewrite(lose)
    subject = measured.read_file(made.path)
    up = next(line for line in figures.summary(subject)["errors"] if line["name"] == "experts: up")
    assert up["by_layer"][2] is None
    error = ledger(made, "blk.3.ffn_up_exps.weight", "error")[1:]
    count = ledger(made, "blk.3.ffn_gate_exps.weight", "count")[1:]
    assert up["by_layer"][3] == pytest.approx(np.average(error, weights=count), rel=1e-12)
    heat = figures.tensor_maps(subject)["experts"]["error"]["up"]
    assert heat[0] == [None] * 12
    assert heat[1][0] is None


def test_a_file_of_an_older_version_has_sizes_and_types_and_says_what_is_missing(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0", "-q"]) == 0
    text = manifest_path(path).read_text()
    manifest_path(path).write_text(text.replace('"ledger"', '"other"'))
    subject = measured.read_file(path)
    found = figures.summary(subject)
    assert found["bytes"] == sum(t.info.n_bytes for t in subject.tensors)
    assert found["errors"] == found["worst"] == []
    assert ["no ledger" in text for text in found["missing"]] == [True]
    assert found["type"] == "Q8_0"


@pytest.mark.slow
def test_the_manifests_of_all_splits_are_gathered(small: Path, tmp_path: Path) -> None:
    arguments = ["-t", "Q8_0", "-q", "--name", "x"]
    assert main(["convert", str(small), str(tmp_path / "whole.gguf"), *arguments]) == 0
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), *arguments, "--split-max-size", "4M"]) == 0
    files = sorted(tmp_path.glob("x-*.gguf"))
    assert len(files) > 1
    whole = figures.summary(measured.read_file(tmp_path / "whole.gguf"))
    split = figures.summary(measured.read_file(files[-1]))
    assert [line["name"] for line in whole["errors"]][:3] == ["experts: gate", "experts: up", "experts: down"]
    assert split["files"] == [file.name for file in files]
    assert {**split, "files": []} == {**whole, "files": []}
    manifest_path(files[1]).unlink()
    part = figures.summary(measured.read_file(files[0]))
    assert part["bytes"] == whole["bytes"]
    assert files[1].name in part["missing"][0]


@pytest.mark.slow
def test_a_file_of_another_tool_needs_no_manifest(small: Path, tmp_path: Path) -> None:
    """Types and sizes are the header's, and so is what llama-quantize notes of its making."""
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "BF16", "-q"]) == 0
    path = tmp_path / "q.gguf"
    llama_quantize(tmp_path / "x.gguf", path, "Q8_0")
    subject = measured.read_file(path)
    found = figures.summary(subject)
    assert (found["type"], found["made_by"], found["imatrix"]) == ("Q8_0", None, None)
    assert found["bytes"] == sum(t.n_bytes for t in GGUFReader(path).tensors)
    assert found["errors"] == found["worst"] == []
    assert ["no manifest beside the file" in text for text in found["missing"]] == [True]
    assert figures.tensor_maps(subject)["types"]


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"general\.architecture is 'llama', expected 'step35'"):
        measured.read_file(tmp_path / "x.gguf")


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
        measured.read_file(made.path)
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
        measured.read_file(made.path)


def test_a_manifest_of_another_file_is_refused(made: Made) -> None:
    def retype(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blk.3.attn_q.weight"]["type"] = "Q8_0"

    made.rewrite(retype)
    with pytest.raises(VerifyError, match=r"blk.3.attn_q.weight is \['Q8_0', .*, the file has \['Q4_K', "):
        measured.read_file(made.path)
    made.rewrite(lambda manifest: manifest["tensors"].pop("output.weight"))
    with pytest.raises(VerifyError, match=r"output.weight is \[None, None\]"):
        measured.read_file(made.path)


def test_what_the_manifest_says_of_its_making_is_only_text(made: Made) -> None:
    def odd(manifest: dict[str, Any]) -> None:
        manifest.update(type=7, recipe=["x"], imatrix={"file": 3, "datasets": [1, None], "extra": math.inf})

    made.rewrite(odd)
    subject = measured.read_file(made.path)
    assert subject.type == "Q4_K_M"  # the header's
    assert subject.recipe is None
    assert subject.imatrix == measured.ImatrixOrigin(None, None, ("1", "None"))
    before = copy.deepcopy(made.manifest)
    made.rewrite(lambda manifest: manifest.update(imatrix="step.gguf"))
    assert measured.read_file(made.path).imatrix is None
    assert made.manifest == before
