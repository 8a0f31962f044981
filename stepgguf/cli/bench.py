"""stepgguf bench: how fast a file reads and writes on this machine."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments, engine_options, loading, memory_options

if TYPE_CHECKING:
    from stepgguf.runtime.engine import Timings
    from stepgguf.runtime.llama import LlamaEngine

PROMPT_TOKENS = 512  # tokens whose reading is timed
QUESTION = "Add 4807 and 3996 step by step, then explain how a heat pump works."


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One measurement, or the mean and the standard deviation of its repetitions.

    tok/s are of all requests together; drafted and accepted are counts of MTP tokens by head.
    """

    depth: int
    batch: int
    prompt_tps: float
    generation_tps: float
    tokens_per_step: float
    drafted: list[int]
    accepted: list[int]
    prompt_tps_stdev: float = 0.0
    generation_tps_stdev: float = 0.0


def bench(
    path: arguments.Gguf,
    depths: Annotated[str, typer.Option(metavar="N,N", help="Tokens of context before the measurement.")] = "0,4096",
    batches: Annotated[str, typer.Option(metavar="N,N", help="Requests at the same time.")] = "1,4",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=8, metavar="N", help="Tokens to generate in each.")] = 64,
    repetitions: Annotated[
        int,
        typer.Option(
            "--repetitions", "-r", min=1, metavar="N", help="How many times each is measured: mean ± deviation."
        ),
    ] = 3,
    gpu_layers: memory_options.GpuLayers = None,
    n_cpu_moe: memory_options.CpuMoe = None,
    override_tensor: memory_options.OverrideTensor = None,
    tensor_split: memory_options.TensorSplit = None,
    split_mode: memory_options.SplitMode = "layer",
    main_gpu: memory_options.MainGpu = 0,
    cache_type_k: memory_options.CacheTypeK = "f16",
    cache_type_v: memory_options.CacheTypeV = "f16",
    flash_attn: memory_options.FlashAttn = "auto",
    ubatch: memory_options.Ubatch = None,
    threads: arguments.Threads = None,
    mtp_file: engine_options.MtpFile = None,
    mmap: engine_options.Mmap = None,
    force: engine_options.Force = False,
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
    from stepgguf.runtime.llama import LlamaEngine

    depth_list, batch_list = _split_numbers(depths, "--depths", 0), _split_numbers(batches, "--batches", 1)
    most = max(batch_list)
    ctx = most * (max(depth_list) + PROMPT_TOKENS + 2 * tokens + 64)
    options = engine_options.EngineOptions(
        ctx=ctx,
        parallel=most,
        placement=memory_options.read_placement(
            gpu_layers, n_cpu_moe, override_tensor, tensor_split, split_mode, main_gpu
        ),
        attention=memory_options.read_attention(cache_type_k, cache_type_v, flash_attn),
        ubatch=ubatch,
        threads=threads,
        mmap=mmap,
        cache_ram=0,
        mtp_file=mtp_file,
        force=force,
        trained=False,
    )
    with loading.open_engine(path, options, command="bench", quiet=quiet) as engine:
        assert isinstance(engine, LlamaEngine)  # --engine is no option here
        show = _show_nothing if json else _show_row
        speed: list[BenchRow] = []
        drafting: list[BenchRow] = []
        show("depth    batch   prompt tok/s        generation tok/s")
        for row in _speed_rows(engine, depth_list, batch_list, tokens, repetitions):
            speed.append(row)
            show(_speed_line(row))
        if engine.n_mtp and engine.info.chat_template is not None:
            show("\ndrafted  tokens/step  tok/s               gain    accepted by head")
            for n, row in enumerate(_drafting_rows(engine, tokens, repetitions)):
                drafting.append(row)
                show(_draft_line(n, row, drafting[0]))
        name, used = engine.info.name, engine.info.engine
    if json:
        output.print_json(
            {"model": name, "engine": used, "speed": [asdict(r) for r in speed], "mtp": [asdict(r) for r in drafting]}
        )


def _speed_rows(
    engine: LlamaEngine, depths: Sequence[int], batches: Sequence[int], tokens: int, repetitions: int
) -> Iterator[BenchRow]:
    """The speed without drafting, by depth and batch."""
    engine.set_draft(0)
    _measure_speed(engine, 0, 1, 8, 0)  # the first decode of each shape sets things up
    for depth, batch in itertools.product(depths, batches):
        yield _average([_measure_speed(engine, depth, batch, tokens, i) for i in range(repetitions)])


