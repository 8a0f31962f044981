"""The sequential pass: which tokens it counts, against float64 sums over what the exact model is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration import expert_codes, sequential
from stepgguf.calibration.held_out import HeldOut, held_out_tokens, thinned
from stepgguf.calibration.moments import PairMoments
from stepgguf.calibration.sequential import SequentialPass
from stepgguf.model.names import TensorName
from stepgguf.reference.token_rows import PADDING, TokenRows
from tests.calibration import passes
from tests.calibration.passes import SHAPE, ExactPasses, exact_passes

EMBEDDING = "token_embd.weight"
PRIOR = expert_codes.PRIOR_TOKENS


class InputRecorder:
    """Keeps what each product is given, and by which tokens: (tensor, expert) -> places [n], x [n, columns]."""

    name = "inputs"
    settings: Mapping[str, object] = {}

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], list[tuple[Any, Any]]] = {}

    def add_product(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        self._parts.setdefault((name, expert), []).append((places, x.double().numpy()))

    def add_embedding(self, tokens: NDArray[np.int32], g: Tensor) -> None: ...

    def take(self) -> dict[str, NDArray[np.generic]]:
        return {}

    def inputs(self, name: str, expert: int, columns: int) -> tuple[Any, Any]:
        parts = self._parts.get((name, expert), [(np.empty(0, int), np.empty((0, columns)))])
        places, x = (np.concatenate(column) for column in zip(*parts, strict=True))
        return places, x


class Keeper:
    """A code search that keeps the weights, and what it was given to choose by."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], tuple[PairMoments, HeldOut]] = {}
        self.layers = 0

    def choose(self, name: TensorName, expert: int, weights: Tensor, moments: PairMoments, held_out: HeldOut) -> Tensor:
        assert (name, expert) not in self.seen
        self.seen[name, expert] = moments, held_out
        return weights

    def end_layer(self) -> None:
        self.layers += 1


@pytest.fixture(scope="module")
def recorder() -> InputRecorder:
    return InputRecorder()


@pytest.fixture(scope="module")
def exact(recorder: InputRecorder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExactPasses]:
    folder = tmp_path_factory.mktemp("exact")
    with exact_passes(passes.checkpoint(folder), passes.rows(), folder, [recorder]) as opened:
        yield opened


def run(exact: ExactPasses, n_threads: int = 1) -> Keeper:
    """The pass with a search that changes nothing; the exact states stay for other tests."""
    keeper = Keeper()
    drop, exact.exact.folder.drop_states = exact.exact.folder.drop_states, lambda layer: None  # type: ignore[method-assign]
    try:
        passed = SequentialPass(
            exact.exact, keeper, exact.weights_of, exact.at_embedding, identity={}, n_threads=n_threads
        )
        passed.restart()
        passed.run()
    finally:
        exact.exact.folder.drop_states = drop  # type: ignore[method-assign]
    return keeper


@pytest.fixture(scope="module")
def keeper(exact: ExactPasses) -> Keeper:
    return run(exact)


def test_with_all_weights_kept_the_two_streams_are_the_same_to_the_bit(exact: ExactPasses) -> None:
    run(exact, n_threads=3)
    found = passes.last_states(exact.exact)
    here = passes.rows().text
    np.testing.assert_array_equal(found[here], np.array(exact.exact.folder.states(SHAPE.n_layer))[here])


def test_every_matrix_of_the_trunk_is_chosen_once(exact: ExactPasses, keeper: Keeper) -> None:
    expected = {
        (spec.name, expert)
        for spec in exact.source.specs
        if spec.is_quantizable and not spec.is_mtp
        for expert in range(spec.shape[0] if len(spec.shape) == 3 else 1)
    }
    assert keeper.seen.keys() == expected
    assert keeper.layers == 1 + SHAPE.n_layer + 1


def weights_of(exact: ExactPasses, name: TensorName) -> Any:
    """What tokens weigh: matrices that read the same share their moments, and so the sum of their weights."""
    together = [("attn_q", "attn_k", "attn_v", "attn_gate"), ("ffn_gate", "ffn_up")]
    together += [("ffn_gate_shexp", "ffn_up_shexp"), ("ffn_gate_exps", "ffn_up_exps")]
    roles = next((roles for roles in together if name.role in roles), (name.role,))
    names = [name if role == name.role else TensorName(f"blk.{name.layer}.{role}.weight") for role in roles]
    return sum(exact.weights_of(each).astype(np.float64) for each in names)


def test_moments_are_of_text_that_is_not_held_out_as_tokens_weigh(
    exact: ExactPasses, keeper: Keeper, recorder: InputRecorder
) -> None:
    """Streams that agree give the exact model's inputs; the pass backwards has shown them, token by token."""
    held, guard = held_out_tokens(passes.rows()).ravel(), passes.rows().guard.ravel()
    assert held.sum() == passes.ROW  # one row
    thin = 0
    for (name, expert), (moments, tried) in keeper.seen.items():
        if name == EMBEDDING:
            continue
        sample = tried.text
        places, x = recorder.inputs(name, expert, len(moments.second))
        w = weights_of(exact, TensorName(name))[places]
        out, beside = held[places], guard[places]
        seen = ~(out | beside)
        h = np.einsum("t,ti,tj->ij", w[seen], x[seen], x[seen])
        total, n = w[seen].sum(), seen.sum()
        if TensorName(name).is_expert:
            thin += n < 10
            h, total = h + prior(keeper, TensorName(name), h, total, n), total + PRIOR * (total / n if n else 1.0)
        if name == "output.weight":  # a document's last token predicts nothing, and weighs nothing
            assert moments.n_own == (passes.rows().text.ravel() & ~(held | guard)).sum()
        else:
            assert moments.n_own == n
        assert moments.total == pytest.approx(total, rel=1e-4)
        # Float32 forward passes in other chunks, sums over 400 tokens.
        np.testing.assert_allclose(moments.second.numpy(), h, rtol=0, atol=1e-4 * np.abs(h).max())
        assert not moments.cross.any()
        weighs = sample.weights > (0 if name == "output.weight" else -1)
        np.testing.assert_allclose(sample.weights[weighs].numpy(), w[out], rtol=1e-4)
        if out.any():
            np.testing.assert_allclose(sample.exact[weighs].numpy(), x[out], rtol=0, atol=1e-4 * np.abs(x).max())
        assert torch.equal(sample.exact, sample.quantized)
        if name != "output.weight" and beside.any():  # nothing is predicted of guard tokens, so the head shows none
            np.testing.assert_allclose(tried.guard.exact.numpy(), x[beside], rtol=0, atol=1e-4 * np.abs(x).max())
        assert (tried.guard.weights == 1).all()
    assert thin  # the shape has experts that hardly any token goes to


