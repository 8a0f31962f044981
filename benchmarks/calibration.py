"""What calibration gains: stock codes and types, --calibrate, --fit and both, in the bytes of each stock type.

    python -m benchmarks.calibration MODEL [--types Q2_K Q3_K_M Q4_K_S Q5_K_M] [--tokens 25000] [--methods ...]

MODEL: "embedded", or the folder of a language model (benchmarks/language.py, which trains one). All files have the same
importance matrix, of the same text that codes and types are calibrated on: dialogues of the kind that the embedded
model was trained on, or documents that the language model neither learnt nor is measured on.

KL divergence from the F32 file through llama.cpp, whose 8-bit activations have a part in it that no weights remove;
with --weights-only of the decoded weights. Columns:

    held out    the embedded model: dialogues that training never showed. The language model: documents of the same kind
    other       the language model: text of another kind (dictionary, fortunes, manual pages in German and French)
    random      random tokens: what is bought with behaviour off the calibration text shows here
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from benchmarks.language import held_out_rows
from benchmarks.language_text import documents
from benchmarks.quality import Dialogue, Scores, decoded, held_out, kld_ratio, reference_logits, scores, summary
from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.files import folders

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
        self.checkpoint, self.text, self.folder = checkpoint, text, folder
        self.original, self.imatrix = folder / "f32.gguf", folder / "imatrix.gguf"
        self._convert(self.original, "--type", "F32")
        run("imatrix", str(checkpoint), str(text), "-o", str(self.imatrix), "-q")
        self._references = {name: reference_logits(self.original, column) for name, column in columns.items()}

    def make(self, type_name: str, method: str, n_tokens: int) -> Path:
        """The file of a method, at most as large as the stock file of the type."""
        stock = self.folder / f"{type_name}-stock.gguf"
        options = [f"--imatrix={self.imatrix}"]
        options += [f"--fit={stock.stat().st_size}"] if "--fit" in METHODS[method] else [f"--type={type_name}"]
        if "--calibrate" in METHODS[method]:
            options += [f"--calibrate={self.text}", f"--calibrate-tokens={n_tokens}"]
        path = self.folder / f"{type_name}-{method.replace(' ', '')}.gguf"
        self._convert(path, *options)
        return path

    def measure(self, path: Path) -> dict[str, Scores]:
        """The scores of a file, by column."""
        return {name: scores(path, reference) for name, reference in self._references.items()}

    def _convert(self, dest: Path, *options: str) -> None:
        run("convert", str(self.checkpoint), str(dest), "--mtp", "drop", "-q", *options)


def run(*arguments: str) -> None:
    assert stepgguf(list(arguments)) == 0, arguments


def embedded_model(folder: Path, n_tokens: int) -> Model:
    rng, text = random.Random(1000), folder / "dialogues.jsonl"
    with text.open("w") as file:
        for _ in range(n_tokens // 60):  # a dialogue has some 140 tokens
            messages, tools = tasks.random_conversation(rng)
            file.write(json.dumps({"messages": messages, "tools": tools or []}) + "\n")
    columns = {"held out": held_out()[::9], "random": random_rows(768)}
    return Model(CHECKPOINT, text, columns, folder)


def language_model(source: Path, folder: Path, n_tokens: int) -> Model:
    text = folder / "calibration.txt"
    documents_read = (document.read() for document in documents("calibration"))
    text.write_text("\n\n".join(documents_read)[: 2 * CHARACTERS * n_tokens])
    columns = {
        name: as_dialogues(held_out_rows(kind, ROWS, ROW_TOKENS, source))
        for name, kind in (("held out", "same"), ("other", "other"))
    }
    return Model(source / "checkpoint", text, {**columns, "random": random_rows(4096)}, folder)


def random_rows(vocabulary: int) -> list[Dialogue]:
    """Rows of random tokens; special ones lie at both ends of the vocabulary and are left out."""
    tokens = np.random.default_rng(0).integers(3, vocabulary - 10, (ROWS // 2, ROW_TOKENS))
    return as_dialogues(tokens)


def as_dialogues(rows: npt.NDArray[np.integer[Any]]) -> list[Dialogue]:
    """Rows of tokens [n, t] as what is scored."""
    return [Dialogue(row.tolist(), np.ones(len(row) - 1, bool)) for row in rows]


def describe(found: Mapping[str, Scores], stock: Mapping[str, Scores]) -> str:
    """Each column's KL divergence, and its ratio to the stock file's with the error over rows or dialogues."""
    parts = []
    for name, column in found.items():
        ratio, error = kld_ratio(column, stock[name])
        parts.append(f"{name} {summary(column).kld:.5f} ({ratio:.3f} ± {error:.3f})")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='"embedded", or the folder of a trained language model')
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokens", type=int, default=25000, help="of calibration text (%(default)s)")
    parser.add_argument("--weights-only", action="store_true", help="leave out what rounding activations costs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, mock.patch.object(folders, "measurements", return_value=Path(name)):
        folder = Path(name)
        if args.model == "embedded":
            made = embedded_model(folder, args.tokens)
        else:
            made = language_model(Path(args.model), folder, args.tokens)
        for type_name in args.types:
            first = None
            for method in dict.fromkeys(["stock", *args.methods]):
                path = made.make(type_name, method, args.tokens)
                found = made.measure(decoded(path, folder) if args.weights_only else path)
                first = first or found
                size = path.stat().st_size / 1e6
                print(f"{type_name:7} {method:16} {size:7.2f} MB  {describe(found, first)}", flush=True)


if __name__ == "__main__":
    main()
