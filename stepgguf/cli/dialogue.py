"""A conversation in the terminal: questions, answers and commands until somebody leaves."""

from __future__ import annotations

import time
from pathlib import Path

from stepgguf.cli import output
from stepgguf.cli.answering import stream_answer
from stepgguf.cli.terminal.commands.table import completions_after, run_command
from stepgguf.cli.terminal.commands.target import Answering
from stepgguf.cli.terminal.complete import Attachment, mentioned_files, read_file
from stepgguf.cli.terminal.keys import AGAIN_SECONDS, ending_on_signals
from stepgguf.cli.terminal.line_editor import LineEditor
from stepgguf.cli.terminal.screen import Screen
from stepgguf.conversation.session import Session
from stepgguf.conversation.transcript import Transcript, read_session
from stepgguf.errors import StepggufError


class Dialogue:
    """Questions until /exit or Ctrl+D; a CommandTarget. history: a file of what was typed, None for none."""

    def __init__(self, session: Session, screen: Screen, folder: Path, *, history: Path | None) -> None:
        self.session, self.screen = session, screen
        screen.hint = " (/t shows it)"
        self.folder: Path = folder
        self.next_line = ""
        self.leaving = False
        self._saving = session.transcript is not None
        self._attached: list[Attachment] = []
        self._interrupted_at = 0.0  # when an answer was interrupted last
        self._warned = False  # since the last line, that another Ctrl+C leaves
        self._editor = LineEditor(history, lambda command: completions_after(self, command))

    def run(self) -> None:
        """Take lines until somebody leaves, then close the session."""
        try:
            with ending_on_signals(self._editor.end_program):
                while not self.leaving:
                    try:
                        self._take_line()
                    except KeyboardInterrupt:
                        self._interrupt()
        finally:
            self.session.close()

    def _take_line(self) -> None:
        start, self.next_line = self.next_line, ""
        try:
            line = self._editor.read_line(start)
        except EOFError:
            self.leaving = True
            return
        self._warned = False
        try:
            if line.startswith("/") and not line.startswith("//"):
                run_command(self, line)
            elif line:
                self._send(line.removeprefix("/") if line.startswith("//") else line)
        except StepggufError as error:  # ends the line, not the conversation
            output.error(error.message, error.hint)

    def _interrupt(self) -> None:
        """Ctrl+C on an empty line, or between two lines."""
        self.leaving = self._warned or time.monotonic() - self._interrupted_at < AGAIN_SECONDS
        self._warned = True
        if not self.leaving:
            self.screen.note("Ctrl+C again, or Ctrl+D, leaves")

    def attach_file(self, file: Attachment) -> None:
        n = self.session.backend.count_tokens(file.text)
        self.screen.note(f"{file.name}: " + (f"{n:,} tokens" if n is not None else f"{len(file.text):,} characters"))
        self._attached.append(file)

    def _send(self, question: str) -> None:
        for name in mentioned_files(question):
            self.attach_file(read_file(name))
        text = "\n\n".join([question, *(file.fenced() for file in self._attached)])
        n = len(self.session.entries)
        try:
            self.show_answer(lambda tick: self.session.ask(text, tick))
        finally:
            if len(self.session.entries) == n:  # nothing came: it can be sent again
                self.next_line = question
                self._attached = [file for file in self._attached if file.name not in mentioned_files(question)]
            else:
                self._attached = []

    def show_answer(self, answering: Answering) -> None:
        keys = stream_answer(self.session, answering, self.screen)
        usage = self.session.usage
        if keys.interrupts:
            self.screen.note("[interrupted]")
            self._interrupted_at, self.leaving = time.monotonic(), keys.leave
        self.screen.show_footer(usage, self.session.settings.max_tokens)
        self.next_line = keys.typed  # what was typed while the answer came
        if usage.finish_reason == "tool_calls" and self._ask_for_results():
            self.show_answer(self.session.answer)

    def _ask_for_results(self) -> bool:
        """Ask for the results of the calls. False: the user would rather not."""
        for call in self.session.open_calls:
            try:
                result = self._editor.read_reply(f"result of {call['function']['name']}: ")
            except (EOFError, KeyboardInterrupt):
                return False
            self.session.give_result(call["id"], result)
        return True

    def start_new_session(self) -> None:
        old = self.session
        old.close()
        transcript = Transcript(self.folder, old.backend.origin) if self._saving else None
        self.session = Session(old.backend, old.settings, transcript)
        self._attached = []

    def load_session(self, path: Path) -> None:
        old = self.session
        if old.transcript is not None and old.transcript.path == path:
            return
        self.session = resume_session(old, path)
        old.close()
        self.show_last_messages()

    def show_last_messages(self) -> None:
        """Show how a saved session ended."""
        last = [entry.message for entry in self.session.entries if entry.message["role"] in ("user", "assistant")][-2:]
        self.screen.note(f"{output.counted(len(self.session.entries), 'message')}; the last:")
        for message in last:
            if message["role"] == "user":
                self.screen.note(f"> {message['content']}")
            else:
                self.screen.show_markdown(message["content"])


def resume_session(session: Session, path: Path) -> Session:
    """Return the saved session of this path with a session's backend. OutputError: it cannot be had."""
    saved = read_session(path)
    origin = session.backend.origin
    if saved.n_damaged:
        lines = output.counted(saved.n_damaged, "damaged line")
        output.warn([f"{lines} of {path} could not be read; the file is left as it was"])
    if saved.origin.digest != origin.digest:
        output.warn([f"{saved.name} was made with {saved.origin.model} ({saved.origin.file}), this is {origin.model}"])
    return Session.resume(session.backend, saved, Transcript(path.parent, origin, path))
