"""From command-line options to a running engine: what chat, serve and bench share, and eval in part."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from stepgguf.cli import output
from stepgguf.cli.engine_options import IN_PROCESS, LLAMA_SERVER, EngineOptions
from stepgguf.cli.memory_options import LONGEST
from stepgguf.errors import EngineError
from stepgguf.runtime.engine import Engine
from stepgguf.runtime.placement import DEFAULT_UBATCH, Placement

if TYPE_CHECKING:
    from stepgguf.fit.machine import Machine
    from stepgguf.fit.memory import ContextParams
    from stepgguf.fit.model_file import ModelFile
    from stepgguf.runtime.llama.model import LlamaModel


@contextmanager
def open_engine(path: Path, options: EngineOptions, *, command: str, quiet: bool) -> Iterator[Engine]:
    """Open the engine, with a bar while a large file loads. Ctrl+C ends the process: llama.cpp cannot be asked to stop.

    command: the subcommand that asks, for what is suggested when the model does not fit this machine (DoesNotFit).
    """
    _check_options(options)
    opened = _attach(path, options) if options.server_url else _load(path, options, command=command, quiet=quiet)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def open_layers(
    path: Path, n_ctx: int, *, gpu_layers: int | None, force: bool, command: str, quiet: bool
) -> Iterator[LlamaModel]:
    """Open a file without its MTP blocks, to be asked for logits in one context of n_ctx tokens. See open_engine."""
    from stepgguf.fit.machine import probe_machine, use_mmap
    from stepgguf.fit.model_file import read_model_file
    from stepgguf.runtime.llama.model import LlamaModel

    options = EngineOptions(ctx=n_ctx, placement=Placement(gpu_layers=gpu_layers), draft=0, cache_ram=0, force=force)
    machine, file = probe_machine(), read_model_file(path, command=command)
    context = _plan_load(machine, file, options, quiet=quiet)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _progress_bar(path.name, quiet) as progress:
            mmap = use_mmap(machine, options.mmap)
            model = LlamaModel(file.path, context.placement, mtp=False, mmap=mmap, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield model
    finally:
        model.close()


def _check_options(options: EngineOptions) -> None:
    """typer.BadParameter for an engine that there is not, and for options that it does not take."""
    name = options.engine_name
    if name not in (IN_PROCESS, LLAMA_SERVER) or (name == IN_PROCESS and options.engine != IN_PROCESS):
        raise typer.BadParameter(
            f"{options.engine!r} is not an engine; give {IN_PROCESS} or {LLAMA_SERVER}[=PATH|=URL]",
            param_hint="--engine",
        )
    if options.rpc and (name != LLAMA_SERVER or options.server_url):
        raise typer.BadParameter("only a llama-server that is started here uses other machines", param_hint="--rpc")
    if options.mtp_file is not None and options.server_url:
        raise typer.BadParameter("the server at this URL has loaded what it runs", param_hint="--mtp-file")
    if options.has_memory_options and options.server_url:
        raise typer.BadParameter(
            "the server at this URL has loaded its model: where it goes is set where that server is started",
            param_hint="--engine",
        )
    if options.batch is not None and name == IN_PROCESS:
        raise typer.BadParameter(
            "this engine decodes what it takes from requests at once: give --ubatch alone", param_hint="--batch"
        )


def _attach(path: Path, options: EngineOptions) -> Engine:
    from stepgguf.runtime.llamaserver import LlamaServerEngine

    return LlamaServerEngine.attach(options.server_url, api_key=options.api_key, model=path, queue_limit=options.queue)


def _load(path: Path, options: EngineOptions, *, command: str, quiet: bool) -> Engine:
    """Load the file here. Everything that can be refused is refused before its tensors are read."""
    from stepgguf.fit.machine import probe_machine
    from stepgguf.fit.model_file import read_model_file

    in_process = options.engine_name == IN_PROCESS
    if in_process:
        from stepgguf.runtime import llama  # noqa: F401  if it is not installed, that is said first

    machine, model = probe_machine(), read_model_file(path, options.mtp_file, command=command)
    if options.cache_folder is not None:
        _make_cache_folder(options.cache_folder)
    context = _plan_load(machine, model, options, quiet=quiet)
    if in_process and options.placement.gpu_layers != 0 and not quiet:
        _warn_of_idle_gpu(machine)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with _progress_bar(path.name, quiet) as progress:
            if in_process:
                return _load_in_process(model, machine, options, context, progress)
            return _start_server(model, options, progress)
    finally:
        signal.signal(signal.SIGINT, before)


def _make_cache_folder(folder: Path) -> None:
    """Make the folder of kept conversations before a large file is loaded. EngineError if that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise EngineError(
            f"conversations cannot be kept in {folder}: {reason}",
            hint="Give --cache-folder a folder that you may write to.",
        ) from error


