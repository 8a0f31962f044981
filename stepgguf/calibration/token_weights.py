"""How much an error at each token counts, at each product: the squared gradient of the loss at its output.

    weight[tensor, token] = |d loss / d y|^2,   y = W x     of routed experts summed over those that the token uses

An error e in y, of which no direction is known, costs the token about |e|^2 weight / (2 rows) nats of KL divergence:
the Fisher information's trace in place of the whole. Tokens that are certain whatever comes out weigh nearly nothing.
Codes that are chosen for the tokens' weighted moments lose less where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepgguf.model.names import TensorName
from stepgguf.reference.backward import EMBEDDING, BackwardStream
from stepgguf.reference.stream import HEAD

_EMBEDDING = TensorName("token_embd.weight")


class TokenWeights:
    """Observer of a pass backwards: see above. n_places: tokens of all rows, padding included."""

    name = "token-weights"

    def __init__(self, n_places: int, vocab_size: int) -> None:
        self._n_places, self._vocab_size = n_places, vocab_size
        self._weights: dict[TensorName, NDArray[np.float32]] = {}

    @property
    def settings(self) -> Mapping[str, object]:
        return {}

    def add_product(self, name: TensorName, expert: int, places: NDArray[np.int64], x: Tensor, g: Tensor) -> None:
        weights = self._weights.setdefault(name, np.zeros(self._n_places, np.float32))
        weights[places] += g.square().sum(1).cpu().numpy()  # each place is there once: an expert is used once

    def add_embedding(self, tokens: NDArray[np.int32], g: Tensor) -> None:
        sums = self._weights.setdefault(_EMBEDDING, np.zeros(self._vocab_size, np.float32))
        np.add.at(sums, tokens, g.square().sum(1).cpu().numpy())

    def take(self) -> dict[str, NDArray[np.generic]]:
        taken, self._weights = self._weights, {}
        return {str(name): weights for name, weights in taken.items()}


def read_token_weights(backward: BackwardStream, name: TensorName) -> NDArray[np.float32]:
    """A tensor's weights, after a pass with TokenWeights: of each token of all rows [n_rows * row_length].

    Of the embedding, whose rows are looked up, they are summed over the tokens of each id, [vocab_size].
    """
    stage = name.layer
    outside = EMBEDDING if name == _EMBEDDING else HEAD
    found = backward.found(TokenWeights.name, outside if stage is None else stage)[name]
    return found.astype(np.float32, copy=False)
