"""An importance matrix by layer streaming: what llama-imatrix records, of a model that does not fit into memory.

Quantization asks what each weight's error does to the output: the error of a product W x is weighted by E[x_j^2], one
number per input channel j. So every product is watched while calibration text runs through the model:

    for each product  y = W x:   in_sum2[tensor, expert, j] += x_j^2   in_sum[...] += x_j   counts[tensor, expert] += 1

The counting is that of llama.cpp's tool (tools/imatrix/imatrix.cpp, collect_imatrix): an expert counts only the tokens
that were routed to it, and the router's weight plays no part. Two differences: sums of more than a few thousand tokens
are made in float64, where the tool adds float32; and the MTP blocks are there. The router is left out: it stays F32.

A text may run in parts, each a pass through the whole model, until every expert has seen enough tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.errors import ImatrixError
from stepgguf.model.names import TensorName
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry
from stepgguf.reference.stream import LayerStream, Progress
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import EXPERT_ROLES, WeightReader

FIRST_PART_TOKENS = 65_536  # of a balanced run; 1,820 for an expert of the published model, if all get the same

Arrays = dict[str, NDArray[np.generic]]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ThinExpert:
    """An expert that saw few tokens."""

    layer: int
    expert: int
    tokens: int


class ActivationSums:
    """An observer that sums the inputs of every product, per tensor and expert.

    What it finds, of a tensor NAME: NAME.in_sum2 and NAME.in_sum, float64 [n_matrix, columns], and NAME.counts, float64
    [n_matrix, 1]; n_matrix is the number of experts, or 1.
    """

    name = "imatrix"

    def __init__(self, n_expert: int) -> None:
        self._n_expert = n_expert
        self._sums: dict[str, Doubles] = {}

    def add_product(self, name: TensorName, expert: int, x: Tensor, y: Tensor) -> None:
        # The sums of one call, of at most some thousand tokens, are float32 on the device: not each has float64.
        n_matrix = self._n_expert if name.is_expert else 1
        for kind, values in (("in_sum2", x.square().sum(0)), ("in_sum", x.sum(0)), ("counts", x.new_tensor([len(x)]))):
            key = f"{name}.{kind}"
            if key not in self._sums:
                self._sums[key] = np.zeros((n_matrix, len(values)))
            self._sums[key][expert] += values.cpu().numpy()

    def take(self) -> Arrays:
        found, self._sums = self._sums, {}
        return dict(found)


def whole_text(rows: TokenRows) -> list[slice]:
    """All rows as one part."""
    return [slice(0, rows.n_rows)]


def growing_parts(rows: TokenRows) -> Iterator[slice]:
    """The rows in parts: the first of FIRST_PART_TOKENS, each of the others as large as all before it."""
    start, stop = 0, max(1, FIRST_PART_TOKENS // rows.row_length)
    while start < rows.n_rows:
        yield slice(start, min(stop, rows.n_rows))
        start, stop = stop, 2 * stop


def collect_imatrix(
    reader: WeightReader,
    rows: TokenRows,
    parts: Iterable[slice],
    folder: Path,
    *,
    datasets: Sequence[str] = (),
    progress: Progress = lambda done: None,
) -> Iterator[Imatrix]:
    """Run parts of the rows, and yield after each the importance matrix of all that has run.

    The folder is gone on with if it holds some of the same; it is the caller's to remove. ImatrixError if the model
    gives what is no number.
    """
    sums: dict[str, Doubles] = {}
    for number, part in enumerate(parts):
        observer = ActivationSums(reader.hp.n_expert)
        stream = LayerStream(reader, rows[part], folder / f"part-{number}", observers=[observer], progress=progress)
        stream.run_all()
        for key, found in stream.found()[observer.name].items():
            sums[key] = sums.get(key, 0.0) + found.astype(np.float64)
        yield Imatrix(None, tuple(datasets), part.stop, rows.row_length, dict(_entries(sums)), reader.hp.n_mtp)


def experts_below(imatrix: Imatrix, n_tokens: int) -> list[ThinExpert]:
    """The experts that saw fewer tokens than this, layer by layer."""
    found = []
    for name, entry in imatrix.entries.items():
        layer = TensorName(name).layer
        if TensorName(name).role == EXPERT_ROLES[0] and layer is not None:
            found += [ThinExpert(layer, i, int(n)) for i, n in enumerate(entry.counts.tolist()) if n < n_tokens]
    return sorted(found, key=lambda expert: (expert.layer, expert.expert))


def _entries(sums: Mapping[str, Doubles]) -> Iterator[tuple[str, ImatrixEntry]]:
    for name in sorted({key.rpartition(".")[0] for key in sums}):
        squares, linear, counts = (
            sums[f"{name}.{kind}"].astype(np.float32) for kind in ("in_sum2", "in_sum", "counts")
        )
        if not np.isfinite(squares).all():
            raise ImatrixError(
                f"{name}: its inputs are not finite", hint="The model's weights are damaged; get its files again."
            )
        yield name, ImatrixEntry(squares, counts[:, 0], linear=linear)