def _plan_load(machine: Machine, model: ModelFile, options: EngineOptions, *, quiet: bool) -> ContextParams:
    """Choose what the options leave open, say so in a line, and ask what doctor asks: DoesNotFit says why not.

    A llama-server has a context of this length for each request, chooses by itself, and puts into the memory of other
    machines (--rpc), or into RAM, what the GPU has no room for.
    """
    from stepgguf.fit.capacity import check_context_length, check_memory, refuse_to_load
    from stepgguf.fit.choice import choose
    from stepgguf.runtime.llama_build import probe_build

    served = options.engine_name == LLAMA_SERVER
    context = context_params(model, options)
    words = ""
    if served:
        context = replace(context, n_ctx=context.n_ctx * options.parallel, cache_ram=0, mtp=True)
    else:
        choice = choose(machine, probe_build(), model, context, longest=options.ctx == LONGEST)
        context, words = choice.context, choice.words
        _check_ubatch(model, context)
    if not options.force:
        n_ctx = context.n_ctx // options.parallel if served else context.n_ctx
        found = [check_context_length(model, n_ctx)] if options.trained else []
        if not (served and options.rpc):
            found.append(check_memory(machine, None if served else probe_build(), model, context))
        refuse_to_load(model, (f for f in found if f.level == "fail" or (f.level == "warn" and not served)))
    if words and not quiet:
        output.note(words)
    return context


def context_params(model: ModelFile, options: EngineOptions) -> ContextParams:
    """What the options ask for, in the terms of the arithmetic of memory."""
    from stepgguf.fit.memory import ContextParams

    return ContextParams(
        options.ctx or model.default_ctx,
        options.parallel,
        options.ubatch or DEFAULT_UBATCH,
        cache_ram=options.cache_ram,
        mtp=options.draft != 0,
        attention=options.attention,
        placement=options.placement,
    )


def _check_ubatch(model: ModelFile, context: ContextParams) -> None:
    """typer.BadParameter for batches that cannot hold a token of each request with what is drafted for it."""
    n_drafted = len(model.footprint.mtp_layers) if context.mtp else 0
    needed, there = context.n_parallel * (1 + n_drafted), min(context.n_ubatch, context.n_ctx)
    if there < needed:
        raise typer.BadParameter(
            f"{context.n_parallel} requests decode up to {needed} tokens at a time, a batch holds {there}",
            param_hint="--ubatch",
        )


def _warn_of_idle_gpu(machine: Machine) -> None:
    """Say in a line that this machine has a GPU that will not be used, and what mends it."""
    from stepgguf.fit.examine import engine_findings
    from stepgguf.runtime.llama_build import probe_build

    found = [finding for finding in engine_findings(machine, probe_build()) if finding.level == "fail"]
    output.warn(f"{finding.message}; to mend it: {finding.fix}" for finding in found)


def _load_in_process(
    model: ModelFile,
    machine: Machine,
    options: EngineOptions,
    context: ContextParams,
    progress: Callable[[float], None],
) -> Engine:
    from stepgguf.fit.machine import use_mmap
    from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

    llama = LlamaOptions(
        n_ctx=context.n_ctx,
        ubatch=context.n_ubatch,
        n_parallel=options.parallel,
        placement=context.placement,
        attention=context.attention,
        threads=options.threads or machine.cores,  # hyper-threads only get in each other's way
        draft=options.draft if model.footprint.has_mtp else 0,
        mtp_file=model.mtp_file,
        mmap=use_mmap(machine, options.mmap),
        queue_limit=options.queue,
        cache_ram=options.cache_ram,
        cache_folder=options.cache_folder,
    )
    return LlamaEngine(model.path, llama, progress=progress)


def _start_server(model: ModelFile, options: EngineOptions, progress: Callable[[float], None]) -> Engine:
    from stepgguf.runtime.llamaserver import LlamaServerEngine, ServerOptions

    server = ServerOptions(
        binary=options.server_binary or None,
        n_ctx=options.ctx or None,  # it finds the longest that fits by itself
        n_parallel=options.parallel,
        placement=options.placement,
        attention=options.attention,
        batch=options.batch,
        ubatch=options.ubatch,
        threads=options.threads,
        mtp=options.draft != 0 and model.footprint.has_mtp,
        mtp_file=model.mtp_file,
        rpc=options.rpc,
    )
    return LlamaServerEngine.spawn(model.path, server, queue_limit=options.queue, progress=progress)


@contextmanager
def _progress_bar(name: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, if that is a terminal; it takes the share that is loaded."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    hidden = quiet or not output.stderr.is_terminal
    with Progress(*columns, console=output.stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda share: bar.update(task, completed=share)
