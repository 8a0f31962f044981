"""stepgguf serve under load: errors, memory, and how long the first token takes.

    python -m benchmarks.load [--model FILE.gguf] [--seconds 60] [--streams 1 4 16 64]

Each stream asks one question after the other. One in eight clients leaves in mid-answer, one in eight reads slowly
(a line every 50 ms). Without --model: the embedded model. Printed for each number of streams: answers, errors, the
first token's time (median, p99), the bound that the queue implies (waiting for everyone ahead, at the median time of
an answer, in `parallel` slots), and the server's memory at the start and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving import KEY, Side, running
from stepgguf.cli.main import main as stepgguf
from stepgguf.demo import CHECKPOINT

PARALLEL = 8
SLOW_SECONDS = 0.05


@dataclass
class Tally:
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    left: int = 0
    errors: list[str] = field(default_factory=list)


async def ask(side: Side, rng: random.Random, tally: Tally) -> None:
    kind = rng.choice(["leaves", "slow", *["whole"] * 6])
    question = f"What is {rng.randrange(1000)} + {rng.randrange(1000)}?"
    body = json.dumps({"messages": [{"role": "user", "content": question}], "stream": True}).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    n, done, last = 0, False, b""
    try:
        async for line in reader:
            last = line if line.strip() else last
            if line.startswith(b"data: {"):
                n += 1
                if n == 2:  # the first has only the role
                    tally.first.append(time.perf_counter() - started)
                if kind == "leaves" and n == 5:
                    tally.left += 1
                    return
                if kind == "slow":
                    await asyncio.sleep(SLOW_SECONDS)
            done = done or line.startswith(b"data: [DONE]")
        if done:
            tally.whole.append(time.perf_counter() - started)
        else:
            tally.errors.append(last.decode(errors="replace")[:200])
    finally:
        writer.close()


async def load(side: Side, streams: int, seconds: float, seed: int) -> Tally:
    tally = Tally()
    end = time.monotonic() + seconds

    async def stream(n: int) -> None:
        rng = random.Random(1000 * seed + n)
        while time.monotonic() < end:
            try:
                await ask(side, rng, tally)
            except OSError as error:
                tally.errors.append(repr(error))

    await asyncio.gather(*(stream(n) for n in range(streams)))
    return tally


def resident(pid: int) -> float:
    """MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--threads", default="1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "model.gguf"
        if options.model is None:
            assert stepgguf(["convert", str(CHECKPOINT), str(model), "-t", "BF16", "-q"]) == 0
        command = [sys.executable, "-m", "stepgguf", "serve", str(model), "--quiet", "--threads", options.threads]
        command += ["--parallel", str(PARALLEL), "--queue", "64", "--cache-ram", "64MiB"]
        with running("stepgguf", command, []) as side:
            asyncio.run(load(side, 8, 5, 99))
            for streams in options.streams:
                before = resident(side.pid)
                tally = asyncio.run(load(side, streams, options.seconds, streams))
                first = sorted(tally.first)
                p99 = first[int(0.99 * (len(first) - 1))]
                waits = max(0, streams - PARALLEL) / PARALLEL
                bound = statistics.median(tally.whole) * (1 + waits)
                print(
                    f"{streams:>3} streams: {len(tally.whole)} answers, {tally.left} left early, "
                    f"{len(tally.errors)} errors; first token {statistics.median(first):.3f} s, p99 {p99:.3f} s "
                    f"(bound {bound:.3f} s); {before:.0f} -> {resident(side.pid):.0f} MiB",
                    flush=True,
                )
                for error in sorted(set(tally.errors))[:3]:
                    print("   ", error)


if __name__ == "__main__":
    main()
