"""Does a budget buy more than a name? Stock mixtures of the embedded model against our allocation of the same bytes.

    python -m benchmarks.allocation [--types Q2_K Q4_K_M ...] [--copies 6] [--threads 2] [--without-imatrix]

For each stock type its file is made, and one of at most its size whose types were chosen within that budget. KL
divergence from the F32 file is that of benchmarks/quality.py: llama.cpp, dialogues that training never showed (a third
of them), all tokens. No quantized file takes part in choosing types, and no held-out token either. All files of a copy
have the same importance matrix, of 300 training conversations, or none.

One file has luck: how its rounding errors fall changes its KLD by 10 to 25 %. So each comparison is made on several
copies of the model (benchmarks/copies.py), and the mean of the ratios has a standard error over them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.copies import reorder
from benchmarks.quality import Reference, held_out, reference_logits, scores, summary
from stepgguf.calibration.imatrix import collect_imatrix, whole_text
from stepgguf.calibration.text import pack_documents
from stepgguf.cli.main import main as stepgguf
from stepgguf.convert import budget, pipeline
from stepgguf.convert.importance import Importance
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.writer import Writer
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import Encoder
from stepgguf.files import folders
from stepgguf.quants.imatrix import Imatrix, write_imatrix
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.reference.weights import WeightReader

TYPES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]
CALIBRATION = 300


def calibrate() -> Imatrix:
    """The importance matrix of the first conversations that seed 1000 makes, none of which sees another."""
    rng, encoder = random.Random(1000), Encoder((CHECKPOINT / "tokenizer.json").read_text())
    conversations = [encoder.encode_example(*tasks.random_conversation(rng))[0] for _ in range(CALIBRATION)]
    rows = pack_documents(conversations, max(map(len, conversations)))
    with Checkpoint(CHECKPOINT) as checkpoint, tempfile.TemporaryDirectory() as folder:
        reader = WeightReader(checkpoint, checkpoint.hparams, torch.device("cpu"))
        return next(collect_imatrix(reader, rows, whole_text(rows), Path(folder)))


class ModelCopy:
    """One copy of the model with one importance matrix or none: makes files, and compares them with the original."""

    def __init__(self, source: GGUFSource, importance: Importance | None, reference: Reference, threads: int) -> None:
        self.source, self.importance, self.reference, self.threads = source, importance, reference, threads
        self.dest = source.path.with_name("file.gguf")
        free = budget.recipe_without_rules("fit")
        self.trunk = budget.price_trunk(source, self.dest, Options(free, importance=importance), threads=threads)

    def kld(self, plan: Plan) -> float:
        with Writer(plan, self.source.identity(), restart=True, overwrite=True) as writer:
            pipeline.make_files(self.source, writer, threads=self.threads)
        return summary(scores(self.dest, self.reference, threads=self.threads)).kld

    def compare(self, type_name: str) -> tuple[float, float]:
        """KLD of the stock file, and of the types that were chosen within its bytes."""
        stock = plan_source(self.source, self.dest, Options(load_recipe(type_name), importance=self.importance))
        types = self.trunk.choose_types(stock.n_bytes)  # all tensors are the trunk's: the source has no MTP blocks
        [file] = stock.files
        chosen = tuple(t.as_type(types[t.name], self.importance) for t in file.tensors)
        return self.kld(stock), self.kld(replace(stock, files=(replace(file, tensors=chosen),)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without-imatrix", action="store_true")
    args = parser.parse_args()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in args.types}
    with tempfile.TemporaryDirectory() as name, mock.patch.object(folders, "measurements", return_value=Path(name)):
        source, file = Path(name) / "f32.gguf", Path(name) / "imatrix.gguf"
        assert stepgguf(["convert", str(CHECKPOINT), str(source), "-t", "F32", "--mtp", "drop", "-q"]) == 0
        reference, matrix = reference_logits(source, held_out()[::3], threads=args.threads), calibrate()
        for number in range(args.copies):
            if number:
                matrix = reorder(source, matrix, np.random.default_rng(number))
            write_imatrix(matrix, file)
            importance = None if args.without_imatrix else Importance.read(file)
            same = summary(scores(source, reference, threads=args.threads)).kld
            print(f"copy {number}: KLD of its F32 file {same:.1e}", flush=True)
            with GGUFSource(source) as opened:
                copy = ModelCopy(opened, importance, reference, args.threads)
                for type_name in args.types:
                    pairs[type_name].append(copy.compare(type_name))
                    print(
                        f"  {type_name:7} KLD {pairs[type_name][-1][0]:.6f} stock, {pairs[type_name][-1][1]:.6f} ours",
                        flush=True,
                    )
    for type_name, found in pairs.items():
        ratios = [ours / stock for stock, ours in found]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        stock, ours = (statistics.mean(column) for column in zip(*found, strict=True))
        print(
            f"{type_name:7} KLD {stock:.5f} stock, {ours:.5f} ours, ratio {statistics.mean(ratios):.3f} ± {error:.3f}"
        )


if __name__ == "__main__":
    main()
