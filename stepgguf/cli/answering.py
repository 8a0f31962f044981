"""One answer in the terminal or in a pipe, while it comes: what chat and demo share."""

from __future__ import annotations

import io
import os
import sys
from contextlib import closing
from dataclasses import asdict

import typer

from stepgguf.cli import output
from stepgguf.cli.terminal.commands.target import Answering
from stepgguf.cli.terminal.keys import TOGGLE, AnswerKeys, ending_on_signals
from stepgguf.cli.terminal.live import LiveRows
from stepgguf.cli.terminal.markdown import MarkdownRenderer
from stepgguf.cli.terminal.pipe import PipeView
from stepgguf.cli.terminal.screen import Screen
from stepgguf.cli.terminal.view import AnswerView, ReasoningDisplay
from stepgguf.conversation.session import Session

TICK = 0.05  # seconds: how often the screen is drawn and the keyboard read when nothing comes
INTERRUPTED = 130  # exit code


def open_view(
    *, reasoning_display: ReasoningDisplay | None, plain: bool = False, silent: bool = False
) -> Screen | PipeView:
    """Return what shows answers. reasoning_display None: folded on a screen, else hidden. silent: not the answer."""
    color = not os.environ.get("NO_COLOR")
    out = io.StringIO() if silent else sys.stdout
    if out.isatty() and not _is_dumb():
        renderer = None if plain else MarkdownRenderer(out, color=color)
        return Screen(LiveRows(out, color=color), reasoning_display or "fold", renderer=renderer)
    if sys.stderr.isatty() and not _is_dumb():
        return Screen(LiveRows(sys.stderr, color=color), reasoning_display or "fold", renderer=None, pipe=out)
    return PipeView(out, sys.stderr, reasoning_display=reasoning_display or "hide")


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"


def stream_answer(session: Session, answering: Answering, view: AnswerView) -> AnswerKeys:
    """Show one answer while it comes, and return what was typed meanwhile.

    Ctrl+C stops it and a second one leaves; Enter ends the reasoning.
    """
    stopped = False
    with AnswerKeys() as keys, closing(answering(TICK)) as updates:
        view.start(keys=keys.has_keyboard, raw=bool(session.settings.json))
        try:
            for update in updates:
                view.take(update, session.usage)
                for key in keys.read_pressed():
                    if key == TOGGLE:
                        view.toggle_reasoning()
                    elif view.is_reasoning and not session.end_reasoning():
                        view.remark("this server cannot be told to answer now; Ctrl+C stops it")
                if keys.leave:
                    break
                if keys.interrupts and not stopped:
                    stopped = True
                    session.stop_answer()
        finally:
            view.finish(session.usage)
    return keys


def answer_once(session: Session, question: str, view: AnswerView, *, quiet: bool, as_json: bool = False) -> None:
    """Answer one question. Ctrl+C keeps what came and exits with 130. as_json: one object on stdout at the end."""
    try:
        with ending_on_signals():
            keys = stream_answer(session, lambda tick: session.ask(question, tick), view)
    finally:
        session.close()
    if as_json:
        message = session.entries[-1].message if session.entries else {}
        output.print_json(
            {
                "content": message.get("content"),
                "reasoning": message.get("reasoning_content"),
                "usage": asdict(session.usage),
            }
        )
    elif not quiet:
        view.show_footer(session.usage, session.settings.max_tokens)
    if keys.interrupts:
        raise typer.Exit(INTERRUPTED)