def test_the_embedding_is_chosen_for_the_gradients_there(exact: ExactPasses, keeper: Keeper) -> None:
    moments, tried = keeper.seen[EMBEDDING, 0]
    text, held = passes.rows().text.ravel(), held_out_tokens(passes.rows()).ravel()
    g = np.array(exact.at_embedding).reshape(len(text), -1).astype(np.float64)
    assert g[passes.rows().predicted.ravel()].any(1).all()
    assert not g[passes.rows().guard.ravel()].any()
    seen = g[text & ~(held | passes.rows().guard.ravel())]
    h = seen.T @ seen
    share, n_prior = len(seen) / (len(seen) + 4 * len(h)), 4 * len(h)
    mean = h.diagonal() / len(seen)
    h += n_prior * np.diag(share * mean + (1 - share) * mean.mean())
    np.testing.assert_allclose(moments.second.numpy(), h, rtol=0, atol=1e-5 * h.diagonal().max())
    assert moments.n_own == len(seen)
    assert not moments.cross.any()
    np.testing.assert_array_equal(tried.text.exact.numpy(), g[held].astype(np.float32))
    assert (tried.text.weights == 1).all()


def prior(keeper: Keeper, name: TensorName, h: Any, total: float, n: int) -> Any:
    """What an expert's moments have besides its own tokens."""
    per_token = total / n if n else 1.0
    if name.role != "ffn_down_exps":
        pool = keeper.seen[f"blk.{name.layer}.ffn_up_shexp.weight", 0][0]
        return PRIOR * per_token * pool.second.double().numpy() / pool.total
    mine = h.diagonal() / max(total, 1e-30)
    share = n / (n + PRIOR)
    return PRIOR * per_token * np.diag(share * mine + (1 - share) * mine.mean())


def test_threads_choose_by_the_same_moments(exact: ExactPasses, keeper: Keeper) -> None:
    for key, (moments, tried) in run(exact, n_threads=3).seen.items():
        other, other_tried = keeper.seen[key]
        assert torch.equal(moments.second, other.second)
        assert torch.equal(tried.text.exact, other_tried.text.exact)
        assert torch.equal(tried.guard.exact, other_tried.guard.exact)


def test_an_expert_with_many_tokens_is_chosen_by_some_of_them_evenly(
    exact: ExactPasses, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_codes, "MOMENT_TOKENS", 10)
    monkeypatch.setattr(sequential, "SAMPLE_TOKENS", 5)
    for (name, expert), (moments, tried) in run(exact).seen.items():
        before, before_tried = keeper.seen[name, expert]
        if TensorName(name).is_expert:
            most = before.n_own + len(before_tried.text.weights) + len(before_tried.guard.weights)
            step = max(1, -(-most // 10))
            assert moments.n_own + len(tried.text.weights) + len(tried.guard.weights) == -(-most // step)
        else:
            assert moments.n_own == before.n_own
            assert torch.equal(tried.text.exact, before_tried.text.exact[::10])
            assert torch.equal(tried.guard.exact, before_tried.guard.exact[::8])


def test_what_enters_layers_that_are_done_is_removed(tmp_path: Path) -> None:
    with exact_passes(passes.checkpoint(tmp_path), passes.rows(), tmp_path) as opened:
        SequentialPass(opened.exact, Keeper(), opened.weights_of, opened.at_embedding, identity={}, n_threads=1).run()
    for folder in ("exact", "exact/quantized"):
        kept = sorted(path.name for path in (tmp_path / folder).glob("s*-*"))
        assert kept == [f"states-{SHAPE.n_layer:03d}"]


def test_one_row_in_eight_is_held_out() -> None:
    text = TokenRows.of(np.zeros((17, 6), np.int32))
    assert [int(row) for row in np.flatnonzero(held_out_tokens(text).any(1))] == [7, 15]
    assert held_out_tokens(text)[7].all()


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_of_few_rows_the_last_eighth_of_each_one_s_text_is(n_rows: int) -> None:
    documents = np.zeros((n_rows, 40), np.int32)
    documents[0, 16:] = PADDING
    held = held_out_tokens(TokenRows(np.zeros_like(documents), documents))
    assert list(np.flatnonzero(held[0])) == [14, 15]
    assert all(list(np.flatnonzero(row)) == [35, 36, 37, 38, 39] for row in held[1:])


def test_of_many_places_some_are_picked_evenly() -> None:
    mask = np.zeros(100, bool)
    mask[10:50] = True
    assert list(np.flatnonzero(thinned(mask, 10))) == list(range(10, 50, 4))
    assert thinned(mask, 40).sum() == 40
    assert not thinned(np.zeros(5, bool), 3).any()
