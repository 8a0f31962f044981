"""Conversions with an importance matrix: llama-quantize's bytes, each expert's own row, the ledger, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from stepgguf.cli.main import main
from stepgguf.convert.importance import Importance
from stepgguf.convert.manifest import manifest_path
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.quants import KernelName
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix
from stepgguf.quants.kernels import choose_kernel
from stepgguf.quants.types import row_size
from stepgguf.quants.values import widen
from tests.convert.test_bytes import same_tensors
from tests.generate import Shape, write_checkpoint
from tests.oracle import llama_quantize

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 GGUF without MTP blocks: a dense layer, then one with 6 experts."""
    folder = tmp_path_factory.mktemp("importance")
    checkpoint = write_checkpoint(folder / "c", Shape(n_layer=2, n_dense=1))
    assert main(["convert", str(checkpoint), str(folder / "bf16.gguf"), "-t", "BF16", "-q"]) == 0
    return folder / "bf16.gguf"


@pytest.fixture(scope="module")
def calibrated(trunk: Path) -> Path:
    """Importance of every matrix but the embeddings and the output. Expert 0 saw nothing, expert 1 three tokens."""
    rng = np.random.default_rng(5)
    entries = {}
    with GGUFSource(trunk) as source:
        for name, tensor in source.tensors.items():
            if not name.startswith("blk.") or len(tensor.shape) < 2 or "ffn_gate_inp" in name:
                continue
            n = tensor.shape[0] if len(tensor.shape) == 3 else 1
            counts = np.full(n, 500.0, np.float32)
            counts[: n - 1 : 1][:2] = [0.0, 3.0][: n - 1]
            moments = rng.gamma(0.5, 1.0, (n, tensor.shape[-1])).astype(np.float32)
            entries[name] = ImatrixEntry(moments * counts[:, None], counts)
    path = trunk.with_name("imatrix.gguf")
    write_imatrix(Imatrix(None, ("made up",), 1, 512, entries), path)
    return path


def normalised(path: Path) -> Mapping[str, Floats]:
    """As quantize.cpp hands it over: sums over counts, 1.0 for what was never seen."""
    result = {}
    for name, entry in read_imatrix(path).entries.items():
        rows = np.ones_like(entry.sums)
        for i, count in enumerate(entry.counts):
            if count > 0:
                rows[i] = entry.sums[i] / count
        result[name] = rows
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Q4_K_M", "Q3_K_S", "Q2_K_S", "IQ4_XS", "IQ3_XXS", "IQ3_M", "IQ2_XS", "IQ2_M", "Q4_0"]
)
def test_flat_is_llama_quantize_with_the_same_matrix(name: str, trunk: Path, calibrated: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    command = ["quantize", str(trunk), str(ours), "-t", name, "--imatrix", str(calibrated), "-q"]
    assert main([*command, "--imatrix-prior", "flat"]) == 0
    llama_quantize(trunk, theirs, name, imatrix=normalised(calibrated))
    same_tensors(ours, theirs)


def test_the_pooled_prior_changes_the_bytes_of_unseen_and_thin_experts(
    trunk: Path, calibrated: Path, tmp_path: Path
) -> None:
    importance = Importance.read(calibrated)
    assert (
        main(["quantize", str(trunk), str(tmp_path / "o.gguf"), "-t", "Q4_K_S", "--imatrix", str(calibrated), "-q"])
        == 0
    )
    with GGUFSource(trunk) as source, GGUFSource(tmp_path / "o.gguf") as made:
        name = "blk.1.ffn_gate_exps.weight"
        shape, kind = source.tensors[name].shape, made.tensors[name].ggml_type
        assert kind is not None
        rows = importance.rows(name, shape)
        assert rows is not None
        assert len(np.unique(rows, axis=0)) == len(rows)
        for expert, weights in enumerate(rows):
            span = expert * shape[1], (expert + 1) * shape[1]
            values = np.empty((shape[1], shape[2]), np.float32)
            widen(source.values(name, *span), values)
            out = np.empty((shape[1], row_size(kind, shape[2])), np.uint8)
            choose_kernel(kind, "ggml", weighted=True).encode(values, out, weights)
            np.testing.assert_array_equal(made.raw(name, *span), out, err_msg=f"expert {expert}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_S", "Q6_K", "IQ4_XS"])
