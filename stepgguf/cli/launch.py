"""stepgguf launch: an agent of somebody else's, on the model of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments, memory_options

DEFAULT_URL = "http://127.0.0.1:8080"
# What is not an option of ours is the agent's, wherever it stands.
CONTEXT_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def launch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="AGENT", help="Which: claude, codex, opencode, qwen or pi.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE.gguf", help="Serve this file while the agent runs, unless a server has it already."),
    ] = None,
    url: Annotated[str, typer.Option(metavar="URL", help="The server to use, if it runs.")] = DEFAULT_URL,
    ctx: memory_options.Ctx = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Requests at the same time, for agents that start others.")
    ] = 4,
    gpu_layers: memory_options.GpuLayers = None,
    threads: arguments.Threads = None,
) -> None:
    """Run Claude Code, Codex, opencode, Qwen Code or pi with the model of a server that runs, or of a file.

    The agent runs here, in this folder and this terminal. All that this command does not know, and all after `--`, is
    the agent's. Its exit code is the command's. A server that was started for it is stopped with it; --ctx, --parallel,
    --gpu-layers and --threads are this server's (for all other options start `stepgguf serve` yourself).

    The agent is told the server, the model, and how long the context is. Keys and addresses of clouds that stand in
    your environment are kept from it; the server's own key is read from STEPGGUF_API_KEY.

    Claude Code, Codex, Qwen Code and pi keep settings and sessions of what is launched here apart from your own, in
    agents/ in the folder of data that `stepgguf doctor` shows: `stepgguf launch claude --continue` goes on with the
    last of them. opencode uses your own settings and sessions, with this model alone.

    Examples:

    - `stepgguf launch claude`
    - `stepgguf launch claude --model step-q4_k_s.gguf --ctx 131072`
    - `stepgguf launch codex -- exec "Why does the test fail?"`
    - `stepgguf launch opencode --url http://spark.lan:8080`
    """
    import os

    from stepgguf.agents.catalogue import AGENTS
    from stepgguf.agents.environment import agent_environment
    from stepgguf.cli import output
    from stepgguf.cli.launching import ServerOptions, find_program, opened_server, prepare_folder, run_program, stopping
    from stepgguf.files import folders

    agent = AGENTS.get(name)
    if agent is None:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(AGENTS)}", param_hint="AGENT")
    if model is not None and not model.is_file():
        raise typer.BadParameter(
            f"{model}: there is no such file; what is meant for {name} stands after --", param_hint="--model"
        )
    program = find_program(agent)
    with stopping(), opened_server(url, model, ServerOptions(ctx, parallel, gpu_layers, threads)) as server:
        folder = folders.agents() / name
        settings = agent.configure(server, folder)
        prepare_folder(folder, settings)
        output.note(f"{name} uses {server.model} at {server.url}: {server.n_ctx:,} tokens of context")
        command = [program, *settings.arguments, *context.args]
        code = run_program(command, agent_environment(os.environ, server, settings))
    raise typer.Exit(code)
