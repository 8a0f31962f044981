"""Streaming answers to the terminal: what chat and demo share."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from stepgguf.chat.session import Session, Usage
from stepgguf.cli import output
from stepgguf.errors import ContextLengthExceeded, StepggufError
from stepgguf.runtime.llama import LlamaEngine

_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def load(path: Path, *, ctx: int | None, gpu_layers: int, threads: int | None, quiet: bool) -> LlamaEngine:
    """The engine, with a status line while a large file loads."""
    if quiet or not output.stderr.is_terminal:
        return LlamaEngine(path, n_ctx=ctx, gpu_layers=gpu_layers, threads=threads)
    with output.stderr.status(f"loading {path.name}") as status:
        return LlamaEngine(
            path, n_ctx=ctx, gpu_layers=gpu_layers, threads=threads,
            progress=lambda share: status.update(f"loading {path.name} {share:.0%}"),
        )  # fmt: skip


def stream(session: Session, question: str, *, show_reasoning: bool) -> None:
    """One answer: text to stdout, thinking to stderr (dim on a terminal) or nowhere."""
    dim = output.stderr.is_terminal and not output.stderr.no_color
    kind = None
    deltas = session.ask(question)
    try:
        for delta in deltas:
            if delta.kind == "reasoning" and not show_reasoning:
                continue
            if delta.kind != kind:
                if kind == "reasoning":
                    sys.stderr.write(f"{_RESET if dim else ''}\n\n")
                elif dim and delta.kind == "reasoning":
                    sys.stderr.write(_DIM)
                sys.stderr.flush()
                kind = delta.kind
            target = sys.stdout if delta.kind == "text" else sys.stderr
            target.write(delta.text)
            target.flush()
    finally:
        deltas.close()
        if kind == "reasoning":
            sys.stderr.write(f"{_RESET if dim else ''}\n")
        elif kind == "text":
            sys.stdout.write("\n")
        sys.stderr.flush()
        sys.stdout.flush()


def footer(usage: Usage, n_ctx: int) -> str:
    """Counts of an answer in one line."""
    cached = f", {usage.n_cached} cached" if usage.n_cached else ""
    prefill = (usage.n_prompt - usage.n_cached) / usage.prompt_seconds if usage.prompt_seconds else 0.0
    text = (
        f"{usage.n_reasoning} thinking + {usage.n_text} answer tokens, {usage.tokens_per_second:.1f} tok/s; "
        f"prompt {usage.n_prompt}{cached} at {prefill:.0f} tok/s; "
        f"context {usage.n_context}/{n_ctx} ({usage.n_context / n_ctx:.0%})"
    )
    if usage.budget_reached:
        text += "; thinking stopped by --reasoning-budget"
    if usage.finish_reason == "length":
        text += "; cut off by " + ("the context" if usage.n_context >= n_ctx else "--max-tokens")
    return text


def one_shot(session: Session, question: str, *, show_reasoning: bool, quiet: bool) -> None:
    """Answer once. Ctrl+C exits with 130."""
    try:
        stream(session, question, show_reasoning=show_reasoning)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not quiet:
        _dim(footer(session.usage, session.engine.info.n_ctx))


def converse(session: Session, *, show_reasoning: bool, hint: str) -> None:
    """Questions until /exit or Ctrl+D. Ctrl+C stops the answer and keeps the session."""
    import readline  # noqa: F401  line editing and history for input()

    info = session.engine.info
    output.note(f"{info.name}, context {info.n_ctx}. {hint}.")
    kept = len(session.messages)
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl+D leaves)\n")
            continue
        if question in ("/exit", "/quit"):
            return
        if question == "/new":
            del session.messages[kept:]
            output.note("a new chat")
        elif question.startswith("/"):
            output.note(f"unknown command {question.split()[0]}; {hint}")
        elif question:
            _answer(session, question, show_reasoning)


def _answer(session: Session, question: str, show_reasoning: bool) -> None:
    try:
        stream(session, question, show_reasoning=show_reasoning)
    except KeyboardInterrupt:
        _dim("stopped")
        return
    except ContextLengthExceeded as error:
        output.error(error.message, "Start over with /new, or leave and come back with a larger --ctx.")
        return
    except StepggufError as error:
        output.error(error.message, error.hint)
        return
    _dim(footer(session.usage, session.engine.info.n_ctx))


def _dim(text: str) -> None:
    output.stderr.print(f"\n{text}", style="dim", markup=False, soft_wrap=True)
