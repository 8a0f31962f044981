"""Lane kernels against ggml's quantizers, one core, side by side in one process: the same bytes, and how much sooner.

    python -m benchmarks.kernels [TYPE ...] [--weights 10000000] [--rounds 5]

For each type, with importance and without: first identity on at least so many weights of all the kinds of rows below,
then time on BF16 rows as checkpoints have them; ggml gets them as float32, widened beforehand. The ratio is the median
over rounds in which both run in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.quants import ggml, lanes
from stepgguf.quants.kernels import choose_kernel
from stepgguf.quants.types import BY_NAME, row_size

COLUMNS = 4096
Floats = NDArray[np.float32]


def rows(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Floats]]:
    """Kinds of rows [n, COLUMNS]: weights as trained models have them, and what breaks searches."""
    shape = n, COLUMNS
    normal = rng.standard_normal(shape, np.float32)
    yield "normal", normal * np.float32(0.02)
    yield "heavy-tailed", rng.standard_t(2, shape).astype(np.float32)
    yield "positive", np.abs(normal)
    yield "negative", -np.abs(normal)
    yield "sparse", np.where(rng.random(shape) < 0.05, normal, np.float32(0))
    outlier = normal.copy()
    outlier[np.arange(n), rng.integers(0, COLUMNS, n)] *= 1000
    yield "one outlier", outlier
    yield "few values", rng.choice(np.array([-0.5, 0.0, 0.25, 1.0], np.float32), shape)
    yield "scales apart", normal * np.exp2(rng.integers(-30, 10, (n, COLUMNS // 32))).repeat(32, 1).astype(np.float32)
    yield "denormal", normal * np.float32(1e-40)
    yield "constant", np.broadcast_to(normal[:, :1], shape).copy()
    yield "zero", np.zeros(shape, np.float32)


def identity(ggml_type: GGMLQuantizationType, weighted: bool, n_weights: int) -> int:
    """Weights that were compared; exits at the first difference."""
    library = ggml.load_library()
    assert library is not None
    kernel = choose_kernel(ggml_type, weighted=weighted)
    rng, done, n = np.random.default_rng(0), 0, 64
    while done < n_weights:
        importance = rng.gamma(0.5, 1.0, COLUMNS).astype(np.float32) if weighted else None
        for name, values in rows(rng, n):
            ours, theirs = (np.empty((n, row_size(ggml_type, COLUMNS)), np.uint8) for _ in range(2))
            kernel.encode(values, ours, importance)
            library.quantize(ggml_type, values, theirs, importance)
            if not np.array_equal(ours, theirs):
                sys.exit(f"{ggml_type.name}: {name} rows differ in {(ours != theirs).mean():.2%} of their bytes")
            done += values.size
    return done


def speeds(ggml_type: GGMLQuantizationType, weighted: bool, rounds: int) -> tuple[float, float, float]:
    """Million weights a second: ours, ggml's; and the median ratio. As many rows as ggml does in about 0.3 s."""
    library = ggml.load_library()
    assert library is not None
    kernel = choose_kernel(ggml_type, weighted=weighted)
    rng = np.random.default_rng(1)
    importance = rng.gamma(0.5, 1.0, COLUMNS).astype(np.float32) if weighted else None
    n, seconds = 32, 0.0
    pairs: list[tuple[float, float]] = []
    while len(pairs) < rounds:
        bits = (rng.standard_normal((n, COLUMNS), np.float32) * np.float32(0.02)).view(np.uint32) >> 16
        stored = bits.astype(np.uint16)
        values = (bits << 16).view(np.float32)
        out = np.empty((n, row_size(ggml_type, COLUMNS)), np.uint8)
        kernel.encode(stored, out, importance)  # compiled, and its pages there
        started = time.perf_counter()
        kernel.encode(stored, out, importance)
        middle = time.perf_counter()
        library.quantize(ggml_type, values, out, importance)
        seconds = time.perf_counter() - middle
        if seconds < 0.15 and n < 16384:
            n *= 2
            continue
        pairs.append((values.size / (middle - started) / 1e6, values.size / seconds / 1e6))
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours, theirs, statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=lanes.NAMES)
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"{'type':8} {'imatrix':8} {'identical weights':>18} {'lanes M/s':>10} {'ggml M/s':>10} {'ratio':>6}")
    for name in args.types:
        ggml_type = GGMLQuantizationType[name]
        for weighted in (True, False):
            if not weighted and BY_NAME[name].aborts:
                continue
            n = identity(ggml_type, weighted, args.weights)
            ours, theirs, ratio = speeds(ggml_type, weighted, args.rounds)
            with_it = "with" if weighted else "without"
            print(f"{name:8} {with_it:8} {n:>18,} {ours:>10.1f} {theirs:>10.1f} {ratio:>5.1f}x", flush=True)


if __name__ == "__main__":
    main()
