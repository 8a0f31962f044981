"""What a stream will take, said before it starts: memory, and files in its working folder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.tensors import TensorSpec, tensor_specs
from stepgguf.reference.stream import CHUNK_TOKENS, HEAD_TOKENS
from stepgguf.reference.token_rows import TokenRows

_PROCESS = 400 * 2**20  # Python with torch and what it loads
_FLOAT, _DOUBLE = 4, 8  # bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Estimates in bytes. disk: of files that are there at the same time, mapped. memory: without what is mapped."""

    disk: int
    memory: int


def stream_footprint(hp: HParams, rows: TokenRows) -> Footprint:
    """What running these rows through a model takes."""
    states = rows.n_rows * rows.row_length * hp.hidden_size * _FLOAT
    head = hp.vocab_size * hp.hidden_size + HEAD_TOKENS * hp.vocab_size
    largest = max([head, *(_layer_values(hp, layer, rows.row_length) for layer in hp.layers)])
    # Three states: what enters a layer, what leaves it, what its experts read.
    return Footprint(disk=3 * states, memory=_PROCESS + _FLOAT * largest)


def imatrix_footprint(hp: HParams, rows: TokenRows) -> Footprint:
    """The same with an importance matrix of all products: its sums so far, and those of a part."""
    stream = stream_footprint(hp, rows)
    sums = _DOUBLE * sum(_n_sums(spec) for spec in tensor_specs(hp) if spec.is_quantizable)
    return Footprint(disk=stream.disk + sums, memory=stream.memory + 2 * sums)


def _n_sums(spec: TensorSpec) -> int:
    """Sums of x, of x^2 and of tokens."""
    return math.prod(spec.shape[:-2]) * (2 * spec.shape[-1] + 1)


def _layer_values(hp: HParams, layer: Layer, row_length: int) -> int:
    """Values in memory while the tokens of a chunk pass a layer: its matrices but the experts', and activations.

    Measured at the published sizes, attention takes 4 times what its queries take.
    """
    weights = sum(math.prod(s.shape) for s in tensor_specs(hp) if s.layer == layer.index and not s.name.is_expert)
    queries = layer.n_head * hp.head_dim
    hidden_units = hp.shared_expert_size if layer.is_moe else hp.intermediate_size
    logits = hp.vocab_size if layer.is_mtp else 0
    tokens = max(CHUNK_TOKENS, row_length)
    return weights + tokens * (4 * hp.hidden_size + max(4 * queries, 4 * hidden_units) + logits)
