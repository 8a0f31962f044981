"""The codes of a layer's routed experts, each chosen by one thread for the tokens that the router gives to it.

An expert's moments have some tokens more: of the layer's pool where it reads what all experts read, of independent
channels where it reads its own hidden units. An expert without tokens has only those, and keeps stock codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.calibration.code_search import CodeSearch
from stepgguf.calibration.held_out import HeldOut, Mask
from stepgguf.calibration.moments import PairMoments
from stepgguf.model.layers import Layer
from stepgguf.reference.model import swiglu
from stepgguf.reference.state_folder import Floats
from stepgguf.reference.stream import CHUNK_TOKENS, EXPERTS_AHEAD, Routes, run_expert
from stepgguf.reference.weights import EXPERT_ROLES, WeightReader, expert_name

MOMENT_TOKENS = 16384  # of an expert, at most: four for each column
PRIOR_TOKENS = 8.0  # of the pool
Places = NDArray[np.int64]  # tokens, counted through all rows


@dataclass(frozen=True, eq=False, slots=True)
class ExpertCodes:
    """The routed experts of a layer and what they are given.

    normed: what they read, exact and quantized, [tokens, hidden]. pool: moments of all tokens. weights_in, weights_out:
    what errors count for each token, [tokens], at gates and ups, and at downs. held_out: of the text, guard: [tokens].
    """

    reader: WeightReader
    search: CodeSearch
    layer: Layer
    routes: Routes
    normed: Sequence[Floats]
    pool: PairMoments
    weights_in: Tensor
    weights_out: Tensor
    held_out: Mask
    guard: Mask

    def choose_all(self, n_threads: int) -> Iterator[tuple[Places, Floats]]:
        """Choose the codes of all experts; yield what each then gives, in their order.

        That is its tokens, counted through all rows, and what is to be added to each of them, [n, hidden].
        """
        n_expert, waiting = self.reader.hp.n_expert, deque[Future[tuple[Places, Floats]]]()
        pool = ThreadPoolExecutor(n_threads)
        try:
            with _one_thread_each():
                for expert in range(n_expert):
                    if expert + EXPERTS_AHEAD < n_expert:
                        self.reader.prefetch_expert(self.layer.index, expert + EXPERTS_AHEAD)
                    waiting.append(pool.submit(self._choose_and_run, expert))
                    if len(waiting) > n_threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _choose_and_run(self, expert: int) -> tuple[Places, Floats]:
        matrices, (places, weights) = self._choose(expert), self.routes.of(expert)
        given = np.empty((len(places), self.reader.hp.hidden_size), np.float32)
        for start in range(0, len(places), CHUNK_TOKENS):
            here = slice(start, start + CHUNK_TOKENS)
            x = self.reader.to_device(self.normed[1][places[here]])
            _, y = run_expert(matrices, x, self.layer.clamp)[-1]
            given[here] = (y * weights[here, None].to(y.device)).cpu().numpy()
        return places, given

    def _choose(self, expert: int) -> list[Tensor]:
        """The gate, up and down projections that the chosen codes of an expert stand for."""
        gate, up, down = (expert_name(self.layer.index, role) for role in EXPERT_ROLES)
        matrices = self.reader.expert(self.layer.index, expert)
        places = self._places(expert)
        exact, quantized = (self.reader.to_device(x[places]) for x in self.normed)
        moments, held_out = self._split(places, exact, quantized, self.weights_in)
        moments = moments.pooled_with(self.pool, PRIOR_TOKENS)
        chosen = [
            self.search.choose(name, expert, matrix, moments, held_out)
            for name, matrix in zip((gate, up), matrices, strict=False)
        ]
        exact, quantized = self._units(exact, matrices), self._units(quantized, chosen)
        moments, held_out = self._split(places, exact, quantized, self.weights_out)
        return [*chosen, self.search.choose(down, expert, matrices[2], moments.own_with(PRIOR_TOKENS), held_out)]

    def _places(self, expert: int) -> Places:
        """The expert's tokens, counted through all rows: at most MOMENT_TOKENS of them, evenly picked."""
        places = self.routes.of(expert)[0]
        return places[:: max(1, -(-len(places) // MOMENT_TOKENS))]

    def _units(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        gate, up = matrices[:2]
        return swiglu(F.linear(x, gate), F.linear(x, up), self.layer.clamp)

    def _split(self, places: Places, exact: Tensor, quantized: Tensor, weights: Tensor) -> tuple[PairMoments, HeldOut]:
        """The moments of the tokens that are not held out, and the others."""
        moments = PairMoments(exact.shape[-1], exact.device)
        held, guard = (torch.from_numpy(mask[places]) for mask in (self.held_out, self.guard))
        seen, w = ~(held | guard), weights[torch.from_numpy(places)]
        moments.add(quantized[seen], exact[seen], w[seen])
        return moments, HeldOut.of(quantized, exact, w, held, guard)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """While threads work side by side, torch uses one for each of them."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
