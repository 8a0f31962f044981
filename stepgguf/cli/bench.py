"""stepgguf bench: how fast a file reads and writes on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments, loading

if TYPE_CHECKING:
    from stepgguf.runtime.engine import Timings
    from stepgguf.runtime.llama import LlamaEngine

PROMPT = 512  # tokens whose reading is timed
QUESTION = "Add 4807 and 3996 step by step, then explain how a heat pump works."


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. tok/s of all requests together; drafted and accepted MTP tokens by head."""

    depth: int
    batch: int
    prompt_tps: float
    generation_tps: float
    tokens_per_step: float
    drafted: list[int]
    accepted: list[int]


def bench(
    path: arguments.Gguf,
    depths: Annotated[str, typer.Option(metavar="N,N", help="Tokens of context before the measurement.")] = "0,4096",
    batches: Annotated[str, typer.Option(metavar="N,N", help="Requests at the same time.")] = "1,4",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=8, help="Tokens to generate in each.")] = 64,
    gpu_layers: loading.GpuLayers = -1,
    threads: arguments.Threads = None,
    mtp_file: loading.MtpFile = None,
    mmap: loading.Mmap = None,
    force: loading.Force = False,
    json: arguments.Json = False,
    quiet: arguments.Quiet = False,
) -> None:
    """Measure prompt and generation speed by depth and batch, and what the MTP heads gain.

    Depth and batch are measured without drafting, on arbitrary tokens. The MTP gain is measured on the answer to one
    question, greedily, at each number of drafted tokens: how many are accepted depends on the text.

    Examples:

    - `stepgguf bench step-q4_k_s.gguf`
    - `stepgguf bench step-q4_k_s.gguf --depths 0,16384,65536 --batches 1,2,8 --json`
    """
    from stepgguf.cli import output

    depth_list, batch_list = _numbers(depths, "--depths", 0), _numbers(batches, "--batches", 1)
    most = max(batch_list)
    ctx = most * (max(depth_list) + PROMPT + 2 * tokens + 64)
    options = loading.EngineOptions(
        ctx,
        most,
        gpu_layers=gpu_layers,
        threads=threads,
        mmap=mmap,
        cache_ram=0,
        mtp_file=mtp_file,
        force=force,
        trained=False,
    )
    with loading.engine(path, options, verb="bench", quiet=quiet) as engine:
        llama: LlamaEngine = engine  # type: ignore[assignment]
        llama.set_draft(0)
        _measure(llama, 0, 1, 8)  # the first decode of each shape sets things up
        rows = [_measure(llama, depth, batch, tokens) for depth in depth_list for batch in batch_list]
        drafting = [_draft(llama, n, tokens) for n in range(llama.n_heads + 1)] if llama.n_heads else []
        name, used = llama.info.name, llama.info.engine
    if json:
        output.data(
            {"model": name, "engine": used, "speed": [asdict(r) for r in rows], "mtp": [asdict(r) for r in drafting]}
        )
        return
    output.lines(_table(rows))
    if drafting:
        output.lines(["", *_mtp_table(drafting)])


def _measure(engine: LlamaEngine, depth: int, batch: int, tokens: int) -> Row:
    """Prompts of `depth` tokens are read first, then PROMPT more are timed, then the tokens that follow."""
    n_vocab = engine.info.n_vocab
    starts = [[(7 * i + 31 * n) % (n_vocab - 100) + 50 for i in range(depth)] for n in range(batch)]
    if depth:
        _together(engine, starts, 1)
    prompts = [s + [(11 * i + n) % (n_vocab - 100) + 50 for i in range(PROMPT)] for n, s in enumerate(starts)]
    timings = _together(engine, prompts, tokens)
    n_read = sum(t.n_prompt - t.n_cached for t in timings)
    longest = max(t.prompt_seconds for t in timings)
    generating = max(t.generation_seconds for t in timings)
    return Row(depth, batch, n_read / longest, (tokens - 1) * batch / generating, 1.0, [], [])


def _draft(engine: LlamaEngine, n: int, tokens: int) -> Row:
    """The answer to a question with n drafted tokens a step."""
    from stepgguf.chat.exchange import ChatModel
    from stepgguf.chat.request import ChatRequest
    from stepgguf.runtime.engine import Sampling, Stream

    request = ChatRequest([{"role": "user", "content": QUESTION}], Sampling(temperature=0.0), max_tokens=4 * tokens)
    prepared = replace(ChatModel(engine).prepare(request).request, ignore_end=True)
    engine.set_draft(n)
    stream = Stream(engine, prepared)
    started = time.monotonic()
    for _ in stream:
        pass
    assert stream.finished is not None
    t = stream.finished.timings
    seconds = t.generation_seconds or time.monotonic() - started
    return Row(0, 1, 0.0, t.n_generated / seconds, t.n_generated / max(1, t.n_steps), t.drafted, t.accepted)


def _together(engine: LlamaEngine, prompts: Sequence[list[int]], tokens: int) -> list[Timings]:
    from stepgguf.runtime.engine import Request, Sampling, Stream

    greedy = Sampling(temperature=0.0)
    streams = [Stream(engine, Request(tuple(p), greedy, tokens, ignore_end=True)) for p in prompts]
    for stream in streams:
        for _ in stream:
            pass
    finished = [s.finished for s in streams]
    return [f.timings for f in finished if f is not None]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["depth    batch   prompt tok/s   generation tok/s"]
    lines += [f"{r.depth:<8} {r.batch:<7} {r.prompt_tps:<14.1f} {r.generation_tps:.1f}" for r in rows]
    return lines


def _mtp_table(rows: Sequence[Row]) -> list[str]:
    lines = ["drafted  tokens/step  tok/s     gain    accepted by head"]
    for n, r in enumerate(rows):
        heads = " ".join(f"{a / d:.0%}" for a, d in zip(r.accepted, r.drafted, strict=True) if d)
        gain = r.generation_tps / rows[0].generation_tps
        lines.append(f"{n:<8} {r.tokens_per_step:<12.2f} {r.generation_tps:<9.1f} {gain:<7.2f} {heads}".rstrip())
    return lines


def _numbers(text: str, option: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise typer.BadParameter(f"{text!r}: write numbers of at least {least}, for example 1,4", param_hint=option)
    return numbers
