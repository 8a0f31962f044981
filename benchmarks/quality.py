"""How far a quantized file of the embedded model is from the original: KL divergence and perplexity in llama.cpp.

    python -m benchmarks.quality A.gguf [B.gguf ...] [--reference F32.gguf] [--weights-only]

Over dialogues that training never showed, KL(reference || file) of every next-token distribution, full vocabulary, in
nats, float64. Two readings: over all tokens, and over those that the assistant writes. The model was trained on the
latter only. There it is nearly certain (perplexity 1.003), so their KLD is small and hangs on a few dozen tokens; what
it says of the others is not language (perplexity 69), but the same arithmetic, and tells files apart much better.

The reference is the embedded checkpoint in F32 if none is given: for BF16 weights llama.cpp rounds activations to BF16.
For quantized weights it rounds them to 8 bits, which has a KLD of its own: 0.002 to 0.003 for K types, over all tokens,
most of what a Q6_K file shows. --weights-only decodes the files to F32 first and leaves that out.

Tokens of a dialogue go wrong together, so dialogues are the unit of chance: errors are bootstrap standard errors over
them, and two files are compared on the same resampled dialogues, which leaves only what differs between the files.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.train import IGNORE, Encoder
from stepgguf.files import gguf_header as header
from stepgguf.model.names import TensorName
from stepgguf.runtime.llama.context import DecodeRows, LlamaContext
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Placement

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

N_BOOTSTRAP = 1000  # a standard error from 1000 resamples is itself good to 2 %


@dataclass(frozen=True)
class Dialogue:
    """Token ids [t], and for each of the t - 1 predictions whether it is of a token that the assistant writes."""

    tokens: list[int]
    answers: Bools


@dataclass(frozen=True)
class Reference:
    """The dialogues and the reference's log-probabilities of each, [t - 1, vocabulary]."""

    dialogues: Sequence[Dialogue]
    log_probs: Sequence[Doubles]


@dataclass(frozen=True)
class Scores:
    """One file against the reference, for each predicted token of all dialogues."""

    dialogue: npt.NDArray[np.int64]  # which dialogue the token is in
    answers: Bools
    kld: Doubles
    nll: Doubles
    nll_reference: Doubles
    agree: Bools  # both have the same most likely token

    def only_answers(self) -> Scores:
        return Scores(*(values[self.answers] for values in vars(self).values()))


@dataclass(frozen=True)
class Divergence:
    """kld: mean, with its bootstrap standard error and 99 % quantile, in nats. top1: share of equal first choices."""

    kld: float
    kld_error: float
    kld_99: float
    ppl: float
    ppl_reference: float
    top1: float
    n_tokens: int


def held_out(seed: int = 7) -> list[Dialogue]:
    """Some 520 dialogues, none twice: letters of words, sums, and weather in cities that training never shows.

    Few are about the weather: those begin with hundreds of tokens about tools, nearly the same in all.
    """
    rng = random.Random(seed)
    conversations: list[tasks.Conversation] = []
    for i, word in enumerate(tasks.HELD_OUT):
        conversations += [(tasks.count_letters(word, letter, rng.randrange(4)), None) for letter in sorted(set(word))]
        if i % 3 == 0:
            conversations.append(tasks.ask_weather(rng, word.capitalize()))
    pairs = {(rng.randrange(1000), rng.randrange(1000)) for _ in range(5000)}
    conversations += [
        (tasks.add_numbers(*pair, rng.randrange(4)), None) for pair in sorted(pairs) if tasks.is_held_out_sum(*pair)
    ]
    encoder = Encoder((CHECKPOINT / "tokenizer.json").read_text())
    return [_dialogue(encoder, *conversation) for conversation in conversations]


def _dialogue(encoder: Encoder, messages: list[tasks.Message], tools: list[dict[str, object]] | None) -> Dialogue:
    tokens, labels = encoder.encode_example(messages, tools)
    return Dialogue(tokens, np.array(labels[1:]) != IGNORE)


def log_probs(path: Path, dialogues: Sequence[Dialogue], threads: int) -> Iterator[Doubles]:
    """llama.cpp's log-probabilities of each dialogue, [t - 1, vocabulary]: entry i is for token i + 1."""
    longest = max(len(dialogue.tokens) for dialogue in dialogues)
    model = LlamaModel(path, Placement(gpu_layers=0), mtp=False, mmap=True, progress=None)
    context = LlamaContext(model, n_ctx=longest, n_seq=1, n_batch=longest, n_outputs=longest, threads=threads)
    try:
        for dialogue in dialogues:
            tokens = dialogue.tokens[:-1]
            context.remove(0, 0)
            assert context.decode([DecodeRows(0, 0, tokens, len(tokens))]) == 0
            logits = np.stack([context.logits(row) for row in range(len(tokens))]).astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    finally:
        context.close()
        model.close()


def reference_logits(path: Path, dialogues: Sequence[Dialogue], *, threads: int = 1) -> Reference:
    """What every file is compared with: run once."""
    return Reference(dialogues, list(log_probs(path, dialogues, threads)))


