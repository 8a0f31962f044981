"""stepgguf serve: one model behind the APIs of OpenAI and Anthropic."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.chat.template import CLOSING_WORDS
from stepgguf.cli import arguments, engine_options, loading, memory_options
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM

if TYPE_CHECKING:
    from stepgguf.runtime.engine import ModelInfo


def serve(
    path: arguments.Gguf,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="STEPGGUF_API_KEY", metavar="KEY", help="Clients must send it, as Bearer or x-api-key."),
    ] = None,
    no_key: Annotated[
        bool,
        typer.Option("--no-key", help="Serve other machines without a key. Anyone who reaches the port may use it."),
    ] = False,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Another model id that clients may ask for.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another name that this machine goes by, as behind a proxy. host.docker.internal is known.",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let web pages of this origin use it.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse unknown fields and model ids, instead of ignoring and serving them."),
    ] = False,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests that are decoded at the same time.")] = 4,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for their turn; more are refused with 429.")
    ] = 64,
    ctx: memory_options.Ctx = None,
    gpu_layers: memory_options.GpuLayers = None,
    n_cpu_moe: memory_options.CpuMoe = None,
    override_tensor: memory_options.OverrideTensor = None,
    tensor_split: memory_options.TensorSplit = None,
    split_mode: memory_options.SplitMode = "layer",
    main_gpu: memory_options.MainGpu = 0,
    cache_type_k: memory_options.CacheTypeK = "f16",
    cache_type_v: memory_options.CacheTypeV = "f16",
    flash_attn: memory_options.FlashAttn = "auto",
    batch: memory_options.Batch = None,
    ubatch: memory_options.Ubatch = None,
    threads: arguments.Threads = None,
    draft: engine_options.Draft = None,
    mtp_file: engine_options.MtpFile = None,
    mmap: engine_options.Mmap = None,
    cache_ram: engine_options.CacheRam = DEFAULT_CACHE_RAM,
    cache_folder: engine_options.CacheFolder = None,
    engine: engine_options.EngineName = engine_options.IN_PROCESS,
    rpc: engine_options.Rpc = None,
    low: Annotated[int, typer.Option("--effort-low", min=0, help="Tokens of thinking for effort low.")] = 2048,
    medium: Annotated[int, typer.Option("--effort-medium", min=0, help="Tokens of thinking for effort medium.")] = 8192,
    closing_message: Annotated[
        str, typer.Option(metavar="WORDS", help="What the model thinks last when its thinking is cut off.")
    ] = CLOSING_WORDS,
    loop_breaker: Annotated[
        bool, typer.Option("--loop-breaker/--no-loop-breaker", help="End thinking that repeats itself.")
    ] = True,
    task_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that one message of a user may cost, over all requests that an agent makes of it; more "
            "requests are refused. Default: no limit.",
        ),
    ] = None,
    task_reasoning: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens of thinking among them; then the model acts and answers without. Default: no limit.",
        ),
    ] = None,
    task_repeats: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="When an agent's model has made the same call N times in a row, with the same result, it must answer "
            "in words. Default: no limit.",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append the log to this file once the model is loaded, not to the terminal."),
    ] = None,
    force: engine_options.Force = False,
    quiet: arguments.Quiet = False,
) -> None:
    """Serve a GGUF to everything that speaks to OpenAI's, StepFun's, OpenRouter's, NVIDIA's or Anthropic's API.

    Point a client's base URL at it: http://127.0.0.1:8080/v1 for OpenAI's, http://127.0.0.1:8080 for Anthropic's.
    A small chat is at /, the API's description at /docs, Prometheus' figures at /metrics.

    Examples:

    - `stepgguf serve step-q4_k_s.gguf`
    - `STEPGGUF_API_KEY=... stepgguf serve step-q4_k_s.gguf --host 0.0.0.0 --ctx 131072`
    - `stepgguf serve step-q4_k_s.gguf --cache-folder ~/.cache/stepgguf --parallel 2`
    - `stepgguf serve step-q8_0.gguf --engine llama-server --rpc 192.168.7.2:50052`
    """
    from stepgguf.chat.exchange import ChatModel
    from stepgguf.chat.request import EFFORTS
    from stepgguf.server.app import create_app
    from stepgguf.server.config import ServerConfig
    from stepgguf.server.http import listen
    from stepgguf.server.http.addresses import bind_socket

    _check_exposure(host, api_key, no_key)
    for name in allowed_host or ():
        if not re.fullmatch(r"[\w.-]+", name):
            raise typer.BadParameter(f"expected a name such as spark.lan, found {name!r}", param_hint="--allowed-host")
    options = engine_options.EngineOptions(
        ctx=ctx,
        parallel=parallel,
        queue=queue,
        placement=memory_options.read_placement(
            gpu_layers, n_cpu_moe, override_tensor, tensor_split, split_mode, main_gpu
        ),
        attention=memory_options.read_attention(cache_type_k, cache_type_v, flash_attn),
        batch=batch,
        ubatch=ubatch,
        threads=threads,
        draft=draft,
        mmap=mmap,
        cache_ram=cache_ram,
        cache_folder=cache_folder,
        engine=engine,
        rpc=tuple(rpc or ()),
        mtp_file=mtp_file,
        force=force,
    )
    config = ServerConfig(
        model_ids=(path.stem, *(alias or ())),
        host=host,
        allowed_hosts=tuple(allowed_host or ()),
        strict=strict,
        api_key=api_key,
        cors_origins=tuple(cors or ()),
        efforts={**EFFORTS, "low": low, "medium": medium},
        task_tokens=task_tokens,
        task_reasoning=task_reasoning,
        task_repeats=task_repeats,
    )
    with ExitStack() as held:
        log_file = held.enter_context(log.open("ab")) if log is not None else None
        listener = held.enter_context(bind_socket(host, port))
        opened = held.enter_context(loading.open_engine(path, options, command="serve", quiet=quiet))
        app = create_app(ChatModel(opened, closing_message=closing_message, break_loops=loop_breaker), config)
        if not quiet:
            _announce(opened.info, parallel, listener)
        if log_file is not None:
            os.dup2(log_file.fileno(), sys.stderr.fileno())  # also what llama.cpp and a crash would write
        logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(message)s")
        listen.serve(app, listener, opened, host=host)
        if not opened.stats().alive:
            raise typer.Exit(1)


def _check_exposure(host: str, api_key: str | None, no_key: bool) -> None:
    """typer.BadParameter for an empty key, and for serving other machines without one unless that is meant."""
    from stepgguf.server.middleware.access import is_loopback

    if not is_loopback(host) and api_key is None and not no_key:
        raise typer.BadParameter(
            f"{host} can be reached from other machines: set --api-key or STEPGGUF_API_KEY, or say --no-key",
            param_hint="--host",
        )
    if api_key == "":
        raise typer.BadParameter("the key is empty", param_hint="--api-key")


def _announce(model: ModelInfo, parallel: int, listener: socket.socket) -> None:
    """Say what is served and where: one line for each URL."""
    from stepgguf.cli import output
    from stepgguf.server.http.addresses import reachable_urls

    first, *others = reachable_urls(*listener.getsockname()[:2])
    requests = output.counted(parallel, "request")
    output.note(f"{model.name} at {first}: {model.n_ctx:,} tokens of context, up to {requests} at the same time")
    for other in others:
        output.note(f"also at {other}")
