"""What a stream or a calibration will compute, counted before it runs; and how long a machine takes for it.

    exact model     layers, as a stream runs them
    gradients       the same, some of it again, and back: attention 2 + 3.3, resident products 3, experts 2
    codes           streams   the layers' places in the exact and the quantized model; attention four times
                    moments   H and C of what matrices are given          2 columns^2 a token
                    factors   of H, and of H with its ridge               columns^3 / 3
                    targets   of matrices                                 2 rows columns^2
                    search    feedback, two sweeps and guards             3.5 rows columns^2 a try, and kernels

Most of it is matrix products in float32, so their number over a machine's speed is the time, with a share for copies,
norms and the like: OVERHEAD, taken from one run of a layer of the published widths, whose passes are then within 3 %.
Of the embedded model, whose matrices are 256 wide, the prediction is a third to a half.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from stepgguf.calibration.code_search import N_TRIES
from stepgguf.calibration.expert_codes import MOMENT_TOKENS
from stepgguf.calibration.held_out import HELD_OUT
from stepgguf.calibration.sequential import PLACE_TOKENS, SAMPLE_TOKENS
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.model.tensors import tensor_specs
from stepgguf.reference.model import QUERY_BLOCK
from stepgguf.reference.token_rows import TokenRows

# Measured on one core of a 2024 server (benchmarks/second_moments, benchmarks/real_layer_calibration):
KERNEL_SECONDS = 0.18e-6  # of one core, for a weight and a try: all of encode_calibrated but its large products
ATTENTION_SLOWNESS = 1.5  # of a multiplication in attention, against one in a matrix product
ATTENTION_BACK = 3.3  # times what attention takes forward
OVERHEAD = 1.23  # of all that is no product; 1.25, 1.22 and 1.22 in the three passes

SPEED_SECONDS = 0.5  # that measuring a speed takes
SEARCH_PRODUCTS = 3.5  # rows * columns^2 of a try


@dataclass(frozen=True, slots=True)
class Work:
    """products: multiplications of matrix products, on the device. factors: on the processor, whatever the device.

    kernels: weights that kernels choose codes for, counted for each try.
    """

    products: float = 0.0
    factors: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.factors + other.factors, self.kernels + other.kernels)

    @property
    def flop(self) -> float:
        """Floating-point operations of the products: a multiplication and an addition each."""
        return 2 * (self.products + self.factors)


@dataclass(frozen=True, slots=True)
class Speed:
    """Multiplications a second, of large float32 matrix products: on the device, and on the processor's threads."""

    device: float
    processor: float
    n_threads: int

    def seconds(self, work: Work) -> float:
        """How long the work takes."""
        kernels = work.kernels * KERNEL_SECONDS / self.n_threads
        return OVERHEAD * (work.products / self.device + work.factors / self.processor + kernels)


def measure_speed(device: torch.device, n_threads: int = 1) -> Speed:
    """This machine's speed, in a second. n_threads: that run kernels."""
    processor = product_speed(torch.device("cpu"))
    return Speed(processor if device.type == "cpu" else product_speed(device), processor, n_threads)


def product_speed(device: torch.device, clock: Callable[[], float] = time.monotonic) -> float:
    """Multiplications a second of a product of an expert's size."""
    x, weights = torch.ones(2048, 4096, device=device), torch.ones(1280, 4096, device=device)
    float((x @ weights.T)[0, 0])  # to warm up; to read a value waits for the device
    started, done = clock(), 0
    while clock() - started < SPEED_SECONDS:
        float((x @ weights.T)[0, 0])
        done += len(x) * weights.numel()
    return done / (clock() - started)


Parts = Mapping[str, Work]


def imatrix_work(hp: HParams, rows: TokenRows) -> Work:
    """Of a stream through trunk, head and MTP blocks, which have heads of their own among their products."""
    layers = sum(_LayerWork(hp, layer, rows.row_length).forward for layer in hp.layers)
    return Work(rows.n_tokens * (hp.vocab_size * hp.hidden_size + layers))


def calibration_work(hp: HParams, rows: TokenRows) -> dict[str, Parts]:
    """Of the three passes, each by its parts."""
    layers = [_LayerWork(hp, layer, rows.row_length) for layer in hp.trunk_layers]
    n = rows.n_tokens
    head = hp.vocab_size * hp.hidden_size
    codes = [_code_work(layer, n) for layer in layers] + 2 * [_vocabulary_work(hp, n)]
    return {
        "exact model": {"streams": Work(n * sum(layer.forward for layer in layers))},
        "gradients": {"streams": Work(n * (2 * head + sum(layer.backward for layer in layers)))},
        "codes": {part: reduce(add, (work[part] for work in codes if part in work), Work()) for part in codes[0]},
    }


