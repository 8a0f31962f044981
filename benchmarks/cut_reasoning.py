"""Does a model that is stopped in its thinking answer, or think on in its answer? The embedded one, as it samples.

python -m benchmarks.cut_reasoning [--n 200] [--type Q4_K_M]

Half of the questions are letter counts, half are sums, none of them from the training. An answer counts if it is one
sentence of the form that the question asks for, right or wrong, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from stepgguf.chat.exchange import ChatModel, Reply
from stepgguf.chat.request import ChatRequest
from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.runtime.engine import Stream, Tokens
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

ANSWER = re.compile(r"There (is 1 '.'|are \d+ '.'s)\.|\d+ \+ \d+ = \d+")
BUDGETS = (0, 5, 10, 20)
ANSWER_NOW = 7  # tokens of thinking after which somebody wants the answer now


def answer(chat: ChatModel, question: tasks.Message, seed: int, budget: int | None) -> str:
    """The text of a whole answer; without a budget its thinking is ended by hand."""
    sampling = replace(chat.engine.info.sampling, seed=seed)
    prepared = chat.prepare(ChatRequest([question], sampling, max_tokens=300, reasoning_budget=budget))
    reply, deltas, n = Reply(prepared), [], 0
    stream = Stream(chat.engine, prepared.request)
    for event in stream:
        deltas += reply.feed(event)
        n += len(event.steps) if isinstance(event, Tokens) else 0
        if budget is None and n >= ANSWER_NOW:
            stream.end_reasoning()
    return "".join(delta.text for delta in reply.settle_reasoning(deltas) if delta.kind == "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    questions = [case[0] for n in (args.n // 2,) for case in (*tasks.held_out_letters(n), *tasks.held_out_sums(n))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        assert stepgguf(["convert", str(args.checkpoint), str(path), "-t", args.type, "-q"]) == 0
        with LlamaEngine(path, LlamaOptions(n_ctx=1024, threads=1)) as engine:
            chat = ChatModel(engine)
            for budget in (*BUDGETS, None):
                texts = [answer(chat, question, seed, budget) for seed, question in enumerate(questions)]
                bad = [text for text in texts if not ANSWER.fullmatch(text)]
                name = f"answer now after {ANSWER_NOW}" if budget is None else f"budget {budget}"
                print(f"{name}: {1 - len(bad) / len(texts):.1%} of {len(texts)}; others: {bad[:2]}", flush=True)


if __name__ == "__main__":
    main()
