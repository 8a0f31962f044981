"""How fast a model answers: generating reads memory, and little else. Pure arithmetic.

    bytes of a step   dense weights once; of the routed experts those that the step's tokens choose; the KV cache
    tok/s             bandwidth x efficiency / bytes of a step

    a step of k tokens chooses a given expert with probability 1 - (1 - n_used / n_expert)^k, if tokens choose
    independently: an expert's byte costs 8/288 of a dense one for k = 1, less than 2 x 8/288 for k = 2
    with MTP a step is n drafted tokens and one more: the heads' weights once per draft, then a step of n + 1 tokens,
    which yields 1 + n x (accepted share) tokens

Where there are cards, a step reads in two places, one after the other, each with its bandwidth.

Efficiency is the machine's, from published speeds (machines.toml). One figure explains how speed falls with the
context; files and builds differ in it. `python -m benchmarks.speed_model` prints what was measured and predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from stepgguf.fit.memory import ContextParams, Footprint, memory_need, saved_state_bytes
from stepgguf.model.names import TensorName
from stepgguf.runtime.placement import Attention

# Drafts of a step and the share of them that was accepted, lowest and highest, with all three heads (llama.cpp #24340).
DRAFTED, ACCEPTED = 2, (0.65, 0.91)
# The median error of published speeds predicted by what others published for its chip (benchmarks.speed_model).
SOURCE_ERROR = 0.28


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a step reads, in bytes: of RAM, or of the one memory that there is, and of cards."""

    ram: float
    cards: float = 0.0

    @property
    def total(self) -> float:
        return self.ram + self.cards

    def seconds(self, bandwidth: float, card_bandwidth: float | None) -> float | None:
        """The least time that reading takes, in seconds; None for cards alone of unknown bandwidth.

        Cards of unknown bandwidth beside RAM are not counted. Bandwidth in bytes per second.
        """
        if card_bandwidth is None:
            return self.ram / bandwidth if self.ram else None
        return self.ram / bandwidth + self.cards / card_bandwidth


def efficiency_range(measured: Sequence[float]) -> tuple[float, float]:
    """Least and most of a chip's efficiency: all that was measured, and at least SOURCE_ERROR around its median."""
    middle = median(measured)
    return min(*measured, middle * (1 - SOURCE_ERROR)), max(*measured, middle * (1 + SOURCE_ERROR))


def expert_share(n_used: int, n_expert: int, n_tokens: int = 1) -> float:
    """The expected share of the routed experts that a step of n_tokens reads."""
    return 1.0 - (1.0 - n_used / n_expert) ** n_tokens


def read_bytes(name: TensorName, n_bytes: int, share: float) -> float:
    """What a step reads of a trunk tensor, in bytes; share: expert_share()."""
    if name.role == "token_embd":  # one row for each token, some kB
        return 0.0
    return n_bytes * share if name.is_expert else float(n_bytes)


def step_bytes(tensors: Iterable[tuple[TensorName, int]], share: float) -> float:
    """What a step reads of a whole trunk, given as (name, bytes) of each tensor."""
    return sum(read_bytes(name, n_bytes, share) for name, n_bytes in tensors)


def kv_read_bytes(model: Footprint, depth: int) -> int:
    """Bytes of the KV cache that a step reads after `depth` tokens.

    A full-attention layer reads the cells of all tokens, a sliding one at most those of its sliding window.
    """
    full = replace(model, layers=tuple(layer for layer in model.trunk_layers if not layer.is_sliding))
    sliding = replace(model, sliding_window=min(model.sliding_window, depth))
    return memory_need(full, ContextParams(depth)).kv + saved_state_bytes(sliding, Attention())


def mtp_gain(one: float, several: float, drafting: float, tokens: float) -> float:
    """How many times as fast a model answers with MTP.

    one, several: bytes of a step of one token, and of one with the drafted tokens too. drafting: bytes that drafting
    them reads. tokens: the expected yield of a step.
    """
    return tokens * one / (several + drafting)
