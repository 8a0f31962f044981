"""stepgguf chat: a conversation in the terminal, or one answer in a pipe."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stepgguf.cli import arguments

REASONING = ("show", "hide")
_HELP = "/new starts over, /exit or Ctrl+D leaves, Ctrl+C stops an answer"


def chat(
    path: arguments.Gguf,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this, print the answer, leave. Piped input is added to it."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, reasoning included.")] = None,
    ctx: Annotated[
        int | None, typer.Option(min=64, help="Context in tokens. Default: the model's, at most 32768.")
    ] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU; -1 is all.")] = -1,
    threads: arguments.Threads = None,
    reasoning: Annotated[str, typer.Option(metavar="show|hide", help="What becomes of the model's thinking.")] = "show",
    reasoning_budget: Annotated[
        int | None, typer.Option(min=0, help="At most so many tokens of thinking; 0 is none.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Default: the file's. 0 always takes the best token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    quiet: arguments.Quiet = False,
) -> None:
    """Chat with a GGUF. Thinking is shown dim, the answer normal.

    With -p or piped input the answer alone goes to stdout, thinking to stderr.

    Examples:

    - `stepgguf chat step-q4_k_s.gguf`
    - `stepgguf chat step-q4_k_s.gguf -p "What is 347 + 286?" --reasoning hide`
    - `git diff | stepgguf chat step-q4_k_s.gguf -p "Review this change" --reasoning-budget 2000`
    """
    from stepgguf.chat.session import Session
    from stepgguf.cli.dialogue import converse, load, one_shot
    from stepgguf.runtime.engine import Sampling

    if reasoning not in REASONING:
        raise typer.BadParameter(f"{reasoning!r} is not one of {', '.join(REASONING)}", param_hint="--reasoning")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    piped = sys.stdin.read().strip() if sys.stdin is not None and not interactive else None
    question = "\n\n".join(part for part in (prompt, piped) if part)
    if not question and (prompt is not None or not interactive):
        raise typer.BadParameter("there is nothing to answer", param_hint="--prompt")
    with load(path, ctx=ctx, gpu_layers=gpu_layers, threads=threads, quiet=quiet) as engine:
        default = engine.info.sampling
        sampling = Sampling(
            default.temperature if temperature is None else temperature,
            default.top_k if top_k is None else top_k,
            default.top_p if top_p is None else top_p,
            default.min_p if min_p is None else min_p,
            seed,
        )
        session = Session(
            engine,
            sampling,
            max_tokens=max_tokens,
            reasoning_budget=reasoning_budget,
            messages=[{"role": "system", "content": system}] if system else [],
        )
        if question:
            one_shot(session, question, show_reasoning=reasoning == "show", quiet=quiet)
        else:
            converse(session, show_reasoning=reasoning == "show", hint=_HELP)
