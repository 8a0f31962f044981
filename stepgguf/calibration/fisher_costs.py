"""What each type would cost each tensor in KL divergence, from the gradients of a pass backwards.

    cost[tensor, type] = 1 / (2 n)  sum over tokens t, rows r of  g_tr^2 (d_r x_t)^2        nats per token

    d_r = q_r - w_r     what encoding changes in row r           x_t    what the tensor is given for token t
    g_tr                d loss / d y_tr, y = W x                 n      tokens whose predictions are in the loss

It is the second-order term of the divergence, for the real errors of the real rows, with two things left out: products
g_r g_s of two rows of a token, and of two tokens. Rows are rounded independently, so their products cancel.

A few rows are encoded of each expert, the runs that `measure` takes too; the sum over rows is that over the sampled
ones, scaled by the squared gradient of all rows against theirs. The embedding's rows are not alike at all: those of a
few frequent ids have nearly all of the gradient, so they are drawn by that.

Experts that no token reached add nothing. What no gradient sees is a token whose experts change: of small errors that
is most of the divergence, so a file of well-chosen types has more than is predicted, a large file several times more.

Measured on two copies of the embedded model through llama.cpp (python -m benchmarks.allocation --fisher --copies 2), in
the bytes of stock Q2_K, Q3_K_M, Q4_K_S, Q5_K_M: types by these costs have 0.12 ± 0.02, 0.35 ± 0.06, 0.61 ± 0.24 and
0.52 ± 0.16 of stock's KL divergence; by objective.py's 0.24, 0.51, 0.81 and 0.76.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import possible_types, sample_runs
from stepgguf.convert.pipeline import Compiling, RowMaker
from stepgguf.convert.plan import PlannedTensor, choose_action
from stepgguf.convert.sizes import take_inventory
from stepgguf.convert.sources.source import TensorSource, rows_per_expert
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants.kernels import decoder_for
from stepgguf.quants.values import widen
from stepgguf.reference.backward import BackwardStream

EMBEDDING = TensorName("token_embd.weight")
EMBEDDING_ROWS = 256  # that are drawn of the embedding
_KEPT = 16  # tensors' sampled errors: a layer has eight dense ones, of 50 to 150 MB at real size

Floats = NDArray[np.float32]
Runs = Sequence[tuple[int, int]]  # [start, stop) of rows, counted through all experts


@dataclass(frozen=True, eq=False, slots=True)
class _SampledErrors:
    """Of some rows of a matrix, counted inside it: q - w as each type, [types * rows, columns]."""

    rows: NDArray[np.int64]
    errors: Tensor


class _Sums:
    """Of one matrix, over its tokens: g^2 (d x)^2 of the sampled rows as each type; g^2 of these rows and of all."""

    def __init__(self, n_types: int) -> None:
        self.lost, self.sampled, self.all = np.zeros(n_types), 0.0, 0.0

    @property
    def scaled(self) -> NDArray[np.float64]:
        """What all rows lose."""
        return self.lost * (self.all / self.sampled) if self.sampled else self.lost


class FisherCosts:
    """Observer of a pass backwards: see above. `compiling` is called with a type's name before its kernel is compiled.

    n_predicted: tokens whose predictions are in the loss.
    """

    name = "fisher-costs"

    def __init__(
        self,
        source: TensorSource,
        importance: Importance | None,
        n_predicted: int,
        *,
        threads: int | None = None,
        compiling: Compiling = lambda name: None,
    ) -> None:
        self._source, self._importance, self._n_predicted = source, importance, n_predicted
        self._threads, self._maker = threads or os.cpu_count(), RowMaker(source, importance)
        self._specs = {spec.name: spec for spec in take_inventory(source).matrices}
        self._variants = {name: self._as_each_type(spec) for name, spec in self._specs.items()}
        self._maker.compile_kernels([t for each in self._variants.values() for t in each], compiling)
        self._sample = lru_cache(_KEPT)(self._sample_errors)
        self._sums: dict[tuple[TensorName, int], _Sums] = {}
        self._embedding: NDArray[np.float64] | None = None  # |g|^2 by token ids

    @property
    def settings(self) -> Mapping[str, object]:
        return {"importance": self._importance.identity() if self._importance is not None else None}

    def add_product(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        sample, squares = self._sample(name, expert), g.square()
        at_rows = squares[:, torch.from_numpy(sample.rows).to(g.device)]
        outputs = F.linear(x, sample.errors.to(x.device)).square().view(len(x), -1, at_rows.shape[1])
        sums = self._sums.setdefault((name, expert), _Sums(outputs.shape[1]))
        sums.lost += (outputs * at_rows[:, None]).sum((0, 2), dtype=torch.float64).cpu().numpy()
        sums.sampled += float(at_rows.sum())
        sums.all += float(squares.sum())

    def add_embedding(self, tokens: NDArray[np.int32], g: Tensor) -> None:
        if self._embedding is None:
            self._embedding = np.zeros(self._specs[EMBEDDING].shape[0])
        np.add.at(self._embedding, tokens, g.square().sum(1).double().cpu().numpy())

    def take(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by "TENSOR TYPE"."""
        lost: dict[TensorName, NDArray[np.float64]] = {}
        for (name, _), sums in self._sums.items():
            lost[name] = lost.get(name, 0.0) + sums.scaled
        if self._embedding is not None:
            lost[EMBEDDING] = self._lost_embedding(self._embedding)
        self._sums.clear()
        self._embedding = None
        return {
            f"{name} {variant.ggml_type.name}": np.array(nats / (2 * self._n_predicted))
            for name, values in lost.items()
            for variant, nats in zip(self._variants[name], values, strict=True)
        }

    def costs(self, backward: BackwardStream) -> TypeCosts:
        """The costs of every type that each tensor of the trunk can have, after a whole pass with this observer."""
        found = backward.found(self.name)
        return {
            name: {v.ggml_type: float(found.get(f"{name} {v.ggml_type.name}", np.float64(0))) for v in variants}
            for name, variants in self._variants.items()
        }

    def _as_each_type(self, spec: TensorSpec) -> list[PlannedTensor]:
        stored = self._source.tensors[spec.source]
        return [
            PlannedTensor(spec.name, spec.shape, g, "candidate", choose_action(spec.name, stored, g, self._importance))
            for g in sorted(possible_types(spec.name, spec.shape, self._importance))
        ]

    def _sample_errors(self, name: TensorName, expert: int) -> _SampledErrors:
        shape = self._specs[name].shape
        runs = sample_runs(shape, expert)
        rows = np.concatenate([np.arange(*run) for run in runs]) - expert * rows_per_expert(shape)
        return _SampledErrors(rows, torch.from_numpy(self._encode(name, runs).reshape(-1, shape[-1])))

    def _lost_embedding(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the embedding loses as each type; an id's error is that of its row, whatever its direction."""
        sums = weights.cumsum()
        points = (np.arange(EMBEDDING_ROWS) + 0.5) / EMBEDDING_ROWS * sums[-1]
        ids = np.minimum(np.searchsorted(sums, points), len(sums) - 1)
        errors = self._encode(EMBEDDING, [(row, row + 1) for row in ids.tolist()])
        lost: NDArray[np.float64] = np.square(errors, dtype=np.float64).mean((1, 2)) * sums[-1]
        return lost

    def _encode(self, name: TensorName, runs: Runs) -> Floats:
        """q - w of these rows as each type, [types, rows, columns]."""
        values = np.concatenate([self._values(name, start, stop) for start, stop in runs])

        def encode(tensor: PlannedTensor) -> Floats:
            blocks = np.concatenate([self._maker.make_rows(tensor, start, stop)[0] for start, stop in runs])
            decoded = np.empty_like(values)
            decoder_for(tensor.ggml_type).decode(blocks, decoded)
            decoded -= values
            return decoded

        with ThreadPoolExecutor(self._threads) as pool:
            return np.stack(list(pool.map(encode, self._variants[name])))

    def _values(self, name: TensorName, start: int, stop: int) -> Floats:
        stored = self._source.values(self._specs[name].source, start, stop)
        values = np.empty(stored.shape, np.float32)
        widen(stored, values)
        return values
