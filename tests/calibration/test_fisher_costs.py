"""Costs of types and weights of tokens, against plain sums over the gradients that the same pass shows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.calibration.fisher_costs import FisherCosts
from stepgguf.calibration.token_weights import TokenWeights, read_token_weights
from stepgguf.convert import measure
from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import possible_types, sample_runs
from stepgguf.convert.sizes import take_inventory
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import ggml
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, write_imatrix
from stepgguf.quants.types import row_size
from stepgguf.quants.values import widen
from stepgguf.reference.backward import BackwardStream, GradientObserver
from stepgguf.reference.stream import LayerStream
from tests.generate import Shape, write_checkpoint
from tests.reference.test_backward import EMBEDDED, Recorder, rows, streamed

pytestmark = pytest.mark.slow
T = GGMLQuantizationType
TESTED_TYPES = (T.IQ2_XS, T.Q4_K, T.Q8_0)  # each type's kernel is compiled once on a new machine
N_PREDICTED = int(rows().predicted.sum())


@pytest.fixture(autouse=True)
def _few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_TYPES", TESTED_TYPES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and one with three experts, whose rows all types divide."""
    shape = Shape(n_layer=2, n_dense=1, n_expert=3, dense=256, heads=(4, 4))
    return write_checkpoint(tmp_path_factory.mktemp("costs") / "model", shape, seed=2)


@pytest.fixture(scope="module")
def stream(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerStream]:
    with streamed(checkpoint, tmp_path_factory.mktemp("stream")) as opened:
        yield opened


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Iterator[Checkpoint]:
    with Checkpoint(checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def importance(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Importance:
    """Of all products, but not of the embedding."""
    rng, entries = np.random.default_rng(0), {}
    for spec in take_inventory(source).matrices:
        if spec.name != EMBEDDED:
            n = spec.shape[0] if len(spec.shape) == 3 else 1
            sums = rng.gamma(1.0, 50.0, (n, spec.shape[-1])).astype(np.float32)
            entries[spec.name] = ImatrixEntry(sums, np.full(n, 50, np.float32))
    path = tmp_path_factory.mktemp("importance") / "imatrix.gguf"
    write_imatrix(Imatrix(None, ("made up",), 1, 1, entries), path)
    return Importance.read(path)


def run(stream: LayerStream, *observers: GradientObserver) -> tuple[BackwardStream, Recorder]:
    recorder = Recorder(rows().text.size)
    backward = BackwardStream(stream, observers=[*observers, recorder])
    backward.folder.clear()  # tests share a stream's folder
    backward = BackwardStream(stream, observers=[*observers, recorder])
    backward.run()
    return backward, recorder


@functools.cache  # several tests ask for the same ones
def matrix_errors(
    source: Checkpoint, spec: TensorSpec, expert: int, ggml_type: GGMLQuantizationType, importance: Importance
) -> NDArray[np.float64]:
    """q - w of all rows of an expert [rows, columns]: ggml's encoder, gguf-py's decoder."""
    n = spec.shape[-2]
    stored = source.values(spec.source, expert * n, (expert + 1) * n)
    values = np.empty(stored.shape, np.float32)
    widen(stored, values)
    weights = importance.rows(spec.name, spec.shape)
    row = None if weights is None else np.ascontiguousarray(weights[expert if len(weights) > 1 else 0])
    blocks = np.empty((n, row_size(ggml_type, values.shape[1])), np.uint8)
    library = ggml.load_library()
    assert library is not None
    library.quantize(ggml_type, values, blocks, row)
    decoded: NDArray[np.float64] = gguf.quants.dequantize(blocks, ggml_type).reshape(values.shape).astype(np.float64)
    return decoded - values


@pytest.mark.parametrize("runs", [4, 10_000], ids=["a few rows", "all rows"])
def test_a_cost_is_half_the_squared_error_by_the_squared_gradient(
    runs: int, stream: LayerStream, source: Checkpoint, importance: Importance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MIN_RUNS", runs)
    costs = FisherCosts(source, importance, N_PREDICTED, threads=1)
    backward, recorder = run(stream, costs)
    found = costs.costs(backward)
    for spec in take_inventory(source).matrices:
        types = possible_types(spec.name, spec.shape, importance)
        assert found[spec.name].keys() == types
        if spec.name == EMBEDDED:
            continue
        for ggml_type in types:
            expected = 0.0
            for expert in range(spec.shape[0] if len(spec.shape) == 3 else 1):
                g, x = (kept[spec.name, expert].double().numpy() for kept in (recorder.gradients, recorder.inputs))
                start = expert * spec.shape[-2]
                sampled = np.concatenate([np.arange(*r) for r in sample_runs(spec.shape, expert)]) - start
                d = matrix_errors(source, spec, expert, ggml_type, importance)[sampled]
                expected += ((g[:, sampled] * (x @ d.T)) ** 2).sum() * (g**2).sum() / (g[:, sampled] ** 2).sum()
            # Float32 products, float64 sums: at most 5e-7 measured.
            assert found[spec.name][ggml_type] == pytest.approx(expected / (2 * N_PREDICTED), rel=5e-6)


def test_the_embedding_s_cost_is_that_of_its_rows_by_how_much_they_count(
    stream: LayerStream, source: Checkpoint, importance: Importance
) -> None:
    costs, weights = FisherCosts(source, importance, N_PREDICTED, threads=1), TokenWeights(rows().text.size, 768)
    backward, _ = run(stream, costs, weights)
    [spec] = [spec for spec in take_inventory(source).matrices if spec.name == EMBEDDED]
    by_id = read_token_weights(backward, TensorName(EMBEDDED))
    for ggml_type, cost in costs.costs(backward)[EMBEDDED].items():
        errors = matrix_errors(source, spec, 0, ggml_type, importance)
        expected = (by_id * (errors**2).mean(1)).sum() / (2 * N_PREDICTED)
        # 256 draws among some 230 ids, each as often as it counts but for a rounding of 0.3, of errors that differ by
        # 0.6 of their mean: 0.3 * 0.6 * sqrt(230) / 256 is 1.1 %.
        assert cost == pytest.approx(expected, rel=0.05)


def test_a_token_s_weight_is_its_squared_gradient_over_the_experts_that_it_uses(stream: LayerStream) -> None:
    observer = TokenWeights(rows().text.size, 768)
    backward, recorder = run(stream, observer)
    for name in {name for name, _ in recorder.gradients} - {EMBEDDED}:
        expected = sum(g.square().sum(1).numpy() for (other, _), g in recorder.gradients.items() if other == name)
        np.testing.assert_allclose(read_token_weights(backward, TensorName(name)), expected, rtol=1e-6)
    text = rows()
    at_tokens = recorder.gradients[EMBEDDED, 0].square().sum(1).double().numpy()
    expected = np.bincount(text.tokens[text.text], at_tokens, 768)
    np.testing.assert_allclose(read_token_weights(backward, TensorName(EMBEDDED)), expected, rtol=1e-5)


def test_other_importance_begins_anew(stream: LayerStream, source: Checkpoint, importance: Importance) -> None:
    weighted, plain = (FisherCosts(source, each, N_PREDICTED, threads=1) for each in (importance, None))
    run(stream, weighted)
    recorder = Recorder(rows().text.size)
    backward = BackwardStream(stream, observers=[plain, recorder])
    backward.run()
    assert recorder.gradients
    assert T.IQ2_XS not in plain.costs(backward)["output.weight"]
