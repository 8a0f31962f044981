"""Errors before encoding: against ggml's encoder and gguf-py's decoder in plain float64, and what the file keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from stepgguf.convert import measure
from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import MEASURED_TYPES, TensorErrors, measure_errors, possible_types
from stepgguf.convert.plan import Options, PlannedTensor
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.errors import CorruptTensor
from stepgguf.quants import ggml
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, write_imatrix
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.quants.types import row_size
from stepgguf.quants.values import Values, widen
from tests.generate import Shape, write_checkpoint

T = GGMLQuantizationType
ROLES = ("attn_k", "attn_v", "ffn_down_exps")
TESTED_TYPES = (T.IQ2_XS, T.Q4_K, T.Q8_0)  # each type's kernel is compiled once on a new machine


class Counting(Checkpoint):
    """A checkpoint that notes which tensors are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read: list[str] = []

    def values(self, name: str, start: int, stop: int) -> Values:
        self.read.append(name)
        return super().values(name, start, stop)


@dataclass(frozen=True)
class Given:
    """A checkpoint, three tensors of its last layer by role, and an importance matrix for two of them."""

    checkpoint: Counting
    tensors: dict[str, PlannedTensor]
    importance: Importance
    cache: Path

    def measure(self, *roles: str) -> dict[str, TensorErrors]:
        tensors = [self.tensors[role] for role in roles or ROLES]
        return measure_errors(self.checkpoint, tensors, self.cache, importance=self.importance, threads=1)


