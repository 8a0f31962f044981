"""From command-line options to a running engine: what chat, serve and bench share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments, output

if TYPE_CHECKING:
    from stepgguf.runtime.engine import Engine

IN_PROCESS = "llama-cpp-python"
LLAMA_SERVER = "llama-server"

Ctx = Annotated[
    int | None,
    typer.Option(min=64, help="Tokens of context, for all requests together. Default: the model's, at most 32768."),
]
GpuLayers = Annotated[int, typer.Option(help="Layers on the GPU; -1 is all.")]
Draft = Annotated[
    int | None,
    typer.Option(
        min=0, help="MTP tokens to draft a step; 0 is off. Default: whatever is fastest, measured as it runs."
    ),
]
Mmap = Annotated[
    bool,
    typer.Option("--mmap/--no-mmap", help="Map the file, or read it: ten times faster to load on a DGX Spark."),
]
CacheRam = Annotated[
    int,
    typer.Option(
        parser=arguments.parse_size,
        metavar="SIZE",
        show_default="2GiB",
        help="Memory for conversations that are not in the context, and for checkpoints.",
    ),
]
CacheFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Keep conversations there too; they outlive a restart.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar=f"{IN_PROCESS}|{LLAMA_SERVER}[=PATH|=URL]",
        help="What runs the model: this process, or llama-server, which is started, or used at its URL.",
    ),
]
Rpc = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="With llama-server: a machine whose rpc-server takes a share of the model."),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the options above were set to."""

    ctx: int | None = None
    parallel: int = 1
    queue: int = 64
    gpu_layers: int = -1
    threads: int | None = None
    draft: int | None = None
    mmap: bool = True
    cache_ram: int = 2 * 2**30
    cache_folder: Path | None = None
    engine: str = IN_PROCESS
    rpc: tuple[str, ...] = ()
    api_key: str | None = None  # of a llama-server at a URL


@contextmanager
def engine(path: Path, options: EngineOptions, *, quiet: bool) -> Iterator[Engine]:
    """The engine, with a bar while a large file loads. Ctrl+C ends the process: llama.cpp cannot be asked to stop."""
    name, _, where = options.engine.partition("=")
    if name not in (IN_PROCESS, LLAMA_SERVER) or (where and name == IN_PROCESS):
        raise typer.BadParameter(
            f"{options.engine!r} is not {IN_PROCESS} or {LLAMA_SERVER}[=PATH|=URL]", param_hint="--engine"
        )
    if options.rpc and (name != LLAMA_SERVER or "://" in where):
        raise typer.BadParameter("only a llama-server that is started here uses other machines", param_hint="--rpc")
    if "://" not in where:
        from stepgguf.convert.splits import split_files

        path = split_files(path)[0]  # llama.cpp wants the first part of a split file
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _bar(path.name, quiet) as progress:
            opened = (
                _in_process(path, options, progress) if name == IN_PROCESS else _server(path, where, options, progress)
            )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield opened
    finally:
        opened.close()


def _in_process(path: Path, options: EngineOptions, progress: Callable[[float], None]) -> Engine:
    from stepgguf.runtime.llama import LlamaEngine
    from stepgguf.runtime.machine import probe

    return LlamaEngine(
        path,
        n_ctx=options.ctx,
        n_parallel=options.parallel,
        gpu_layers=options.gpu_layers,
        threads=options.threads or probe().cores,  # hyper-threads only get in each other's way
        draft=options.draft,
        mmap=options.mmap,
        queue_limit=options.queue,
        cache_ram=options.cache_ram,
        cache_folder=options.cache_folder,
        progress=progress,
    )


def _server(path: Path, where: str, options: EngineOptions, progress: Callable[[float], None]) -> Engine:
    from stepgguf.runtime.llamaserver import LlamaServerEngine

    if "://" in where:
        return LlamaServerEngine.attach(where, api_key=options.api_key, model=path, queue_limit=options.queue)
    return LlamaServerEngine.spawn(
        path,
        binary=where or None,
        n_ctx=options.ctx,
        n_parallel=options.parallel,
        gpu_layers=options.gpu_layers,
        threads=options.threads,
        mtp=options.draft != 0,
        rpc=options.rpc,
        queue_limit=options.queue,
        progress=progress,
    )


@contextmanager
def _bar(name: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    hidden = quiet or not output.stderr.is_terminal
    with Progress(*columns, console=output.stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda share: bar.update(task, completed=share)
