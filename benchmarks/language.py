"""A Step-3.5 language model on real text, trained once and kept: what calibrated quantization is proved on.

    python -m benchmarks.language [--out FOLDER] [--steps 2000] [--threads 2]

The embedded model plays two small tasks, and its activations have low rank: methods that use second moments look too
good on it. This one has 54 million parameters (21 million for a token: 16 experts, 2 used), learns code and prose
(language_text.py), and has every mechanism of Step-3.5 but MTP blocks. Weights are kept in BF16.

    FOLDER/checkpoint/     config.json, safetensors, tokenizer.json: what `stepgguf convert` reads
    FOLDER/training.pt     weights, optimizer and steps of a training that has not ended; starting again goes on

Most steps see rows of 512 tokens, every eighth rows of 2,048: quality is measured at both. The rate falls over the last
40 % of the steps, so --steps may be another number when a training goes on before that. OMP_WAIT_POLICY=passive helps
much where other programs want the cores too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.language_rows import FOLDER, calibration_rows, held_out_rows
from benchmarks.language_training import STEP_TOKENS, STEPS, train

__all__ = ["calibration_rows", "held_out_rows", "is_trained", "open_model"]


def open_model(folder: Path = FOLDER) -> Path:
    """The folder of the checkpoint, trained now if it is not there. During training it is what was saved last."""
    if not (folder / "checkpoint").exists():
        train(folder)
    return folder / "checkpoint"


def is_trained(folder: Path) -> bool:
    """Whether the folder's checkpoint is of a training that came to its end."""
    return (folder / "checkpoint").exists() and not (folder / "training.pt").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model is kept (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {STEP_TOKENS} tokens each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if is_trained(args.out):
        print(f"{args.out} has a trained model. Remove the folder to train another.")
    else:
        train(args.out, args.steps)


if __name__ == "__main__":
    main()
