"""stepgguf serve against llama-server on the same GGUF, side by side: tok/s, time to first token, MTP.

    python -m benchmarks.serving [--model FILE.gguf] [--llama-server PROGRAM] [--rounds 3]

Both are driven over HTTP by the same client, in turns. Without --model: random weights with the real model's
vocabulary of 128,896 tokens, so that choosing a token costs what it does there. Without --llama-server: llama.cpp's own
server as the xllamacpp wheel embeds it; its code for the CPU may be older or slower than that of llama-cpp-python,
so compare a llama-server that was built like it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stepgguf.cli.main import main as stepgguf
from stepgguf.runtime.llama.model import LlamaModel
from stepgguf.runtime.placement import Placement
from tests.generate import Shape, write_checkpoint

ROOT = Path(__file__).parents[1]
STAND_IN = [sys.executable, str(ROOT / "tests" / "runtime" / "llama_server.py")]
TOKENS = 96  # per answer
PREFIX = 4096
CTX = 16384
PARALLEL = 8
KEY = "benchmark"


@dataclass(frozen=True)
class Answer:
    first: float  # seconds to the first token
    last: float  # seconds to the end


@dataclass(frozen=True)
class Side:
    """A running server."""

    name: str
    port: int
    ends: list[int]
    pid: int = 0

    async def ask(self, prompt: list[int], tokens: int) -> Answer:
        """One streamed completion of exactly so many tokens."""
        bias = {str(token): -100 for token in self.ends}
        body = json.dumps(
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": bias}
        ).encode()
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        first = 0.0
        async for line in reader:
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise ConnectionError(line.decode())
            if line.startswith(b"data: {") and not first:
                first = time.perf_counter() - started
        writer.close()
        return Answer(first, time.perf_counter() - started)

    def together(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        async def all_of_them() -> list[Answer]:
            return list(await asyncio.gather(*(self.ask(prompt, tokens) for prompt in prompts)))

        return asyncio.run(all_of_them())


@contextmanager
def running(name: str, command: list[str], ends: list[int]) -> Iterator[Side]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "LLAMA_API_KEY": KEY, "STEPGGUF_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    side = Side(name, port, ends, process.pid)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{name} has ended with {process.returncode}"
            try:
                side.together([[5, 6]], 1)
                break
            except ConnectionError:
                time.sleep(0.1)
        yield side
    finally:
        process.terminate()
        process.wait(20)


def prompts(n: int, length: int, salt: int) -> list[list[int]]:
    return [[(17 * i + 101 * k + 13 * salt) % 600 + 20 for i in range(length)] for k in range(n)]


def throughput(streams: int, side: Side, salt: int) -> float:
    """Tokens a second of all streams together."""
    started = time.perf_counter()
    side.together(prompts(streams, 32, salt), TOKENS)
    return streams * TOKENS / (time.perf_counter() - started)


def cached_first_token(side: Side, salt: int) -> float:
    """Seconds to the first token of a prompt whose first 4,096 tokens were read before."""
    (prefix,) = prompts(1, PREFIX, salt)
    side.together([[*prefix, 30, 31]], 1)
    return side.together([[*prefix, 40, 41, 42]], 1)[0].first


def compare(title: str, sides: list[Side], rounds: int, measure: Callable[[Side, int], float], unit: str) -> None:
    for side in sides:
        measure(side, 999)
    figures: dict[str, list[float]] = {side.name: [] for side in sides}
    for n in range(rounds):
        for side in sides:
            figures[side.name].append(measure(side, n))
    ours, theirs = figures.values()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    values = ", ".join(f"{name} {statistics.median(v):.4g} {unit}" for name, v in figures.items())
    print(f"{title}: {values}, ratio {ratio:.2f}", flush=True)


def make_model(folder: Path) -> Path:
    write_checkpoint(folder / "checkpoint", Shape(n_mtp=3, vocab=128_896, n_expert=32, n_used=8, context=16384))
    assert stepgguf(["convert", str(folder / "checkpoint"), str(folder / "model.gguf"), "-t", "Q8_0", "-q"]) == 0
    return folder / "model.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--llama-server", nargs="+", default=STAND_IN)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder))
        loaded = LlamaModel(model, Placement(gpu_layers=0), mtp=False, mmap=True, progress=None)
        ends = sorted(loaded.ends)
        loaded.close()
        ours = [sys.executable, "-m", "stepgguf", "serve", str(model), "--quiet", "--queue", "64"]
        ours += ["--ctx", str(CTX), "--parallel", str(PARALLEL), "--threads", options.threads]
        theirs = [*options.llama_server, "--model", str(model), "--threads", options.threads]
        theirs += ["--ctx-size", str(CTX * PARALLEL), "--parallel", str(PARALLEL)]
        for mtp in (False, True):
            print("with MTP" if mtp else "without MTP", flush=True)
            with (
                running("stepgguf", [*ours, *([] if mtp else ["--draft", "0"])], ends) as a,
                running("llama-server", [*theirs, *(["--spec-type", "draft-mtp"] if mtp else [])], ends) as b,
            ):
                for streams in (1, 4, 8):
                    compare(f"  {streams} streams", [a, b], options.rounds, partial(throughput, streams), "tok/s")
                compare("  first token after 4,096 cached", [a, b], options.rounds, cached_first_token, "s")


if __name__ == "__main__":
    main()
