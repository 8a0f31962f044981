"""Codes chosen against second moments: seconds for each matrix at real size, and how much of ggml's error is left.

    OMP_NUM_THREADS=1 python -m benchmarks.second_moments [TYPE ...] [--rows 1280] [--columns 4096] [--cores 1]

Time is CPU time of one thread, so that other work on the machine counts little; --cores N: so many threads at once,
each with a matrix of its own, which then share caches and memory. A layer is 288 experts of gate and up, which share
their moments, and down. Errors are measured on matrices of 256 x 1024, in float32, as a share of what ggml's own blocks
with importance lose, for inputs of three kinds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from stepgguf.quants import lanes
from stepgguf.quants.calibrated import encode_calibrated
from stepgguf.quants.second_moments import factor_moments, output_error
from stepgguf.quants.step_encoder import decode, encode_as_ggml

EXPERTS, LAYERS, CORES = 288, 42, 20
Floats = NDArray[np.float32]


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, np.float32)


def inputs(rng: np.random.Generator, tokens: int, columns: int, hidden: int, noise: float) -> Floats:
    """[tokens, columns]: made of so many hidden numbers, the later the smaller, and noise; columns differ in size."""
    sizes = np.arange(1, hidden + 1, dtype=np.float32) ** -0.5
    values = (normal(rng, tokens, hidden) * sizes) @ normal(rng, hidden, columns)
    values += noise * values.std() * normal(rng, tokens, columns)
    values *= np.exp(0.5 * normal(rng, columns))
    return values


def seconds(work: Callable[[], object], cores: int) -> float:
    """CPU time of a thread that does the work while the others do it, too."""

    def timed(_: int) -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    with ThreadPoolExecutor(cores) as pool:
        return max(pool.map(timed, range(cores)))


def time_shape(types: list[GGMLQuantizationType], rows: int, columns: int, cores: int) -> dict[str, float]:
    """Print how long matrices of this shape take; gives the seconds of the moments' factor and of each type."""
    rng = np.random.default_rng(0)
    tokens = inputs(rng, 2 * columns, columns, columns // 4, 0.3)
    n = len(tokens)
    taken = {"moments of 1,000 tokens": seconds(lambda: tokens.T @ tokens, cores) * 1000 / n}
    moments = tokens.T @ tokens / np.float32(n)
    taken["factor"] = seconds(lambda: factor_moments(moments), cores)
    ready, weights = factor_moments(moments), normal(rng, rows, columns) * np.float32(0.02)
    product = seconds(lambda: weights @ moments, cores)
    taken["guard"] = 2 * seconds(lambda: output_error(weights, weights, moments), cores)
    print(f"{rows} x {columns}, {cores} at once; matrix products {2 * rows * columns**2 / product / 1e9:.0f} GFLOP/s")
    for what, time_taken in taken.items():
        print(f"    {what:24} {time_taken:6.2f} s")
    for ggml_type in types:
        encode_calibrated(ggml_type, weights[:32], ready)  # compiled
        without = seconds(lambda: encode_calibrated(ggml_type, weights, ready, sweeps=0), cores)  # noqa: B023
        whole = seconds(lambda: encode_calibrated(ggml_type, weights, ready), cores)  # noqa: B023
        taken[ggml_type.name] = whole
        print(
            f"    {ggml_type.name:8} {whole:6.2f} s: feedback {without - taken['guard']:.2f}, two sweeps"
            f" {whole - without:.2f}, guard {taken['guard']:.2f}",
            flush=True,
        )
    return taken


def predict(types: list[GGMLQuantizationType], wide: dict[str, float], tall: dict[str, float]) -> None:
    """Print what a layer and the model take, moments not included: gate and up are wide, down is tall."""
    for ggml_type in types:
        expert = 2 * wide[ggml_type.name] + wide["factor"] + tall[ggml_type.name] + tall["factor"]
        layer = EXPERTS * expert
        model = LAYERS * layer / CORES / 3600
        print(f"{ggml_type.name:8} a layer {layer:.0f} s of one core; {LAYERS} layers on {CORES} cores {model:.2f} h")


def error_ratio(ggml_type: GGMLQuantizationType, weights: Floats, moments: Floats, damping: float) -> float:
    def lost(blocks: NDArray[np.uint8]) -> float:
        return output_error(weights, decode(ggml_type, blocks, weights.shape[1]), moments)

    ours = encode_calibrated(ggml_type, weights, factor_moments(moments, damping))
    return lost(ours) / lost(encode_as_ggml(ggml_type, weights, moments.diagonal().copy()))


def print_errors(types: list[GGMLQuantizationType]) -> None:
    """A table: error left, of each type and kind of inputs."""
    rng = np.random.default_rng(0)
    weights = normal(rng, 256, 1024) * np.float32(0.02)
    kinds = {
        "64 hidden, noise 0.3": inputs(rng, 4096, 1024, 64, 0.3),
        "1024 hidden, noise 0.3": inputs(rng, 4096, 1024, 1024, 0.3),
        "independent": inputs(rng, 65536, 1024, 1, 100.0),
    }
    moments = {kind: tokens.T @ tokens / np.float32(len(tokens)) for kind, tokens in kinds.items()}
    print(f"{'type':8}" + "".join(f"{kind:>24}" for kind in kinds))
    for ggml_type in types:
        ratios = [error_ratio(ggml_type, weights, of_kind, 0.01) for of_kind in moments.values()]
        print(f"{ggml_type.name:8}" + "".join(f"{ratio:24.3f}" for ratio in ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=["Q2_K", "Q3_K", "Q4_K"])
    parser.add_argument("--rows", type=int, default=1280)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--cores", type=int, default=1)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: BLAS would start threads of its own")
    types = [GGMLQuantizationType[name] for name in args.types]
    wide = time_shape(types, args.rows, args.columns, args.cores)
    tall = time_shape(types, args.columns, args.rows, args.cores)
    predict(types, wide, tall)
    print_errors([GGMLQuantizationType[name] for name in lanes.NAMES])


if __name__ == "__main__":
    main()
