"""`stepgguf convert` against convert_hf_to_gguf.py and llama-quantize, side by side, as whole processes.

    python -m benchmarks.one_pass --llama-cpp DIR --llama-quantize FILE --hf-python FILE [--type Q4_K_M] [--runs 3]

DIR is a llama.cpp source tree (llama-cpp-python's sdist has one under vendor/), FILE its llama-quantize, --hf-python an
interpreter with what convert_hf_to_gguf.py needs (transformers 4.57: it does not work with 5.16 and later). The
checkpoint is made up: about half a billion weights, 288 experts. Both sides run in turn and on the same cores; printed
are wall time, peak memory of the largest process, bytes written, and the ratio run by run.

The tokenizer of the made-up checkpoint is unknown to convert_hf_to_gguf.py, so it is told the pre-tokenizer.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SHIM = """
import runpy, sys
root, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
sys.argv[0] = root + "/convert_hf_to_gguf.py"
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak: int  # bytes, the largest process
    written: int  # bytes of the files that were made


def make(path: Path) -> None:
    """The checkpoint: imported here only, because torch is large."""
    from tests.generate import Shape, write_checkpoint

    write_checkpoint(path, Shape(n_layer=5, n_dense=3, n_expert=288, n_used=8, hidden=512, dense=1024, expert=512))


def run(commands: list[list[str]], made: list[Path], environment: dict[str, str]) -> Cost:
    """Run commands one after the other; the files they make are measured and removed."""
    started, peak = time.monotonic(), 0
    for command in commands:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment}
        )
        err = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{command[0]} failed:\n{err.decode(errors='replace')[-2000:]}")
        peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    seconds = time.monotonic() - started
    written = sum(path.stat().st_size for path in made)
    for path in made:
        path.unlink()
        Path(f"{path}.manifest.json").unlink(missing_ok=True)
    return Cost(seconds, peak, written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--hf-python", type=Path, required=True)
    parser.add_argument("--library-path", default="", help="LD_LIBRARY_PATH of llama-quantize")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="stepgguf-bench-"))
    try:
        checkpoint = folder / "half-billion"  # in a process of its own: what this one holds would count as theirs
        code = "import sys; from pathlib import Path; from benchmarks.one_pass import make; make(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True)
        shim, bf16, theirs, ours = (folder / name for name in ("shim.py", "bf16.gguf", "theirs.gguf", "ours.gguf"))
        shim.write_text(SHIM)
        convert = [str(args.hf_python), str(shim), str(args.llama_cpp), str(checkpoint), "--outtype", "bf16"]
        two = [[*convert, "--outfile", str(bf16)], [str(args.llama_quantize), str(bf16), str(theirs), args.type]]
        one = [[sys.executable, "-m", "stepgguf", "convert", str(checkpoint), str(ours), "-t", args.type, "-q"]]
        pairs = []
        for i in range(args.runs + 1):  # the first warms the page cache
            a = run(one, [ours], {})
            b = run(two, [bf16, theirs], {"LD_LIBRARY_PATH": args.library_path})
            if i:
                pairs.append((a, b))
        for name, costs in (("one pass", [a for a, _ in pairs]), ("two steps", [b for _, b in pairs])):
            print(
                f"{name}: {statistics.median(c.seconds for c in costs):.1f} s, peak "
                f"{max(c.peak for c in costs) / 2**20:.0f} MiB, written {costs[0].written / 1e6:.0f} MB"
            )
        ratios = sorted(a.seconds / b.seconds for a, b in pairs)
        middle, low, high = statistics.median(ratios), ratios[0], ratios[-1]
        print(f"wall ratio one pass / two steps: median {middle:.2f} ({low:.2f} to {high:.2f})")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
