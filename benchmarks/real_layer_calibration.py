"""What `convert --calibrate` takes at real size: one layer of the published widths, its parts, and what was predicted.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.real_layer_calibration [--tokens 8192] [--type Q4_K_S]

Makes a checkpoint with one MoE layer (hidden size 4096, 96 heads of 128, a sliding window, a shared expert and 4
experts of 1280, one of which a token uses: a quarter of all tokens for each) behind a small dense one, 0.4 GB. Compares
the layer stream with the resident reference model on it, then runs the command and prints seconds of processor time by
pass and part beside those that calibration/work.py counts, and the most memory that is no mapped file. Then the same
for the whole model, 45 layers of 288 experts: counted, times what was measured over what was counted here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.real_layer import REAL, write
from stepgguf.__main__ import run
from stepgguf.calibration import code_search, expert_codes, moments, sequential
from stepgguf.calibration.footprint import calibration_footprint
from stepgguf.calibration.guard import with_guard
from stepgguf.calibration.work import Speed, calibration_work, product_speed
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.model.hparams import HParams
from stepgguf.quants import kernels
from stepgguf.reference import backward, model, stream, weights
from stepgguf.reference.load import load_reference
from stepgguf.reference.token_rows import TokenRows
from tests.generate import config

LAYER = replace(REAL, n_layer=2, n_dense=1, n_expert=4, n_used=1, heads=(8, 96), dense=512)
MODEL = replace(REAL, n_layer=45, n_dense=3, vocab=128896)
CORES = 20
ROW = 2048

PASSES: list[tuple[Any, str, str]] = [
    (stream.LayerStream, "run_trunk", "exact model"),
    (backward.BackwardStream, "run", "gradients"),
    (sequential.SequentialPass, "run", "codes"),
]
PARTS: list[tuple[Any, str, str]] = [
    (model.Attention, "forward", "attention"),
    (model.Attention, "mix", "attention"),
    (model.MLP, "forward", "shared expert"),
    (model.MLP, "units", "shared expert"),
    (stream, "run_expert", "experts"),
    (backward, "run_expert", "experts"),
    (expert_codes, "run_expert", "experts"),
    (expert_codes.ExpertCodes, "_units", "experts"),
    (torch.autograd, "grad", "back"),
    (moments.PairMoments, "add", "moments"),
    (moments.TokenSample, "error", "held-out errors"),
    (moments.PairMoments, "factored", "factors"),
    (moments.PairMoments, "target", "targets"),
    (moments.TokenSample, "believed", "targets"),
    (code_search, "encode_calibrated", "search"),
    (kernels.Kernel, "encode", "stock codes"),
    (kernels.Decoder, "decode", "decoding"),
    (weights.WeightReader, "matrix", "reading weights"),
]


class Clock:
    """Seconds of processor time by pass and part, without the parts inside; and the most memory of each pass."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.memory: dict[str, int] = defaultdict(int)
        self.at = "rest"
        self._inside = threading.local()

    def watch_pass(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.at, started = name, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name, "all"] += time.process_time() - started
                self.at = "rest"

        return watched

    def watch_part(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer, started = getattr(self._inside, "seconds", 0.0), time.thread_time()
            self._inside.seconds = 0.0
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - started
                self.seconds[self.at, part] += taken - self._inside.seconds
                self._inside.seconds = outer + taken

        return watched

    @contextmanager
    def sampling_memory(self) -> Any:
        """Samples what the process holds that is no file, every 10 ms."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(0.01):
                self.memory[self.at] = max(self.memory[self.at], anonymous_memory())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def compare_with_resident(checkpoint: Path, folder: Path) -> None:
    """Print how far the layer stream's states and logits are from the resident model's."""
    with Checkpoint(checkpoint) as source:
        rng = np.random.default_rng(0)
        rows = TokenRows.of(rng.integers(0, LAYER.vocab, (2, ROW), np.int32))
        layers = stream.LayerStream(
            weights.WeightReader(source, full_hparams(source), torch.device("cpu")), rows, folder
        )
        layers.run_trunk()
        part, logits = next(layers.logits())
        states = torch.from_numpy(np.array(layers.folder.states(LAYER.n_layer)))
        resident = load_reference(source)
        with torch.no_grad():
            hidden = resident.hidden(torch.from_numpy(rows.tokens).long())
            exact = resident.logits(hidden[part])
        print(
            f"stream against resident model, {rows.n_tokens} tokens: states differ by at most "
            f"{float((states - hidden).abs().max()):.1e} of {float(hidden.abs().max()):.1f}, logits by "
            f"{float((logits - exact).abs().max()):.1e} of {float(exact.abs().max()):.2f}"
        )


def calibrate(checkpoint: Path, target: Path, tokens: int, type_name: str) -> Clock:
    """Run the command, watched."""
    clock = Clock()
    for watch, watched in ((clock.watch_pass, PASSES), (clock.watch_part, PARTS)):
        for owner, name, what in watched:
            setattr(owner, name, watch(getattr(owner, name), what))
    sys.argv = ["stepgguf", "convert", str(checkpoint), str(target), "--type", type_name, "--calibrate", "default"]
    sys.argv += ["--calibrate-tokens", str(tokens), "--threads", "1", "--overwrite"]
    with clock.sampling_memory():
        try:
            run()
        except SystemExit as ended:
            if ended.code:
                raise
    return clock


def print_measured(clock: Clock, speed: Speed, tokens: int) -> dict[str, float]:
    """Print seconds by pass and part, and by pass what was counted; gives what was measured over that, by pass."""
    hp = HParams.from_config(config(LAYER))
    rows = with_guard(TokenRows.of(np.zeros((tokens // ROW, ROW), np.int32)), hp.vocab_size)
    counted = calibration_work(hp, rows)
    ratios = {}
    print(f"{speed.processor * 2e-9:.0f} GFLOP/s of one core; {tokens} tokens; seconds of processor time")
    for name, parts in counted.items():
        taken, said = clock.seconds[name, "all"], sum(map(speed.seconds, parts.values()))
        ratios[name] = taken / said
        print(f"{name}: {taken:.1f}, predicted {said:.1f} ({said / taken - 1:+.0%}); {clock.memory[name] / 1e9:.2f} GB")
        here = {part: s for (at, part), s in clock.seconds.items() if at == name and part != "all"}
        for part, seconds in sorted(here.items(), key=lambda item: -item[1]):
            print(f"    {part:16} {seconds:7.1f}")
        print(f"    {'other':16} {taken - sum(here.values()):7.1f}")
        print("    counted: " + ", ".join(f"{part} {speed.seconds(work):.1f}" for part, work in parts.items()))
    takes, peak = calibration_footprint(hp, rows, 1), max(clock.memory.values())
    print(f"most memory {peak / 1e9:.2f} GB, predicted {takes.memory / 1e9:.2f}")
    return ratios


def print_model(speed: Speed, ratios: dict[str, float]) -> None:
    """Print hours, memory and disk of the whole model."""
    hp = HParams.from_config(config(MODEL))
    cores = Speed(CORES * speed.device, CORES * speed.processor, CORES)
    for tokens in (131072, 524288):
        rows = with_guard(TokenRows.of(np.zeros((tokens // ROW, ROW), np.int32)), hp.vocab_size)
        takes = calibration_footprint(hp, rows, CORES)
        hours = {
            name: sum(map(cores.seconds, parts.values())) * ratios[name] / 3600
            for name, parts in calibration_work(hp, rows).items()
        }
        print(
            f"{tokens:,} tokens, {CORES} such cores: {sum(hours.values()):.1f} hours ("
            + ", ".join(f"{name} {value:.1f}" for name, value in hours.items())
            + f"), {takes.memory / 1e9:.0f} GB of memory, {takes.disk / 1e9:.0f} GB of files"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--type", default="Q4_K_S")
    parser.add_argument("--folder", type=Path, help="where to put 3 GB; default: a temporary directory")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: processor time is that of one thread")
    folder = Path(tempfile.mkdtemp(prefix="stepgguf-bench-", dir=args.folder))
    try:
        write(folder / "layer", LAYER)
        compare_with_resident(folder / "layer", folder / "states")
        processor = product_speed(torch.device("cpu"), time.process_time)
        speed = Speed(processor, processor, 1)
        clock = calibrate(folder / "layer", folder / "layer.gguf", args.tokens, args.type)
        print_model(speed, print_measured(clock, speed, args.tokens))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