def test_the_ledger_says_what_each_expert_lost(name: str, trunk: Path, calibrated: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    assert main(["quantize", str(trunk), str(path), "-t", name, "--imatrix", str(calibrated), "-q"]) == 0
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["imatrix"] == {"file": "imatrix.gguf", "prior": "pooled", "datasets": ["made up"]}
    importance = Importance.read(calibrated)
    with GGUFSource(trunk) as source, GGUFSource(path) as made:
        for tensor, entry in manifest["tensors"].items():
            if "ledger" not in entry:
                assert entry["type"] == "F32"
                continue
            check_ledger(entry["ledger"], source, made, tensor, importance)


def check_ledger(ledger: Any, source: GGUFSource, made: GGUFSource, name: str, importance: Importance) -> None:
    shape = source.tensors[name].shape
    n = shape[0] if len(shape) == 3 else 1
    weights = importance.rows(name, shape)
    values, decoded = np.empty((n, shape[-2], shape[-1]), np.float32), np.empty((n, shape[-2], shape[-1]), np.float32)
    for part, opened in ((values, source), (decoded, made)):
        widen(opened.values(name, 0, n * shape[-2]), part.reshape(-1, shape[-1]))
    lost = (values.astype(np.float64) - decoded) ** 2
    w = np.ones((n, shape[-1])) if weights is None else weights.astype(np.float64)
    error = (lost * w[:, None]).sum((1, 2)) / (values.astype(np.float64) ** 2 * w[:, None]).sum((1, 2))
    # Five digits are kept: 5e-5 of 1.0000. Sums along a row are float32: 1e-5 for 256 terms at the most.
    np.testing.assert_allclose(ledger["error"], error, rtol=6e-5, err_msg=name)
    np.testing.assert_allclose(ledger["rmse"], np.sqrt(lost.mean((1, 2))), rtol=6e-5, err_msg=name)
    assert ("mass" in ledger) == (weights is not None)
    if weights is not None:
        np.testing.assert_allclose(ledger["mass"], w.sum(1), rtol=6e-5)
        assert ledger["count"] == ([0, 3, 500, 500, 500, 500] if n == 6 else [500])


def test_a_run_is_not_resumed_with_another_importance(
    trunk: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["quantize", str(trunk), str(tmp_path / "o.gguf"), "-t", "Q4_K_S", "-q", "--imatrix", str(calibrated)]
    with monkeypatch.context() as patch:
        patch.setattr("stepgguf.convert.writer.Writer.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    assert main([*command, "--imatrix-prior", "flat"]) == 1
    assert "an interrupted run with another imatrix" in capsys.readouterr().err
    assert main(command) == 0
    assert main(["verify", str(tmp_path / "o.gguf"), "-q"]) == 0


def test_types_that_need_importance_name_the_tensors(
    trunk: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(trunk), str(tmp_path / "o.gguf"), "-t", "IQ2_XS"]) == 1
    err = capsys.readouterr().err
    assert "IQ2_XS need an importance matrix: blk.0." in err
    assert "--imatrix" in err
    one = read_imatrix(calibrated)
    lacking = "blk.1.ffn_up_exps.weight"
    some = {name: entry for name, entry in one.entries.items() if name != lacking}
    write_imatrix(Imatrix(None, (), 1, 512, some), tmp_path / "some.gguf")
    assert (
        main(
            ["quantize", str(trunk), str(tmp_path / "o.gguf"), "-t", "IQ2_XS", "--imatrix", str(tmp_path / "some.gguf")]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert f"1 tensors of type IQ2_XS need importance, and some.gguf has none for them: {lacking}" in err
    assert not list(tmp_path.glob("o.gguf*"))


def test_gaps_of_the_matrix_are_said_before_anything_is_written(
    trunk: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(trunk), str(tmp_path / "o.gguf"), "-t", "Q4_K_S", "--imatrix", str(calibrated)]
    assert main([*command, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "imatrix: 1 experts in 1 layers saw no token" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_both_kernels_make_the_same_file(trunk: Path, calibrated: Path, tmp_path: Path) -> None:
    for kernel in get_args(KernelName):
        command = [
            "quantize",
            str(trunk),
            str(tmp_path / f"{kernel}.gguf"),
            "-t",
            "Q5_K_M",
            "--imatrix",
            str(calibrated),
        ]
        assert main([*command, "--kernel", kernel, "-q"]) == 0
    assert (tmp_path / "lanes.gguf").read_bytes() == (tmp_path / "ggml.gguf").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_may_be_quantized_without_a_gguf_between(small: Path, tmp_path: Path) -> None:
    for command in ("convert", "quantize"):
        assert main([command, str(small), str(tmp_path / f"{command}.gguf"), "-t", "Q4_K_S", "-q"]) == 0
    assert (tmp_path / "convert.gguf").read_bytes() == (tmp_path / "quantize.gguf").read_bytes()


def test_verify_makes_weighted_tensors_again(
    trunk: Path, calibrated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.gguf"
    assert main(["quantize", str(trunk), str(path), "-t", "Q4_K_S", "--imatrix", str(calibrated), "-q"]) == 0
    verify = ["verify", str(path), "--against", str(trunk), "--all", "-q"]
    assert main([*verify, "--imatrix", str(calibrated)]) == 0
    assert main(verify) == 1
    assert f"it was made with the importance matrix '{calibrated.name}', which is not given" in capfd.readouterr().err
