r'''The line editor between answers: history, completion, several lines.

Enter sends. A new line comes with Alt+Enter, with `\` before Enter, within """ ... """, and from what is pasted.
Ctrl+X Ctrl+E opens $EDITOR, Ctrl+T is /t, Ctrl+C clears the line (Up brings it back), Ctrl+D leaves.
'''

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stepgguf.cli.terminal.complete import completions

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

_QUOTES = '"""'
TOGGLE = "/t"


def is_open(text: str) -> bool:
    """Whether Enter after this text starts a new line instead of sending it."""
    backslashes = len(text) - len(text.rstrip("\\"))
    return backslashes % 2 == 1 or text.count(_QUOTES) % 2 == 1


def strip_quotes(text: str) -> str:
    """Return the text without the triple quotes around all of it, if there are any."""
    stripped = text.strip()
    if len(stripped) >= 2 * len(_QUOTES) and stripped.startswith(_QUOTES) and stripped.endswith(_QUOTES):
        return stripped[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return stripped


class LineEditor:
    """Reads lines with history and completion. history: a file, None for none. words: see complete.completions."""

    def __init__(self, history: Path | None, words: Callable[[str], Iterable[str]]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import create_output

        class Words(Completer):
            def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
                for word, n in completions(document.text_before_cursor, words):
                    yield Completion(word, start_position=-n)

        class Lines(FileHistory):
            """A file that cannot be read or written is no reason to end a conversation."""

            def load_history_strings(self) -> Iterable[str]:
                with suppress(OSError):
                    return list(super().load_history_strings())
                return []

            def store_string(self, string: str) -> None:
                with suppress(OSError):
                    super().store_string(string)

        self._running: PromptSession[str] | None = None  # what is being edited
        if history is not None:
            with suppress(OSError):
                history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                history.touch(mode=0o600)
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            history=Lines(str(history)) if history is not None else InMemoryHistory(),
            completer=Words(),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read_line(self, default: str = "") -> str:
        """Return a question or a command. EOFError: Ctrl+D; KeyboardInterrupt: Ctrl+C on an empty line."""
        return strip_quotes(self._prompt_with(self._session, "\n> ", default))

    def read_reply(self, message: str) -> str:
        """Return the answer to something else, without history. EOFError, KeyboardInterrupt: there is none."""
        from prompt_toolkit import PromptSession

        return self._prompt_with(PromptSession(output=self._session.output), message)

    def end_program(self, code: int) -> None:
        """Leave the program from a signal handler. A line that is being edited has the terminal put back first."""
        app = self._running.app if self._running is not None else None
        if app is None or app.loop is None or not app.is_running:
            raise SystemExit(code)
        # a signal may come at any point of the editor's loop, so the loop is asked to leave when it comes round
        app.loop.call_soon_threadsafe(lambda: app.exit(exception=SystemExit(code)))

    def _prompt_with(self, session: PromptSession[str], message: str, default: str = "") -> str:
        self._running = session
        try:
            return session.prompt(message, default=default)
        finally:
            self._running = None


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.application import get_app
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import Condition, has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    in_text = has_focus(DEFAULT_BUFFER)  # and not in the line of Ctrl+R
    empty = Condition(lambda: not get_app().current_buffer.text)

    @keys.add("enter", filter=in_text)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif is_open(buffer.document.text_before_cursor):
            if buffer.document.text_before_cursor.endswith("\\"):  # it stood for the line break
                buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=in_text)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-t", filter=in_text & empty)
    def _toggle(event: KeyPressEvent) -> None:
        event.app.exit(result=TOGGLE)

    @keys.add("c-c", filter=in_text)
    def _clear(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            buffer.append_to_history()
            buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
