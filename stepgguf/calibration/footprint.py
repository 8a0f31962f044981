"""What a stream will take, said before it starts: memory, and files in its working folder.

Of a calibration, memory is the largest of what these hold at once:

    gradients       a layer, or the head, and the activations of a chunk of tokens with what their gradients need
    dense matrices  both models' layer, eight times columns^2 of moments and their factors, a matrix five times
    experts         the same of one expert, and its tokens, for each thread

At the published widths 6.80 GB were measured and 7.26 said (benchmarks/real_layer_calibration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepgguf.calibration.expert_codes import MOMENT_TOKENS
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.tensors import TensorSpec, tensor_specs
from stepgguf.reference.stream import CHUNK_TOKENS, HEAD_TOKENS
from stepgguf.reference.token_rows import TokenRows

_PROCESS = 400 * 2**20  # Python with torch and what it loads
_FLOAT, _DOUBLE = 4, 8  # bytes
_HEAD_COPIES = 3  # of logits: with probabilities and their gradients
_MATRIX_COPIES = 5  # its values, their target, the best decoded one and the next, and one on the way
_MOMENT_COPIES = 8  # H and C, H with its ridge and the root of that; H again, scaled, and its root; one on the way


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


def calibration_footprint(hp: HParams, rows: TokenRows, n_threads: int) -> Footprint:
    """What the three passes of a calibration take, with experts worked on by so many threads."""
    states = rows.n_rows * rows.row_length * hp.hidden_size * _FLOAT
    layers = max(_layer_values(hp, layer, rows.row_length) for layer in hp.trunk_layers)
    head = hp.vocab_size * hp.hidden_size
    largest = max(
        [
            2 * layers,
            head + _HEAD_COPIES * HEAD_TOKENS * hp.vocab_size,
            *(_dense_values(hp, layer) for layer in hp.trunk_layers),
            _MATRIX_COPIES * head,
            n_threads * _expert_values(hp, rows.n_tokens),
        ]
    )
    # What enters each layer is kept. Besides: what enters and leaves the quantized one, both models' middle states, and
    # what their experts read; or as many files of the pass backwards.
    return Footprint(disk=(hp.n_layer + 1 + 6) * states, memory=_PROCESS + _FLOAT * largest)


def expert_threads(hp: HParams, rows: TokenRows, n_threads: int, memory: int) -> int:
    """How many of the threads can work on an expert each within so many bytes; at least one."""
    return max(1, min(n_threads, (memory - _PROCESS) // (_FLOAT * _expert_values(hp, rows.n_tokens))))


def _dense_values(hp: HParams, layer: Layer) -> int:
    """While codes of a layer's dense matrices are chosen."""
    shapes = [s.shape for s in tensor_specs(hp) if s.layer == layer.index and len(s.shape) == 2 and s.is_quantizable]
    largest = max(_MOMENT_COPIES * columns**2 + _MATRIX_COPIES * rows * columns for rows, columns in shapes)
    return 2 * sum(map(math.prod, shapes)) + largest


def _expert_values(hp: HParams, n_tokens: int) -> int:
    """While codes of a routed expert are chosen, which has twice as many tokens as it would if all had the same."""
    tokens = min(2 * n_tokens * hp.n_expert_used // max(1, hp.n_expert), MOMENT_TOKENS)
    matrix = hp.expert_size * hp.hidden_size
    return _MOMENT_COPIES * hp.hidden_size**2 + (3 + _MATRIX_COPIES) * matrix + 7 * tokens * hp.hidden_size


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