@pytest.fixture(autouse=True)
def _few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_TYPES", TESTED_TYPES)


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that 64 runs of a tensor are every row of it."""
    shape = Shape(n_layer=2, n_dense=1, n_expert=2, n_used=1)
    return write_checkpoint(tmp_path_factory.mktemp("measure") / "two", shape, seed=5)


@pytest.fixture
def given(two_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    monkeypatch.setattr(measure, "MIN_RUNS", 64)
    with Counting(two_experts) as checkpoint:
        plan = plan_source(checkpoint, tmp_path / "x.gguf", Options(load_recipe("Q8_0")))
        tensors = {t.role: t for t in plan.tensors if t.name.startswith("blk.1.") and t.role in ROLES}
        yield Given(checkpoint, tensors, write_importance(tmp_path, tensors, seed=0), tmp_path / "errors.jsonl")


def write_importance(folder: Path, tensors: dict[str, PlannedTensor], seed: int) -> Importance:
    rng, entries = np.random.default_rng(seed), {}
    for role in ("attn_k", "ffn_down_exps"):
        tensor = tensors[role]
        counts = np.array([30, 10][: tensor.n_experts], np.float32)
        sums = rng.gamma(0.3, 1.0, (tensor.n_experts, tensor.shape[-1])).astype(np.float32) * counts[:, None]
        entries[tensor.name] = ImatrixEntry(sums, counts)
    path = folder / f"imatrix-{seed}.gguf"
    write_imatrix(Imatrix(None, ("made up",), 1, 1, entries), path)
    return Importance.read(path)


def floats(checkpoint: Checkpoint, tensor: PlannedTensor) -> NDArray[np.float32]:
    """[n_expert, rows, columns]"""
    assert tensor.source is not None
    n = tensor.n_experts * tensor.rows_per_expert
    stored = checkpoint.values(tensor.source, 0, n)
    values = np.empty(stored.shape, np.float32)
    widen(stored, values)
    return values.reshape(tensor.n_experts, -1, tensor.shape[-1])


def by_hand(
    values: NDArray[np.float32], ggml_type: GGMLQuantizationType, rows: NDArray[np.float32] | None, shares: list[float]
) -> tuple[float, float]:
    """Energy and relative error over all rows: ggml's encoder, gguf-py's decoder, float64."""
    library = ggml.load_library()
    assert library is not None
    energy = lost = 0.0
    for expert, x in enumerate(values):
        out = np.empty((len(x), row_size(ggml_type, x.shape[1])), np.uint8)
        library.quantize(ggml_type, x, out, None if rows is None else np.ascontiguousarray(rows[expert]))
        wide, decoded = (v.reshape(x.shape).astype(np.float64) for v in (x, gguf.quants.dequantize(out, ggml_type)))
        w = np.ones(x.shape[1]) if rows is None else rows[expert].astype(np.float64)
        energy += shares[expert] * float((wide**2 @ w).sum())
        lost += shares[expert] * float(((wide - decoded) ** 2 @ w).sum())
    return energy, lost / energy


@pytest.mark.parametrize(("role", "shares"), [("attn_k", [1.0]), ("attn_v", [1.0]), ("ffn_down_exps", [0.75, 0.25])])
def test_error_and_energy_are_what_ggml_and_gguf_py_give(role: str, shares: list[float], given: Given) -> None:
    tensor = given.tensors[role]
    found = given.measure(role)[tensor.name]
    rows = given.importance.rows(tensor.name, tensor.shape)
    assert (rows is None) == (role == "attn_v")
    for ggml_type in (T.Q4_K, T.Q8_0):
        energy, error = by_hand(floats(given.checkpoint, tensor), ggml_type, rows, shares)
        # Sums of float32 squares of float32 values and differences: all positive, each right to some 2^-23.
        assert found.energy == pytest.approx(energy, rel=1e-6)
        assert found.errors[ggml_type] == pytest.approx(error, rel=1e-6)


def test_without_importance_a_tensor_has_the_types_that_need_none(given: Given) -> None:
    found = given.measure()
    assert found.keys() == {tensor.name for tensor in given.tensors.values()}
    assert set(found[given.tensors["attn_k"].name].errors) == set(TESTED_TYPES)
    assert set(found[given.tensors["attn_v"].name].errors) == {T.Q4_K, T.Q8_0}


def test_llama_quantize_would_not_refuse_any_of_a_tensors_types(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_TYPES", MEASURED_TYPES)
    tensor = given.tensors["attn_v"]
    assert possible_types(tensor.name, tensor.shape, None) == set(MEASURED_TYPES) - {
        T.IQ2_XXS,
        T.IQ2_XS,
        T.IQ2_S,
        T.IQ3_XXS,
    }
    attn_k = given.tensors["attn_k"]
    assert possible_types(attn_k.name, attn_k.shape, given.importance) == set(MEASURED_TYPES)
    # 96 columns are no multiple of 256: what llama.cpp falls back on (tests/quants/test_mixtures.py).
    narrow = replace(tensor, shape=(128, 96))
    assert possible_types(narrow.name, narrow.shape, None) == {T.Q4_0, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL}


def test_a_second_run_reads_nothing(given: Given) -> None:
    first = given.measure()
    given.checkpoint.read.clear()
    assert given.measure() == first
    assert given.checkpoint.read == []


def test_another_imatrix_is_measured_anew(given: Given, tmp_path: Path) -> None:
    before = given.measure("attn_k")
    tensor, other = given.tensors["attn_k"], write_importance(tmp_path, given.tensors, seed=1)
    after = measure_errors(given.checkpoint, [tensor], given.cache, importance=other, threads=1)
    assert after[tensor.name].energy != before[tensor.name].energy


def test_what_an_interrupted_run_has_measured_is_kept(given: Given) -> None:
    def interrupt(tensor: PlannedTensor, kept: bool) -> None:
        if tensor.role == "attn_v":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_errors(
            given.checkpoint, [given.tensors[role] for role in ROLES], given.cache, importance=given.importance,
            threads=1, progress=interrupt,
        )  # fmt: skip
    given.checkpoint.read.clear()
    resumed = given.measure()
    assert set(given.checkpoint.read) == {given.tensors["ffn_down_exps"].source}
    given.cache.unlink()
    assert given.measure() == resumed


def test_a_line_that_was_cut_off_is_measured_again(given: Given) -> None:
    whole = given.measure()
    text = given.cache.read_bytes()
    given.cache.write_bytes(text[:-20])
    given.checkpoint.read.clear()
    assert given.measure() == whole
    assert set(given.checkpoint.read) == {given.tensors["ffn_down_exps"].source}
    given.checkpoint.read.clear()
    assert given.measure() == whole
    assert given.checkpoint.read == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    ["[1]", "7", '{"tensor": "x"}', '{"tensor": 3, "energy": 1.0, "errors": {}}', "[" * 5000, '{"a": "\\ud800"}',
     '{"tensor": "x", "energy": "1", "errors": {}}', '{"tensor": "x", "energy": 1.0, "errors": {"Q9": 1.0}}',
     '{"tensor": "x", "energy": NaN, "errors": {}}', '{"tensor": "x", "energy": 1.0, "errors": [1]}'],
)  # fmt: skip
def test_a_line_of_another_shape_is_passed_over(line: str, given: Given) -> None:
    whole = given.measure()
    key, *lines = given.cache.read_text().splitlines()
    given.cache.write_text("\n".join([key, line, *lines, line, ""]))
    given.checkpoint.read.clear()
    assert given.measure() == whole
    assert given.checkpoint.read == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00 no JSON\n", b'{"version": 0}\n', b'[1]\n{"tensor": 3}\n'])
def test_a_file_of_something_else_is_begun_anew(content: bytes, given: Given) -> None:
    given.cache.write_bytes(content)
    assert set(given.measure("attn_k")) == {given.tensors["attn_k"].name}
    assert content not in given.cache.read_bytes() or not content


def test_progress_names_each_tensor_once_kept_or_not(given: Given) -> None:
    given.measure("attn_v")
    seen: list[str] = []
    measure_errors(
        given.checkpoint, [given.tensors[role] for role in ROLES], given.cache, importance=given.importance,
        threads=1, progress=lambda tensor, kept: seen.append(tensor.role),
    )  # fmt: skip
    assert sorted(seen) == sorted(ROLES)


def test_the_sample_is_as_large_as_it_is_said_to_be(given: Given) -> None:
    read: dict[str, int] = {}
    values = given.checkpoint.values

    def counting(name: str, start: int, stop: int) -> Values:
        read[name] = read.get(name, 0) + stop - start
        return values(name, start, stop)

    given.checkpoint.values = counting  # type: ignore[method-assign]
    given.measure()
    # To know what to compile, a row for each kernel, with importance and without, of the first tensor that needs it.
    for role, n_compiled in (("attn_k", 3), ("attn_v", 2), ("ffn_down_exps", 0)):
        tensor = given.tensors[role]
        assert tensor.source is not None
        n_types = len(possible_types(tensor.name, tensor.shape, given.importance))
        # Each run once for each type.
        n_rows = measure.count_sampled_values(tensor.shape) // tensor.shape[-1]
        assert read[tensor.source] == n_types * n_rows + n_compiled


def test_a_value_that_is_not_finite_names_its_place(given: Given, two_experts: Path, tmp_path: Path) -> None:
    source = given.tensors["attn_k"].source
    assert source is not None
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in two_experts.iterdir():
        if file.suffix == ".safetensors" and source in (tensors := load_file(file)):
            tensors[source][7, 3] = float("nan")
            save_file(tensors, damaged / file.name)
        else:
            (damaged / file.name).symlink_to(file)
    with Checkpoint(damaged) as checkpoint, pytest.raises(CorruptTensor, match="row 7, column 3 is nan"):
        measure_errors(checkpoint, [given.tensors["attn_k"]], tmp_path / "e.jsonl", threads=1)


@pytest.mark.slow
def test_a_sample_of_a_288_expert_tensor_is_near_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "288", Shape(n_layer=2, n_dense=1, n_expert=288, n_used=8, expert=256), seed=6)
    monkeypatch.setattr(measure, "MEASURED_TYPES", (T.Q4_0, T.Q8_0))
    with Counting(path) as checkpoint:
        plan = plan_source(checkpoint, tmp_path / "x.gguf", Options(load_recipe("Q8_0")))
        [tensor] = [t for t in plan.tensors if t.role == "ffn_up_exps"]
        [sampled] = measure_errors(checkpoint, [tensor], tmp_path / "sampled.jsonl", threads=1).values()
        assert len(checkpoint.read) < 288 * 2 + 10
        monkeypatch.setattr(measure, "RUN_ROWS", 256)
        [whole] = measure_errors(checkpoint, [tensor], tmp_path / "whole.jsonl", threads=1).values()
    # Rows of this tensor differ in energy by a factor of 9; the mean of 2,304 of them has a standard error of 1.1 %.
    assert sampled.energy == pytest.approx(whole.energy, rel=0.045)
    assert sampled.errors[T.Q4_0] == pytest.approx(whole.errors[T.Q4_0], rel=0.045)
