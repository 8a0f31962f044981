"""How often the embedded model is right, and its MTP heads: held-out letter counts and sums, greedy, in llama.cpp.

python -m benchmarks.embedded_model [--n 200] [--types BF16 Q4_K_M]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stepgguf.chat.exchange import ChatModel, Reply
from stepgguf.chat.request import ChatRequest
from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.runtime.engine import Sampling, Stream, Timings
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions


def answers(chat: ChatModel, cases: list[list[tasks.Message]]) -> tuple[list[bool], list[Timings]]:
    """Whether each question gets its answer, word for word. The reasoning is the model's own affair."""
    right, timings = [], []
    for question, answer in cases:
        prepared = chat.prepare(ChatRequest([question], Sampling(temperature=0.0), max_tokens=300))
        reply = Reply(prepared)
        deltas = [delta for event in Stream(chat.engine, prepared.request) for delta in reply.feed(event)]
        right.append("".join(delta.text for delta in deltas if delta.kind == "text").strip() == answer["content"])
        timings.append(reply.timings)
    return right, timings


def drafts(timings: list[Timings]) -> str:
    """Tokens a step, and what share of each head's drafts was accepted."""
    heads = [
        sum(t.accepted[i] for t in timings if len(t.accepted) > i)
        / sum(t.drafted[i] for t in timings if len(t.drafted) > i)
        for i in range(max(len(t.drafted) for t in timings))
    ]
    steps = sum(t.n_generated for t in timings) / sum(t.n_steps for t in timings)
    return f"{steps:.2f} tokens a step, accepted by head {', '.join(f'{share:.0%}' for share in heads)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--types", nargs="+", default=["BF16", "Q8_0", "Q4_K_M"])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for type_name in args.types:
            path = Path(folder) / f"{type_name}.gguf"
            assert stepgguf(["convert", str(args.checkpoint), str(path), "-t", type_name, "-q"]) == 0
            with LlamaEngine(path, LlamaOptions(n_ctx=1024, draft=3)) as engine:
                chat = ChatModel(engine)
                for name, cases in (("letters", tasks.held_out_letters(args.n)), ("sums", tasks.held_out_sums(args.n))):
                    results, timings = answers(chat, cases)
                    wrong = [case[0]["content"] for case, ok in zip(cases, results, strict=True) if not ok]
                    share = sum(results) / len(results)
                    print(
                        f"{type_name} {name}: {share:.1%} of {len(results)}; wrong: {wrong[:4]}; {drafts(timings)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