def _drafting_rows(engine: LlamaEngine, tokens: int, repetitions: int) -> Iterator[BenchRow]:
    """The speed with 0 drafted tokens a step, 1, and so on to one for each MTP block."""
    for n in range(engine.n_mtp + 1):
        yield _average([_measure_drafting(engine, n, tokens) for _ in range(repetitions)])


def _show_row(line: str) -> None:
    """Write a row when it is known: the next may take minutes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _show_nothing(line: str) -> None:
    pass


def _average(rows: Sequence[BenchRow]) -> BenchRow:
    """Average the speeds of repetitions; counts are those of the last."""
    prompt, generation = [r.prompt_tps for r in rows], [r.generation_tps for r in rows]
    return replace(
        rows[-1],
        prompt_tps=statistics.fmean(prompt),
        generation_tps=statistics.fmean(generation),
        prompt_tps_stdev=statistics.stdev(prompt) if len(rows) > 1 else 0.0,
        generation_tps_stdev=statistics.stdev(generation) if len(rows) > 1 else 0.0,
    )


def _measure_speed(engine: LlamaEngine, depth: int, batch: int, tokens: int, repetition: int) -> BenchRow:
    """Time `batch` requests at a depth of so many tokens, without drafting.

    Prompts of `depth` tokens are read first and cached; then PROMPT_TOKENS more are timed, which are others in each
    repetition so that no cache knows them, then the tokens that follow.
    """
    n_vocab = engine.info.n_vocab
    starts = [[(7 * i + 31 * n) % (n_vocab - 100) + 50 for i in range(depth)] for n in range(batch)]
    if depth:
        _run_together(engine, starts, 1)
    prompts = [
        s + [(11 * i + n + 101 * repetition) % (n_vocab - 100) + 50 for i in range(PROMPT_TOKENS)]
        for n, s in enumerate(starts)
    ]
    timings = _run_together(engine, prompts, tokens)
    n_read = sum(t.n_prompt - t.n_cached for t in timings)
    longest = max(t.prompt_seconds for t in timings)
    generating = max(t.generation_seconds for t in timings)
    return BenchRow(depth, batch, n_read / longest, (tokens - 1) * batch / generating, 1.0, [], [])


def _measure_drafting(engine: LlamaEngine, n: int, tokens: int) -> BenchRow:
    """Time the greedy answer to QUESTION with n drafted tokens a step; it does not end before its last token."""
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
    return BenchRow(0, 1, 0.0, t.n_generated / seconds, t.n_generated / max(1, t.n_steps), t.drafted, t.accepted)


def _run_together(engine: LlamaEngine, prompts: Sequence[list[int]], tokens: int) -> list[Timings]:
    """Submit all prompts at once, read their answers to the end and return the timings of each."""
    from stepgguf.runtime.engine import Request, Sampling, Stream

    greedy = Sampling(temperature=0.0)
    streams = [Stream(engine, Request(tuple(p), greedy, tokens, ignore_end=True)) for p in prompts]
    for stream in streams:
        for _ in stream:
            pass
    finished = [s.finished for s in streams]
    return [f.timings for f in finished if f is not None]


def _speed_line(row: BenchRow) -> str:
    prompt = _with_deviation(row.prompt_tps, row.prompt_tps_stdev)
    return f"{row.depth:<8} {row.batch:<7} {prompt:<19} {_with_deviation(row.generation_tps, row.generation_tps_stdev)}"


def _draft_line(n: int, row: BenchRow, without: BenchRow) -> str:
    heads = " ".join(f"{a / d:.0%}" for a, d in zip(row.accepted, row.drafted, strict=True) if d)
    speed = _with_deviation(row.generation_tps, row.generation_tps_stdev)
    gain = row.generation_tps / without.generation_tps
    return f"{n:<8} {row.tokens_per_step:<12.2f} {speed:<19} {gain:<7.2f} {heads}".rstrip()


def _with_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.1f} ± {deviation:.1f}"


def _split_numbers(text: str, option: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise typer.BadParameter(f"{text!r}: write numbers of at least {least}, for example 1,4", param_hint=option)
    return numbers
