"""Does a budget buy more than a name? Stock mixtures of the embedded model against our allocation of the same bytes.

    python -m benchmarks.allocation [--types Q2_K Q4_K_M ...] [--copies 6] [--threads 2] [--without-imatrix] [--fisher]

For each stock type its file is made, and one of at most its size whose types were chosen within that budget; with
--fisher a third, whose types were chosen by costs from a pass backwards over the same conversations. KL
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.copies import reorder
from benchmarks.quality import Reference, held_out, reference_logits, scores, summary
from stepgguf.calibration.fisher_costs import FisherCosts
from stepgguf.calibration.imatrix import collect_imatrix, whole_text
from stepgguf.calibration.text import pack_documents
from stepgguf.cli.main import main as stepgguf
from stepgguf.convert import budget, pipeline
from stepgguf.convert.budget import PricedTrunk
from stepgguf.convert.cost_file import TypeCosts
from stepgguf.convert.importance import Importance
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.full_hparams import full_hparams
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.writer import Writer
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import Encoder
from stepgguf.files import folders
from stepgguf.quants.imatrix import Imatrix, write_imatrix
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.reference.backward import BackwardStream
from stepgguf.reference.stream import LayerStream
from stepgguf.reference.token_rows import TokenRows
from stepgguf.reference.weights import WeightReader

TYPES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]
CALIBRATION = 300


def calibration_rows() -> TokenRows:
    """The first conversations that seed 1000 makes, none of which sees another."""
    rng, encoder = random.Random(1000), Encoder((CHECKPOINT / "tokenizer.json").read_text())
    conversations = [encoder.encode_example(*tasks.random_conversation(rng))[0] for _ in range(CALIBRATION)]
    return pack_documents(conversations, max(map(len, conversations)))


def calibrate(rows: TokenRows) -> Imatrix:
    """Their importance matrix."""
    with Checkpoint(CHECKPOINT) as checkpoint, tempfile.TemporaryDirectory() as folder:
        reader = WeightReader(checkpoint, checkpoint.hparams, torch.device("cpu"))
        return next(collect_imatrix(reader, rows, whole_text(rows), Path(folder)))


def fisher_costs(source: GGUFSource, importance: Importance | None, rows: TokenRows, threads: int) -> TypeCosts:
    """What each type costs each tensor, by the gradients of a pass backwards over these rows."""
    reader = WeightReader(source, full_hparams(source), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        stream = LayerStream(reader, rows, Path(folder), keep_inputs=True)
        stream.run_trunk()
        observer = FisherCosts(source, importance, int(rows.predicted.sum()), threads=threads)
        backward = BackwardStream(stream, observers=[observer])
        backward.run()
        return observer.costs(backward)


class ModelCopy:
    """One copy of the model with one importance matrix or none: makes files, and compares them with the original.

    fisher: rows of calibration for the third file of each type; None: there is none.
    """

    def __init__(
        self,
        source: GGUFSource,
        importance: Importance | None,
        reference: Reference,
        threads: int,
        fisher: TokenRows | None,
    ) -> None:
        self.source, self.importance, self.reference, self.threads = source, importance, reference, threads
        self.dest = source.path.with_name("file.gguf")
        options = Options(budget.recipe_without_rules("fit"), importance=importance)
        self.trunks = [budget.price_trunk(source, self.dest, options, threads=threads)]
        if fisher is not None:
            costs = fisher_costs(source, importance, fisher, threads)
            self.trunks.append(budget.price_trunk(source, self.dest, options, costs=costs))

    def kld(self, plan: Plan) -> float:
        with Writer(plan, self.source.identity(), restart=True, overwrite=True) as writer:
            pipeline.make_files(self.source, writer, threads=self.threads)
        return summary(scores(self.dest, self.reference, threads=self.threads)).kld

    def compare(self, type_name: str) -> list[float]:
        """KLD of the stock file, and of the types that were chosen within its bytes, once or twice."""
        stock = plan_source(self.source, self.dest, Options(load_recipe(type_name), importance=self.importance))
        return [self.kld(stock), *(self.kld(self._choose_types(stock, trunk)) for trunk in self.trunks)]

    def _choose_types(self, stock: Plan, trunk: PricedTrunk) -> Plan:
        """The same file with types chosen within its bytes. All is the trunk's: the source has no MTP blocks."""
        types, [file] = trunk.choose_types(stock.n_bytes), stock.files
        chosen = tuple(t.as_type(types[t.name], self.importance) for t in file.tensors)
        return replace(stock, files=(replace(file, tensors=chosen),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without-imatrix", action="store_true")
    parser.add_argument("--fisher", action="store_true")
    args = parser.parse_args()
    found: dict[str, list[list[float]]] = {name: [] for name in args.types}
    rows = calibration_rows()
    with tempfile.TemporaryDirectory() as name, mock.patch.object(folders, "measurements", return_value=Path(name)):
        source, file = Path(name) / "f32.gguf", Path(name) / "imatrix.gguf"
        assert stepgguf(["convert", str(CHECKPOINT), str(source), "-t", "F32", "--mtp", "drop", "-q"]) == 0
        reference, matrix = reference_logits(source, held_out()[::3], threads=args.threads), calibrate(rows)
        for number in range(args.copies):
            if number:
                matrix = reorder(source, matrix, np.random.default_rng(number))
            write_imatrix(matrix, file)
            importance = None if args.without_imatrix else Importance.read(file)
            same = summary(scores(source, reference, threads=args.threads)).kld
            print(f"copy {number}: KLD of its F32 file {same:.1e}", flush=True)
            with GGUFSource(source) as opened:
                copy = ModelCopy(opened, importance, reference, args.threads, rows if args.fisher else None)
                for type_name in args.types:
                    found[type_name].append(copy.compare(type_name))
                    print(f"  {type_name:7} KLD {_listed(found[type_name][-1], '.6f')}", flush=True)
    for type_name, klds in found.items():
        means = [statistics.mean(column) for column in zip(*klds, strict=True)]
        print(f"{type_name:7} KLD {_listed(means, '.5f')}", end="")
        for chosen in range(1, len(means)):
            ratios = [row[chosen] / row[0] for row in klds]
            error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
            print(f", ratio {statistics.mean(ratios):.3f} ± {error:.3f}", end="")
        print()


def _listed(klds: Sequence[float], form: str) -> str:
    names = ("stock", "ours", "by Fisher costs")
    return ", ".join(f"{kld:{form}} {name}" for name, kld in zip(names, klds, strict=False))


if __name__ == "__main__":
    main()
