"""Does a budget buy more than a name? Stock mixtures of the embedded model against our allocation of the same bytes.

    python -m benchmarks.allocation [--types Q2_K Q4_K_M ...] [--threads 2] [--without-imatrix]

For each stock type its file is made, and then two of at most its size whose types allocate.solve chose: from all types,
and from the K types and Q8_0 alone. KL divergence from the F32 file and perplexity are those of benchmarks/quality.py:
llama.cpp, dialogues that training never showed. All files of a run have the same importance matrix, collected from 300
training conversations, or none. No quantized weight takes part in choosing types, and no held-out token either.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.quality import Reference, Scores, held_out, kld_ratio, reference_logits, scores, summary
from stepgguf.convert import budget, pipeline
from stepgguf.convert.budget import Limits
from stepgguf.convert.checkpoint import Checkpoint
from stepgguf.convert.importance import Importance
from stepgguf.convert.plan import Options, Plan
from stepgguf.convert.planner import plan_checkpoint
from stepgguf.convert.writer import Writer
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import Encoder
from stepgguf.quants import imatrix
from stepgguf.quants.allocate import Item, solve
from stepgguf.quants.recipe import Recipe
from stepgguf.reference.imatrix import collect
from stepgguf.reference.load import load

TYPES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]
# What the stock mixtures above are made of, and the types that take their place where rows do not divide.
K_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "Q5_1"})
CALIBRATION = 300


def calibrate(checkpoint: Checkpoint, path: Path) -> Importance:
    """The importance matrix of the first conversations that seed 1000 makes, each run on its own."""
    rng, encoder = random.Random(1000), Encoder((checkpoint.path / "tokenizer.json").read_text())
    conversations = [encoder.example(*tasks.conversation(rng))[0] for _ in range(CALIBRATION)]
    found, _ = collect(load(checkpoint), (torch.tensor([tokens]) for tokens in conversations))
    imatrix.write(found, path)
    return Importance.read(path)


class Bench:
    """One checkpoint with one importance matrix or none: makes files, and compares them with the original."""

    def __init__(
        self, checkpoint: Checkpoint, importance: Importance | None, reference: Reference, folder: Path, threads: int
    ) -> None:
        self.checkpoint, self.importance, self.reference = checkpoint, importance, reference
        self.folder, self.threads = folder, threads
        free, _ = budget.resolve(None, Limits(1), "")
        self.items = budget.price(checkpoint, self.dest, self.options(free), threads=threads).items

    @property
    def dest(self) -> Path:
        return self.folder / "file.gguf"

    def options(self, kind: str | Recipe) -> Options:
        return Options(kind, mtp="drop", importance=self.importance)

    def plan(self, type_name: str) -> Plan:
        return plan_checkpoint(self.checkpoint, self.dest, self.options(type_name))

    def allocated(self, stock: Plan, kinds: frozenset[str] | None) -> Plan:
        """The stock plan with other types in no more bytes. kinds: the only ones allowed, if given."""
        items = self.items if kinds is None else [_only(item, kinds) for item in self.items]
        found = solve(items, max_bytes=stock.n_bytes)
        chosen = {item.name: option.ggml_type for item, option in zip(items, found.options, strict=True)}
        [file] = stock.files
        tensors = tuple(replace(t, ggml_type=chosen.get(t.name, t.ggml_type)) for t in file.tensors)
        return replace(stock, files=(replace(file, tensors=tensors),))

    def score(self, plan: Plan) -> Scores:
        path = plan.files[0].path
        with Writer(plan, self.checkpoint.identity(), restart=True, overwrite=True) as writer:
            pipeline.run(self.checkpoint, writer, threads=self.threads)
        return scores(path, self.reference, threads=self.threads)

    def compare(self, type_name: str) -> None:
        stock = self.plan(type_name)
        first = self.score(stock)
        print(f"{type_name:7} {stock.n_bytes:9,} {_figures(first)}", flush=True)
        for title, kinds in (("all types", None), ("K types", K_TYPES)):
            plan = self.allocated(stock, kinds)
            found = self.score(plan)
            ratios = [kld_ratio(a, b) for a, b in ((found, first), (found.only_answers(), first.only_answers()))]
            text = ", ".join(f"{ratio:.3f} ± {error:.3f}" for ratio, error in ratios)
            print(f"  {title:9} {plan.n_bytes:9,} {_figures(found)}   KLD / stock's: {text}", flush=True)


def _only(item: Item, kinds: frozenset[str]) -> Item:
    return replace(item, options=tuple(o for o in item.options if o.ggml_type.name in kinds or len(item.options) == 1))


def _figures(found: Scores) -> str:
    everything, answers = summary(found), summary(found.only_answers())
    return f"KLD {everything.kld:.6f} PPL {everything.ppl:.4f}, answers {answers.kld:.7f} PPL {answers.ppl:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without-imatrix", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Checkpoint(CHECKPOINT) as checkpoint:
        folder = Path(name)
        original = plan_checkpoint(checkpoint, folder / "F32.gguf", Options("F32", mtp="drop"))
        with Writer(original, checkpoint.identity()) as writer:
            pipeline.run(checkpoint, writer, threads=args.threads)
        reference = reference_logits(folder / "F32.gguf", held_out(), threads=args.threads)
        importance = None if args.without_imatrix else calibrate(checkpoint, folder / "imatrix.gguf")
        bench = Bench(checkpoint, importance, reference, folder, args.threads)
        print(f"{'without' if importance is None else 'with'} an imatrix; bytes of tensors; all tokens, then answers")
        for type_name in args.types:
            bench.compare(type_name)


if __name__ == "__main__":
    main()
