"""What calibration gains: stock codes and types, --calibrate, --fit and both, in the bytes of each stock type.

    python -m benchmarks.calibration MODEL [--types Q2_K Q3_K_M Q4_K_S Q5_K_M] [--tokens 25000] [--copies 1]

MODEL: "embedded", or the folder of a language model (benchmarks/language.py, which trains one). All files have the same
importance matrix, of the same text that codes and types are calibrated on: dialogues of the kind that the embedded
model was trained on, or documents that the language model neither learnt nor is measured on.

KL divergence from the F32 file through llama.cpp, whose 8-bit activations have a part in it that no weights remove;
with --weights-only of the decoded weights. Columns:

    held out    the embedded model: dialogues that training never showed. The language model: documents of the same kind
    other       the language model: text of another kind (dictionary, fortunes, manual pages in German and French)
    shuffled    the tokens of what is held out, in another order: what is bought with behaviour off the calibration
    random      text shows here, and on random tokens
    predicted   by the gradients, on the calibration text, for stock codes of the types that were chosen

One file has luck: how its rounding errors fall changes its divergence by 10 to 25 %. So each comparison is made on
several copies of the model (benchmarks/copies.py); at the end stands the mean of the ratios with its standard error.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from benchmarks.copies import reorder
from benchmarks.language import held_out_rows
from benchmarks.language_text import documents
from benchmarks.quality import Dialogue, Scores, decoded, held_out, kld_ratio, reference_logits, scores, summary
from stepgguf.cli.main import main as stepgguf
from stepgguf.convert.metadata import PREDICTED_KLD
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.files import folders, gguf_header
from stepgguf.quants.imatrix import read_imatrix, write_imatrix

TYPES = ["Q2_K", "Q3_K_M", "Q4_K_S", "Q5_K_M"]
METHODS = {  # options besides the type, or instead of it
    "stock": (),
    "calibrate": ("--calibrate",),
    "fit": ("--fit",),
    "fit + calibrate": ("--fit", "--calibrate"),
}
CHARACTERS = 4  # of calibration text for a token, at least
ROWS, ROW_TOKENS = 8, 512  # of a column


class Model:
    """A model with its calibration text and what it is measured on. folder: for its files."""

    def __init__(self, checkpoint: Path, text: Path, columns: Mapping[str, Sequence[Dialogue]], folder: Path) -> None:
        self.text, self.folder = text, folder
        self.original, self.imatrix = folder / "f32.gguf", folder / "imatrix.gguf"
        run("convert", str(checkpoint), str(self.original), "--type", "F32", "--mtp", "drop", "-q")
        run("imatrix", str(checkpoint), str(text), "-o", str(self.imatrix), "-q")
        self._references = {name: reference_logits(self.original, column) for name, column in columns.items()}

    def reorder(self, number: int) -> None:
        """Become the copy of this number, which computes the same."""
        matrix = reorder(self.original, read_imatrix(self.imatrix), np.random.default_rng(number))
        write_imatrix(matrix, self.imatrix)

    def make(self, type_name: str, method: str, n_tokens: int) -> Path:
        """The file of a method, at most as large as the stock file of the type."""
        stock = self.folder / f"{type_name}-stock.gguf"
        options = [f"--imatrix={self.imatrix}"]
        options += [f"--fit={stock.stat().st_size}"] if "--fit" in METHODS[method] else [f"--type={type_name}"]
        if "--calibrate" in METHODS[method]:
            options += [f"--calibrate={self.text}", f"--calibrate-tokens={n_tokens}"]
        path = self.folder / f"{type_name}-{method.replace(' ', '')}.gguf"
        run("quantize", str(self.original), str(path), "--overwrite", "-q", *options)
        return path

    def measure(self, path: Path) -> dict[str, Scores]:
        """The scores of a file, by column."""
        return {name: scores(path, reference) for name, reference in self._references.items()}


def run(*arguments: str) -> None:
    assert stepgguf(list(arguments)) == 0, arguments


def embedded_model(folder: Path, n_tokens: int) -> Model:
    rng, text = random.Random(1000), folder / "dialogues.jsonl"
    with text.open("w") as file:
        for _ in range(n_tokens // 60):  # a dialogue has some 140 tokens
            messages, tools = tasks.random_conversation(rng)
            file.write(json.dumps({"messages": messages, "tools": tools or []}) + "\n")
    dialogues = held_out()[::9]
    return Model(CHECKPOINT, text, {"held out": dialogues, **off_distribution(dialogues, 768)}, folder)


def language_model(source: Path, folder: Path, n_tokens: int) -> Model:
    text = folder / "calibration.txt"
    documents_read = (document.read() for document in documents("calibration"))
    text.write_text("\n\n".join(documents_read)[: 2 * CHARACTERS * n_tokens])
    columns = {
        name: as_dialogues(held_out_rows(kind, ROWS, ROW_TOKENS, source))
        for name, kind in (("held out", "same"), ("other", "other"))
    }
    return Model(source / "checkpoint", text, {**columns, **off_distribution(columns["held out"], 4096)}, folder)


def off_distribution(dialogues: Sequence[Dialogue], vocabulary: int) -> dict[str, list[Dialogue]]:
    """Rows that are no text. Special tokens lie at both ends of the vocabulary; no random token is one of them."""
    rng, n = np.random.default_rng(0), ROWS // 2 * ROW_TOKENS
    tokens = rng.permutation(np.concatenate([dialogue.tokens for dialogue in dialogues]))[:n]
    rows = tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)
    return {
        "shuffled": as_dialogues(rows),
        "random": as_dialogues(rng.integers(3, vocabulary - 10, (ROWS // 2, ROW_TOKENS))),
    }


def as_dialogues(rows: npt.NDArray[np.integer[Any]]) -> list[Dialogue]:
    """Rows of tokens [n, t] as what is scored."""
    return [Dialogue(row.tolist(), np.ones(len(row) - 1, bool)) for row in rows]


class Comparison:
    """Files in the bytes of one type against its stock file: of each method and column, the ratios of all copies."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self._ratios: dict[str, dict[str, list[float]]] = {}
        self._stock: Mapping[str, Scores] = {}

    def add(self, method: str, path: Path, found: Mapping[str, Scores]) -> None:
        """Print a file's divergences; that of the first method is the stock file's."""
        if method == "stock":
            self._stock = found
        parts = []
        for name, column in found.items():
            ratio, error = kld_ratio(column, self._stock[name])
            self._ratios.setdefault(method, {}).setdefault(name, []).append(ratio)
            parts.append(f"{name} {summary(column).kld:.5f} ({ratio:.3f} ± {error:.3f})")
        predicted = gguf_header.read(path).get(PREDICTED_KLD)
        parts += [] if predicted is None else [f"predicted {predicted:.5f}"]
        print(f"{self.type_name:7} {method:16} {path.stat().st_size / 1e6:7.2f} MB  {'  '.join(parts)}", flush=True)

    def print_means(self) -> None:
        """Print the mean ratios over the copies."""
        for method, columns in self._ratios.items():
            parts = [f"{name} {statistics.mean(ratios):.3f}{_error(ratios)}" for name, ratios in columns.items()]
            print(f"{self.type_name:7} {method:16} {'  '.join(parts)}")


def _error(ratios: Sequence[float]) -> str:
    return f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='"embedded", or the folder of a trained language model')
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokens", type=int, default=25000, help="of calibration text (%(default)s)")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--weights-only", action="store_true", help="leave out what rounding activations costs")
    args = parser.parse_args()
    comparisons = [Comparison(type_name) for type_name in args.types]
    with tempfile.TemporaryDirectory() as name, mock.patch.object(folders, "measurements", return_value=Path(name)):
        folder = Path(name)
        if args.model == "embedded":
            made = embedded_model(folder, args.tokens)
        else:
            made = language_model(Path(args.model), folder, args.tokens)
        for number in range(args.copies):
            if number:
                made.reorder(number)
            for comparison in comparisons:
                for method in dict.fromkeys(["stock", *args.methods]):
                    path = made.make(comparison.type_name, method, args.tokens)
                    comparison.add(method, path, made.measure(decoded(path, folder) if args.weights_only else path))
    for comparison in comparisons:
        comparison.print_means()


if __name__ == "__main__":
    main()
