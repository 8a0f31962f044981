"""One layer of the real model's size through `stepgguf convert`: time and peak memory.

    python -m benchmarks.real_layer [--type Q4_K_S] [--folder DIR] [--keep]

Makes a checkpoint with one MoE layer of 288 experts of 1280 x 4096 (9 GB in BF16) and a dense layer, about 10 GB on
disk, converts it in a process of its own and prints what that process used. Run it once; it needs 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from stepgguf.demo import CHECKPOINT
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import tensor_specs
from tests.generate import Shape, config, values

REAL = Shape(
    n_layer=2, n_dense=1, n_expert=288, n_used=8, hidden=4096, dense=11264, expert=1280, head_dim=128,
    heads=(64, 96), kv_heads=8, window=512,
)  # fmt: skip


def write(path: Path) -> None:
    """The checkpoint, one shard a tensor where it is large; experts are cut from one pool of random numbers."""
    path.mkdir(parents=True)
    settings = config(REAL)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--type", default="Q4_K_S")
    parser.add_argument("--folder", type=Path, help="where to put the 20 GB; default: a temporary directory")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and use it again")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="stepgguf-bench-"))
    checkpoint, out = folder / "layer", folder / "layer.gguf"
    try:
        if not checkpoint.exists():
            code = "import sys, pathlib, benchmarks.real_layer as b; b.write(pathlib.Path(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True)
        command = [
            sys.executable,
            "-m",
            "stepgguf",
            "convert",
            str(checkpoint),
            str(out),
            "-t",
            args.type,
            "--overwrite",
        ]
        report = json.loads(
            subprocess.run([*command, "-t", args.type, "--json"], stdout=subprocess.PIPE, check=True).stdout
        )
        n_in = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print(
            f"{args.type}: {n_in / 1e9:.2f} GB in, {report['tensor_bytes'] / 1e9:.2f} GB out, "
            f"{report['seconds']:.0f} s, "
            f"{n_in / report['seconds'] / 1e6:.0f} MB/s in, peak RSS {report['peak_rss_bytes'] / 2**20:.0f} MiB"
        )
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
