"""Questions and answers in the terminal: what chat and demo share."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import typer

from stepgguf.cli import output
from stepgguf.cli.terminal import commands
from stepgguf.cli.terminal.complete import Attachment, mentioned, read_file
from stepgguf.cli.terminal.keys import AGAIN_SECONDS, TOGGLE, Keys, terminating
from stepgguf.cli.terminal.live import Live
from stepgguf.cli.terminal.markdown import Renderer
from stepgguf.cli.terminal.prompt import Prompt
from stepgguf.cli.terminal.view import Pipe, Screen, Thinking
from stepgguf.conversation.session import Session, Update
from stepgguf.conversation.transcript import Transcript, read
from stepgguf.errors import StepggufError

TICK = 0.05  # seconds: how often the screen and the keyboard are looked after when nothing comes
INTERRUPTED = 130
Answering = Callable[[float], Generator[Update | None, None, None]]


def view(*, thinking: Thinking | None, plain: bool = False, silent: bool = False) -> Screen | Pipe:
    """For the answer on stdout. thinking None: folded on a screen, else hidden. silent: no answer is shown."""
    color = not os.environ.get("NO_COLOR")
    out = io.StringIO() if silent else sys.stdout
    if out.isatty() and not _is_dumb():
        renderer = None if plain else Renderer(out, color=color)
        return Screen(Live(out, color=color), thinking or "fold", renderer=renderer)
    if sys.stderr.isatty() and not _is_dumb():
        return Screen(Live(sys.stderr, color=color), thinking or "fold", renderer=None, pipe=out)
    return Pipe(out, sys.stderr, thinking=thinking or "hide")


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"


def stream(session: Session, answering: Answering, screen: Screen | Pipe) -> Keys:
    """Show one answer while it comes. Ctrl+C stops it and a second one leaves; Enter ends the thinking."""
    stopped = False
    with Keys() as keys, closing(answering(TICK)) as updates:
        screen.start(keys=keys.attached, raw=bool(session.settings.json))
        try:
            for update in updates:
                screen.take(update, session.usage)
                for key in keys.read():
                    if key == TOGGLE:
                        screen.toggle()
                    elif screen.is_reasoning and not session.end_reasoning():
                        screen.remark("this server cannot be told to answer now; Ctrl+C stops it")
                if keys.leave:
                    break
                if keys.interrupts and not stopped:
                    stopped = True
                    session.stop()
        finally:
            screen.finish(session.usage)
    return keys


def one_shot(session: Session, question: str, screen: Screen | Pipe, *, quiet: bool, as_json: bool = False) -> None:
    """Answer once. Ctrl+C keeps what came and exits with 130. as_json: one object on stdout at the end."""
    try:
        with terminating():
            keys = stream(session, lambda tick: session.ask(question, tick), screen)
    finally:
        session.close()
    if as_json:
        message = session.entries[-1].message if session.entries else {}
        output.data(
            {
                "content": message.get("content"),
                "reasoning": message.get("reasoning_content"),
                "usage": asdict(session.usage),
            }
        )
    elif not quiet:
        screen.footer(session.usage, session.settings.max_tokens)
    if keys.interrupts:
        raise typer.Exit(INTERRUPTED)


class Dialogue:
    """Questions until /exit or Ctrl+D. folder: of the saved sessions."""

    def __init__(self, session: Session, screen: Screen, folder: Path, *, history: Path | None) -> None:
        self.session, self.screen = session, screen
        screen.hint = " (/t shows it)"
        self.folder: Path = folder
        self.default = ""  # what the next prompt starts with
        self.leaving = False
        self._saving = session.transcript is not None
        self._attached: list[Attachment] = []
        self._interrupted = 0.0  # when an answer was
        self._warned = False  # that another Ctrl+C leaves, since the last line
        self._prompt = Prompt(history, lambda command: commands.words(self, command))

    def run(self) -> None:
        try:
            with terminating(self._prompt.end):
                while not self.leaving:
                    try:
                        self._turn()
                    except KeyboardInterrupt:
                        self._interrupt()
        finally:
            self.session.close()

    def _turn(self) -> None:
        default, self.default = self.default, ""
        try:
            line = self._prompt.ask(default)
        except EOFError:
            self.leaving = True
            return
        self._warned = False
        try:
            if line.startswith("/") and not line.startswith("//"):
                commands.execute(self, line)
            elif line:
                self._send(line.removeprefix("/") if line.startswith("//") else line)
        except StepggufError as error:
            output.error(error.message, error.hint)

    def _interrupt(self) -> None:
        """Ctrl+C on an empty line, or between two lines."""
        self.leaving = self._warned or time.monotonic() - self._interrupted < AGAIN_SECONDS
        self._warned = True
        if not self.leaving:
            self.screen.note("Ctrl+C again, or Ctrl+D, leaves")

    def attach(self, file: Attachment) -> None:
        """Put a file into the next question."""
        n = self.session.backend.count(file.text)
        self.screen.note(f"{file.name}: " + (f"{n:,} tokens" if n is not None else f"{len(file.text):,} characters"))
        self._attached.append(file)

    def _send(self, question: str) -> None:
        for name in mentioned(question):
            self.attach(read_file(name))
        text = "\n\n".join([question, *(file.fenced() for file in self._attached)])
        n = len(self.session.entries)
        try:
            self.answer(lambda tick: self.session.ask(text, tick))
        finally:
            if len(self.session.entries) == n:  # nothing came: it can be sent again
                self.default = question
                self._attached = [file for file in self._attached if file.name not in mentioned(question)]
            else:
                self._attached = []

    def answer(self, answering: Answering) -> None:
        """Show an answer, then those that the results of its tool calls lead to."""
        keys = stream(self.session, answering, self.screen)
        usage = self.session.usage
        if keys.interrupts:
            self.screen.note("[interrupted]")
            self._interrupted, self.leaving = time.monotonic(), keys.leave
        self.screen.footer(usage, self.session.settings.max_tokens)
        self.default = keys.typed
        if usage.finish_reason == "tool_calls" and self._results():
            self.answer(self.session.answer)

    def _results(self) -> bool:
        """Ask for the results of the calls. False: the user would rather not."""
        for call in self.session.open_calls:
            try:
                result = self._prompt.ask_line(f"result of {call['function']['name']}: ")
            except (EOFError, KeyboardInterrupt):
                return False
            self.session.give_result(call["id"], result)
        return True

    def renew(self) -> None:
        """A new session with the same settings."""
        old = self.session
        old.close()
        transcript = Transcript(self.folder, old.backend.origin) if self._saving else None
        self.session = Session(old.backend, old.settings, transcript)
        self._attached = []

    def load(self, path: Path) -> None:
        old = self.session
        if old.transcript is not None and old.transcript.path == path:
            return
        self.session = resume(old, path)
        old.close()
        self.recall()

    def recall(self) -> None:
        """Show how a saved session ended."""
        last = [entry.message for entry in self.session.entries if entry.message["role"] in ("user", "assistant")][-2:]
        self.screen.note(f"{len(self.session.entries)} messages; the last:")
        for message in last:
            if message["role"] == "user":
                self.screen.note(f"> {message['content']}")
            else:
                self.screen.markdown(message["content"])


def resume(session: Session, path: Path) -> Session:
    """The saved session of this path with a session's backend. OutputError: it cannot be had."""
    saved = read(path)
    origin = session.backend.origin
    if saved.n_damaged:
        output.warn([f"{saved.n_damaged} damaged lines of {path} were passed over; the file is as it was"])
    if saved.origin.digest != origin.digest:
        output.warn([f"{saved.name} was made with {saved.origin.model} ({saved.origin.file}), this is {origin.model}"])
    return Session.resume(session.backend, saved, Transcript(path.parent, origin, path))
