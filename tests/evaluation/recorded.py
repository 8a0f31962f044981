"""What llama-perplexity itself wrote and printed (llama.cpp 0c1e57098, of llama-cpp-python 0.3.36), kept in tests/data.

The embedded model, 7 chunks of 32 tokens of its own dialogues:

    llama-perplexity -m Q4_K.gguf -f text.txt -c 32 --chunks 7 --save-all-logits q4.base      base.xz
    llama-perplexity -m F32.gguf -f text.txt -c 32 --chunks 7 --save-all-logits f32.base      digest of the file, PPL
    llama-perplexity -m F32.gguf --kl-divergence --kl-divergence-base q4.base                 statistics.txt

logits.xz has the logits of F32.gguf, as llama.cpp gave them: numbers of another processor would differ a little.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path

import numpy as np

from stepgguf.evaluation.softmax import Floats
from tests.conftest import DATA

FOLDER = DATA / "perplexity"
N_VOCAB, N_SCORED = 768, 105
F32_BASE_SHA256 = "78f8d674477886f74158c64e024ddf3c125dd3249e523841a20e1062f1116dc6"


def base_bytes() -> bytes:
    """The base file that was made with Q4_K.gguf."""
    return lzma.decompress((FOLDER / "base.xz").read_bytes())


def write_base(path: Path) -> Path:
    path.write_bytes(base_bytes())
    return path


def logits() -> Floats:
    """The logits of F32.gguf, [N_SCORED, N_VOCAB]."""
    return np.frombuffer(lzma.decompress((FOLDER / "logits.xz").read_bytes()), np.float32).reshape(N_SCORED, N_VOCAB)


def statistics() -> dict[str, list[str]]:
    """What was printed of F32.gguf against the base file: for each name the numbers, as they were printed."""
    lines = (line.partition(":") for line in (FOLDER / "statistics.txt").read_text().splitlines() if ": " in line)
    return {" ".join(name.split()): re.findall(r"-?\d+\.\d+", numbers) for name, _, numbers in lines}
