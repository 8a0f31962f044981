"""One layer of the real model's size through `stepgguf convert`: speed, peak memory, and what that means for the whole.

    python -m benchmarks.real_layer [--cases Q4_K_S Q4_K_M+imatrix IQ4_XS] [--folder DIR] [--keep]

Makes a checkpoint with one MoE layer of 288 experts of 1280 x 4096 (9 GB in BF16) and a dense layer, about 10 GB on
disk, converts it in a process of its own and prints what that process used. Run it once; it needs 20 GB of disk.

The prediction for the real model is its 196.8 G weights at this speed a core, on 20 cores, if the disk delivers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import tensor_specs
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, write_imatrix
from tests.generate import Shape, config, values

REAL = Shape(
    n_layer=2, n_dense=1, n_expert=288, n_used=8, hidden=4096, dense=11264, expert=1280, head_dim=128,
    heads=(64, 96), kv_heads=8, window=512,
)  # fmt: skip
WHOLE = 196.8e9  # weights of the 45 layers


def write(path: Path, shape: Shape = REAL) -> None:
    """The checkpoint, one shard a tensor where it is large; experts are cut from one pool of random numbers."""
    path.mkdir(parents=True)
    settings = config(shape)
    (path / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, path)
    rng = torch.Generator().manual_seed(0)
    pool = (torch.randn(32 * 2**20, generator=rng) * 0.02).bfloat16()
    rest = {}
    for spec in tensor_specs(HParams.from_config(settings)):
        if spec.role.endswith("_exps"):
            n, rows, columns = spec.shape
            starts = torch.randint(0, len(pool) - rows * columns, (n,), generator=rng).tolist()
            tensor = torch.stack([pool[s : s + rows * columns].view(rows, columns) for s in starts])
            save_file({spec.source: tensor}, path / f"{spec.role}.safetensors")
        else:
            tensor = values(spec, rng)
            rest[spec.source] = tensor if spec.role == "exp_probs_b" else tensor.bfloat16()
    save_file(rest, path / "rest.safetensors")


def write_importance(checkpoint: Path, path: Path) -> None:
    """Random importance for every matrix, each expert with its own."""
    rng, entries = np.random.default_rng(0), dict[str, ImatrixEntry]()
    with Checkpoint(checkpoint) as opened:
        for spec in opened.specs:
            if spec.is_quantizable and spec.role != "token_embd":
                n = spec.shape[0] if len(spec.shape) == 3 else 1
                sums = rng.gamma(0.5, 1.0, (n, spec.shape[-1])).astype(np.float32) * 1000
                entries[spec.name] = ImatrixEntry(sums, np.full(n, 1000, np.float32))
    write_imatrix(Imatrix(None, ("made up",), 100, 512, entries), path)


def convert(case: str, folder: Path) -> None:
    type_name, plus, _ = case.partition("+imatrix")
    checkpoint = folder / "layer"
    command = [
        sys.executable,
        "-m",
        "stepgguf",
        "convert",
        str(checkpoint),
        str(folder / "layer.gguf"),
        "-t",
        type_name,
    ]
    command += ["--imatrix", str(folder / "imatrix.gguf")] if plus else []
    threads = os.cpu_count() or 1
    done = subprocess.run(
        [*command, "--overwrite", "--json", "--threads", str(threads)], stdout=subprocess.PIPE, check=True
    )
    report = json.loads(done.stdout)
    n_in = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    n_weights, seconds = report["tensor_bytes"] * 8 / report["bpw"], report["seconds"]
    a_core = n_weights / seconds / threads
    print(
        f"{case}: {n_in / 1e9:.2f} GB in, {report['tensor_bytes'] / 1e9:.2f} GB out, {seconds:.1f} s, "
        f"{a_core / 1e6:.0f} M weights/s/core, peak memory {report['peak_rss_bytes'] / 2**20:.0f} MiB; "
        f"the whole model on 20 cores: {WHOLE / a_core / 20 / 60:.1f} minutes",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["Q4_K_S", "Q4_K_M+imatrix", "IQ4_XS"])
    parser.add_argument("--folder", type=Path, help="where to put the 20 GB; default: a temporary directory")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and use it again")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="stepgguf-bench-"))
    try:
        if not (folder / "layer").exists():
            code = "import sys, pathlib, benchmarks.real_layer as b; b.write(pathlib.Path(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", code, str(folder / "layer")], check=True)
        write_importance(folder / "layer", folder / "imatrix.gguf")
        for case in args.cases:
            convert(case, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
