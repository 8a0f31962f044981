"""From command-line options to a running engine: what chat, serve and bench share."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli import arguments, output
from stepgguf.errors import EngineError

if TYPE_CHECKING:
    from stepgguf.fit.capacity import Model
    from stepgguf.fit.machine import Machine
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
    bool | None,
    typer.Option(
        "--mmap/--no-mmap",
        show_default="mapped; read on a DGX Spark",
        help="Map the file into memory, or read it: ten times faster to load on a DGX Spark.",
    ),
]
MtpFile = Annotated[
    Path | None,
    typer.Option(
        metavar="MTP.gguf",
        help="The file with the MTP blocks, where `--mtp separate` put them. Default: mtp-FILE.gguf beside the model.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Load it though it does not fit the memory or the context.")]
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
    mmap: bool | None = None
    cache_ram: int = 2 * 2**30
    cache_folder: Path | None = None
    engine: str = IN_PROCESS
    rpc: tuple[str, ...] = ()
    api_key: str | None = None  # of a llama-server at a URL
    mtp_file: Path | None = None
    force: bool = False
    trained: bool = True  # refuse a context that is longer than what the model was trained for


@contextmanager
def engine(path: Path, options: EngineOptions, *, verb: str, quiet: bool) -> Iterator[Engine]:
    """The engine, with a bar while a large file loads. Ctrl+C ends the process: llama.cpp cannot be asked to stop.

    verb: the command that asks, for what is suggested when the model does not fit this machine (DoesNotFit).
    """
    name, _, where = options.engine.partition("=")
    if name not in (IN_PROCESS, LLAMA_SERVER) or (where and name == IN_PROCESS):
        raise typer.BadParameter(
            f"{options.engine!r} is not {IN_PROCESS} or {LLAMA_SERVER}[=PATH|=URL]", param_hint="--engine"
        )
    if options.rpc and (name != LLAMA_SERVER or "://" in where):
        raise typer.BadParameter("only a llama-server that is started here uses other machines", param_hint="--rpc")
    if options.mtp_file is not None and "://" in where:
        raise typer.BadParameter("the server at this URL has loaded what it runs", param_hint="--mtp-file")
    if "://" in where:
        opened: Engine = _attached(path, where, options)
    else:
        opened = _loaded(path, name, where, options, verb=verb, quiet=quiet)
    try:
        yield opened
    finally:
        opened.close()


def _attached(path: Path, url: str, options: EngineOptions) -> Engine:
    from stepgguf.runtime.llamaserver import LlamaServerEngine

    return LlamaServerEngine.attach(url, api_key=options.api_key, model=path, queue_limit=options.queue)


def _loaded(path: Path, name: str, where: str, options: EngineOptions, *, verb: str, quiet: bool) -> Engine:
    from stepgguf.fit.capacity import read_model
    from stepgguf.fit.machine import probe

    if name == IN_PROCESS:
        from stepgguf.runtime import llama  # noqa: F401  if it is not installed, that is said first

    here, model = probe(), read_model(path, options.mtp_file, verb=verb)
    if options.cache_folder is not None:
        _make(options.cache_folder)
    if not options.force:
        _require(here, model, options, served=name == LLAMA_SERVER)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _bar(path.name, quiet) as progress:
            start = _in_process if name == IN_PROCESS else functools.partial(_server, where)
            return start(model, here, options, progress)
    finally:
        signal.signal(signal.SIGINT, before)


def _make(folder: Path) -> None:
    """The folder of cached conversations, before a large file is loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise EngineError(
            f"conversations cannot be kept in {folder}: {reason}",
            hint="Give --cache-folder a folder that you may write to.",
        ) from error


def _require(here: Machine, model: Model, options: EngineOptions, *, served: bool) -> None:
    """Ask doctor's questions. served: by a llama-server, which has a context of this length for each request, and
    puts into the memory of other machines (--rpc), or into RAM, what the GPU has no room for."""
    from stepgguf.fit.capacity import context_length, memory, refuse
    from stepgguf.fit.memory import DEFAULT_CTX, Context
    from stepgguf.runtime import llama_build

    n_ctx = options.ctx or min(model.footprint.n_ctx_train, DEFAULT_CTX)
    found = [context_length(model, n_ctx)] if options.trained else []
    if served and not options.rpc:
        context = Context(n_ctx * options.parallel, options.parallel, cache_ram=0, gpu_layers=options.gpu_layers)
        found.append(memory(here, None, model, context))
    elif not served:
        context = Context(n_ctx, options.parallel, cache_ram=options.cache_ram, gpu_layers=options.gpu_layers)
        found.append(memory(here, llama_build.probe(), model, replace(context, mtp=options.draft != 0)))
    refuse(model, (f for f in found if f.level == "fail" or (f.level == "warn" and not served)))


def maps(machine: Machine, mmap: bool | None) -> bool:
    """Whether to map the file. On a DGX Spark, whose CUDA driver takes mapped pages slowly, only if asked to."""
    return machine.kind != "spark" if mmap is None else mmap


def _in_process(model: Model, here: Machine, options: EngineOptions, progress: Callable[[float], None]) -> Engine:
    from stepgguf.runtime.llama import LlamaEngine

    return LlamaEngine(
        model.path,
        n_ctx=options.ctx,
        n_parallel=options.parallel,
        gpu_layers=options.gpu_layers,
        threads=options.threads or here.cores,  # hyper-threads only get in each other's way
        draft=options.draft if model.footprint.has_mtp else 0,
        mtp_file=model.mtp_file,
        mmap=maps(here, options.mmap),
        queue_limit=options.queue,
        cache_ram=options.cache_ram,
        cache_folder=options.cache_folder,
        progress=progress,
    )


def _server(
    where: str, model: Model, here: Machine, options: EngineOptions, progress: Callable[[float], None]
) -> Engine:
    from stepgguf.runtime.llamaserver import LlamaServerEngine, ServerOptions

    server = ServerOptions(
        binary=where or None,
        n_ctx=options.ctx,
        n_parallel=options.parallel,
        gpu_layers=options.gpu_layers,
        threads=options.threads,
        mtp=options.draft != 0 and model.footprint.has_mtp,
        mtp_file=model.mtp_file,
        rpc=options.rpc,
    )
    return LlamaServerEngine.spawn(model.path, server, queue_limit=options.queue, progress=progress)


@contextmanager
def _bar(name: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    hidden = quiet or not output.stderr.is_terminal
    with Progress(*columns, console=output.stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda share: bar.update(task, completed=share)
