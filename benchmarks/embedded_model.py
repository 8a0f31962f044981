"""How often the embedded model is right: held-out letter counts and sums, greedy, through llama.cpp.

python -m benchmarks.embedded_model [--n 200] [--types BF16 Q4_K_M]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stepgguf.chat.session import Session
from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.llama import LlamaEngine


def right(engine: LlamaEngine, cases: list[list[tasks.Message]]) -> list[bool]:
    """Whether each question gets its answer, word for word. The reasoning is the model's own affair."""
    result = []
    for question, answer in cases:
        session = Session(engine, Sampling(temperature=0.0), max_tokens=300)
        text = "".join(delta.text for delta in session.ask(question["content"]) if delta.kind == "text")
        result.append(text.strip() == answer["content"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--types", nargs="+", default=["BF16", "Q8_0", "Q4_K_M"])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            path = Path(folder) / f"{kind}.gguf"
            assert stepgguf(["convert", str(args.checkpoint), str(path), "-t", kind, "-q"]) == 0
            with LlamaEngine(path, n_ctx=1024) as engine:
                for name, cases in (("letters", tasks.held_out_letters(args.n)), ("sums", tasks.held_out_sums(args.n))):
                    results = right(engine, cases)
                    wrong = [case[0]["content"] for case, ok in zip(cases, results, strict=True) if not ok]
                    share = sum(results) / len(results)
                    print(f"{kind} {name}: {share:.1%} of {len(results)}; wrong: {wrong[:4]}", flush=True)


if __name__ == "__main__":
    main()
