"""`stepgguf convert` against convert_hf_to_gguf.py and llama-quantize, side by side, as whole processes.

    python -m benchmarks.convert --llama-cpp DIR --llama-quantize FILE --hf-python FILE [--runs 3]
                                 [--cases Q4_K_M IQ4_XS Q4_K_M+imatrix]

DIR is a llama.cpp source tree (llama-cpp-python's sdist has one under vendor/), FILE its llama-quantize, --hf-python an
interpreter with what convert_hf_to_gguf.py needs (transformers 4.57: it does not work with 5.16 and later). The
checkpoint is made up: about half a billion weights, 288 experts; so is the importance matrix, in which every expert was
seen. Both sides run in turn and on the same cores, after a first run that fills the page cache and compiles kernels.
Printed are wall time, processor time, peak memory of the largest process, bytes written, and the ratios run by run.
The tensors of both files must be the same bytes; so ours runs with --imatrix-prior flat, as llama-quantize does.

The tokenizer of the made-up checkpoint is unknown to convert_hf_to_gguf.py, so it is told the pre-tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from stepgguf.files import gguf_header as header

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
    """What a conversion took."""

    wall: float  # seconds
    cpu: float  # seconds of all cores
    peak: int  # bytes, the largest process
    written: int  # bytes of the files that were made


def make_inputs(path: Path) -> None:
    """The checkpoint and its importance matrix: imports are here only, because torch is large."""
    from benchmarks.real_layer import write_importance
    from tests.generate import Shape, write_checkpoint

    write_checkpoint(path, Shape(n_layer=5, n_dense=3, n_expert=288, n_used=8, hidden=512, dense=1024, expert=512))
    write_importance(path, path / "imatrix.gguf")


def measure_cost(commands: list[list[str]], environment: dict[str, str]) -> Cost:
    """Run commands one after the other; bytes written are not known here."""
    started, peak, cpu = time.monotonic(), 0, 0.0
    for command in commands:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment}
        )
        err = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{command[0]} failed:\n{err.decode(errors='replace')[-2000:]}")
        cpu += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return Cost(time.monotonic() - started, cpu, peak, 0)


def remove_and_digest(path: Path) -> tuple[int, dict[str, str]]:
    """Remove a file; returns its size and a digest of each of its tensors."""
    found, size = header.read(path), path.stat().st_size
    digests = {}
    with path.open("rb") as file:
        for tensor in found.tensors:
            file.seek(found.data_start + tensor.offset)
            digests[tensor.name] = hashlib.sha256(file.read(tensor.n_bytes)).hexdigest()
    path.unlink()
    Path(f"{path}.manifest.json").unlink(missing_ok=True)
    return size, digests


class BothWays:
    """The checkpoint in a folder, converted in one pass and in two steps."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.args, self.checkpoint = args, folder / "half-billion"
        self.shim, self.bf16, self.theirs, self.ours = (
            folder / name for name in ("shim.py", "bf16.gguf", "theirs.gguf", "ours.gguf")
        )
        self.shim.write_text(SHIM)
        # In a process of its own: what this one holds would count as theirs.
        code = "import sys, pathlib, benchmarks.convert as b; b.make_inputs(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(self.checkpoint)], check=True)

    def pair(self, type_name: str, imatrix: bool) -> tuple[Cost, Cost]:
        """(ours, theirs). Exits if the files differ in a tensor."""
        matrix = ["--imatrix", str(self.checkpoint / "imatrix.gguf")] if imatrix else []
        ours = [sys.executable, "-m", "stepgguf", "convert", str(self.checkpoint), str(self.ours), "-t", type_name]
        one = measure_cost([[*ours, "-q", *matrix, *(["--imatrix-prior", "flat"] if imatrix else [])]], {})
        convert = [str(self.args.hf_python), str(self.shim), str(self.args.llama_cpp), str(self.checkpoint)]
        quantize = [str(self.args.llama_quantize), *matrix, str(self.bf16), str(self.theirs), type_name]
        two = measure_cost(
            [[*convert, "--outtype", "bf16", "--outfile", str(self.bf16)], quantize],
            {"LD_LIBRARY_PATH": self.args.library_path},
        )
        size, digests = remove_and_digest(self.ours)
        (middle, _), (their_size, their_digests) = remove_and_digest(self.bf16), remove_and_digest(self.theirs)
        if digests != their_digests:
            sys.exit(f"{type_name}: the files differ in {[n for n in digests if digests[n] != their_digests.get(n)]}")
        return replace(one, written=size), replace(two, written=middle + their_size)

    def compare(self, case: str) -> None:
        type_name, plus, _ = case.partition("+imatrix")
        self.pair(type_name, bool(plus))
        pairs = [self.pair(type_name, bool(plus)) for _ in range(self.args.runs)]
        print(f"{case}: the same bytes in every tensor")
        for name, costs in (("one pass", [a for a, _ in pairs]), ("two steps", [b for _, b in pairs])):
            print(
                f"  {name:9}  {statistics.median(c.wall for c in costs):6.1f} s wall, "
                f"{statistics.median(c.cpu for c in costs):6.1f} s processor, peak "
                f"{max(c.peak for c in costs) / 2**20:.0f} MiB, written {costs[0].written / 1e6:.0f} MB"
            )
        for name, ratios in (("wall", [a.wall / b.wall for a, b in pairs]), ("cpu", [a.cpu / b.cpu for a, b in pairs])):
            print(
                f"  {name} ratio: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--hf-python", type=Path, required=True)
    parser.add_argument("--library-path", default="", help="LD_LIBRARY_PATH of llama-quantize")
    parser.add_argument("--cases", nargs="+", default=["Q4_K_M", "IQ4_XS", "Q4_K_M+imatrix"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="stepgguf-bench-"))
    try:
        both = BothWays(folder, args)
        for case in args.cases:
            both.compare(case)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