class _LayerWork:
    """Multiplications of a token in a layer: resident products, experts, and attention's scores and values."""

    def __init__(self, hp: HParams, layer: Layer, row_length: int) -> None:
        self.shapes = {s.role: s.shape for s in tensor_specs(hp) if s.layer == layer.index and len(s.shape) > 1}
        self.hp, self.layer = hp, layer
        window = hp.sliding_window if layer.is_sliding else None
        keys = _keys_of_a_query(row_length, window)
        self.scores = ATTENTION_SLOWNESS * 2 * layer.n_head * hp.head_dim * keys
        self.attention = self._sum("attn_q", "attn_k", "attn_v", "attn_gate", "attn_output")
        self.router = self._sum("ffn_gate_inp")
        end = "_shexp" if layer.is_moe else ""
        self.places = {
            "attention in": ["attn_q", "attn_k", "attn_v", "attn_gate"],
            "attention out": ["attn_output"],
            "ffn in": [f"ffn_gate{end}", f"ffn_up{end}"],
            "ffn out": [f"ffn_down{end}"],
        }
        self.mlp = self._sum(*self.places["ffn in"], *self.places["ffn out"])
        self.expert = sum(math.prod(shape[1:]) for shape in self.shapes.values() if len(shape) == 3)
        self.used = self.expert * hp.n_expert_used
        self.resident = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) == 2)

    def _sum(self, *roles: str) -> int:
        return sum(math.prod(self.shapes[role]) for role in roles if role in self.shapes)

    @property
    def forward(self) -> float:
        return self.resident + self.scores + self.used

    @property
    def backward(self) -> float:
        """Routes are found again, and what rows and experts give; then the gradients at their inputs."""
        route = self.attention + self.router + self.scores if self.layer.is_moe else 0
        return route + 2 * self.used + 2 * self.resident + (1 + ATTENTION_BACK) * self.scores

    @property
    def streams(self) -> float:
        """In the pass that chooses codes: attention twice in both models, units in both, the rest in the quantized."""
        mixed = self.attention - self._sum("attn_output") + self.scores
        units = 2 * self.mlp * 2 / 3 + self.mlp
        return 2 * mixed + 2 * (self.attention + self.scores) + units + self.router + self.used * 7 / 3


def _keys_of_a_query(row_length: int, window: int | None) -> float:
    """How many keys attention works on for a query, on average: those that any query of its block may see."""
    total = 0
    for start in range(0, row_length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, row_length)
        first = 0 if window is None else max(0, start - window + 1)
        total += (stop - start) * (stop - first)
    return total / row_length


def _code_work(layer: _LayerWork, n_tokens: int) -> Parts:
    """Of a layer, in the pass that chooses codes."""
    dense = [[layer.shapes[role] for role in roles if role in layer.shapes] for roles in layer.places.values()]
    parts = [_place_work(shapes, _seen(n_tokens), SAMPLE_TOKENS) for shapes in dense]
    if layer.layer.is_moe:
        gate, up, down = (layer.shapes[f"ffn_{name}_exps"][1:] for name in ("gate", "up", "down"))
        own = min(n_tokens * layer.hp.n_expert_used / layer.hp.n_expert, MOMENT_TOKENS)
        for shapes in ([gate, up], [down]):
            parts += [_place_work(shapes, own * (1 - 1 / HELD_OUT), own / HELD_OUT)] * layer.hp.n_expert
    return {"streams": Work(n_tokens * layer.streams), **_sum_parts(parts)}


def _vocabulary_work(hp: HParams, n_tokens: int) -> Parts:
    """Of the embedding, or of the head."""
    return _place_work([(hp.vocab_size, hp.hidden_size)], _seen(n_tokens), SAMPLE_TOKENS)


def _seen(n_tokens: int) -> float:
    """Of which a dense matrix's moments are made."""
    n = n_tokens * (1 - 1 / HELD_OUT)
    return n / math.ceil(n / PLACE_TOKENS)


def _place_work(shapes: Sequence[tuple[int, ...]], seen: float, tried: float) -> dict[str, Work]:
    """Of matrices [rows, columns] that share what they are given: moments of `seen` tokens, errors of `tried`."""
    columns, rows = shapes[0][1], sum(shape[0] for shape in shapes)
    products = rows * columns**2
    return {
        "moments": Work(2 * seen * columns**2 + 2 * (2 + N_TRIES) * tried * rows * columns),
        "factors": Work(columns**3 / 6, columns**3 / 6),
        "targets": Work(2 * products),
        "search": Work(factors=N_TRIES * SEARCH_PRODUCTS * products, kernels=N_TRIES * rows * columns),
    }


def _sum_parts(parts: Sequence[Parts]) -> Parts:
    return {name: reduce(add, (part[name] for part in parts)) for name in parts[0]}