def scores(path: Path, reference: Reference, *, threads: int = 1) -> Scores:
    parts = [
        _score(i, dialogue, p, q)
        for i, (dialogue, p, q) in enumerate(
            zip(reference.dialogues, reference.log_probs, log_probs(path, reference.dialogues, threads), strict=True)
        )
    ]
    return Scores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _score(i: int, dialogue: Dialogue, p: Doubles, q: Doubles) -> tuple[npt.NDArray[np.generic], ...]:
    """The fields of Scores for one dialogue, from log-probabilities of the reference (p) and the file (q)."""
    rows, following = np.arange(len(p)), np.array(dialogue.tokens[1:])
    kld = (np.exp(p) * (p - q)).sum(axis=-1)
    agree = p.argmax(axis=-1) == q.argmax(axis=-1)
    return np.full(len(p), i), dialogue.answers, kld, -q[rows, following], -p[rows, following], agree


def resampled(n: int) -> Doubles:
    """[N_BOOTSTRAP, n]: how often each of n dialogues is drawn, the same draws for every file."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP).astype(np.float64)


def sums(scores: Scores) -> tuple[Doubles, Doubles]:
    """Each dialogue's summed KLD and its number of tokens."""
    kld, n = np.bincount(scores.dialogue, scores.kld), np.bincount(scores.dialogue)
    return kld.astype(np.float64), n.astype(np.float64)


def summary(scores: Scores) -> Divergence:
    kld, n = sums(scores)
    draws = resampled(len(n))
    return Divergence(
        kld=float(scores.kld.mean()),
        kld_error=float(((draws @ kld) / (draws @ n)).std()),
        kld_99=float(np.quantile(scores.kld, 0.99)),
        ppl=float(np.exp(scores.nll.mean())),
        ppl_reference=float(np.exp(scores.nll_reference.mean())),
        top1=float(scores.agree.mean()),
        n_tokens=len(scores.kld),
    )


def kld_ratio(file: Scores, other: Scores) -> tuple[float, float]:
    """KLD of a file over that of another, and the standard error of the ratio, dialogue by dialogue. Of none: NaN."""
    a, b = sums(file)[0], sums(other)[0]
    if not b.any():
        return math.nan, math.nan
    draws = resampled(len(a))
    return float(a.sum() / b.sum()), float(((draws @ a) / (draws @ b)).std())


def divergence(path: Path, reference: Reference, *, threads: int = 1) -> Divergence:
    """A file against the reference, over all tokens."""
    return summary(scores(path, reference, threads=threads))


def size(path: Path) -> tuple[int, float]:
    """Bytes of a file's trunk tensors, and bits per weight. The MTP blocks take no part in these logits."""
    tensors = header.read(path).tensors
    mtp = {TensorName(tensor.name).layer for tensor in tensors if ".nextn." in tensor.name}
    trunk = [tensor for tensor in tensors if TensorName(tensor.name).layer not in mtp]
    n_bytes = sum(tensor.n_bytes for tensor in trunk)
    return n_bytes, 8 * n_bytes / sum(tensor.n_values for tensor in trunk)


def decoded(path: Path, folder: Path) -> Path:
    """The file's weights as F32: run with these, llama.cpp does not round activations."""
    dest = folder / f"{path.stem}-decoded.gguf"
    assert stepgguf(["quantize", str(path), str(dest), "-t", "F32", "--allow-requantize", "--overwrite", "-q"]) == 0
    return dest


def describe(scores: Scores, first: Scores) -> str:
    d, (ratio, error) = summary(scores), kld_ratio(scores, first)
    return (
        f"{d.kld:.6f} ± {d.kld_error:.6f}  {d.kld_99:8.4f}  {d.ppl / d.ppl_reference:9.4f}  {d.top1:7.2%}  "
        f"{ratio:6.3f} ± {error:.3f}"
    )


def compare(files: Sequence[Path], reference: Reference, folder: Path | None, threads: int) -> None:
    """Print a row for each file and token set. folder: decode the weights there first."""
    print(
        f"{'':24}{'bytes':>10}  {'bpw':>6}  {'tokens':>14}  {'KLD':>19}  {'99 %':>8}  PPL ratio  {'top-1':>7}"
        "  KLD / first's"
    )
    first: Scores | None = None
    for path in files:
        found = scores(path if folder is None else decoded(path, folder), reference, threads=threads)
        first = first or found
        n_bytes, bpw = size(path)
        for name, part, other in (
            ("all", found, first),
            ("answers", found.only_answers(), first.only_answers()),
        ):
            label = f"{name} {len(part.kld)}"
            print(f"{path.name:24}{n_bytes:>10}  {bpw:6.3f}  {label:>14}  {describe(part, other)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--reference", type=Path, help="a GGUF to compare with; else the embedded checkpoint in F32")
    parser.add_argument("--weights-only", action="store_true", help="leave out what rounding activations costs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = args.reference or folder / "F32.gguf"
        if args.reference is None:
            assert stepgguf(["convert", str(CHECKPOINT), str(original), "-t", "F32", "--mtp", "drop", "-q"]) == 0
        reference = reference_logits(original, held_out(), threads=args.threads)
        compare(args.files, reference, folder if args.weights_only else None, args.threads)


if __name__ == "__main__":
    main()
