"""Commands on what was said: files into it, parts of it back, and the whole of it somewhere else."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stepgguf.cli.output import counted
from stepgguf.cli.terminal.commands.target import CommandTarget
from stepgguf.cli.terminal.complete import read_file
from stepgguf.conversation.export import export_json, export_markdown
from stepgguf.conversation.transcript import list_sessions, read_session, session_path
from stepgguf.errors import OutputError, RequestError

_MOST_LISTED = 20  # sessions


def attach_file(target: CommandTarget, argument: str) -> None:
    """/file: put a file into the next question."""
    if not argument:
        raise RequestError("/file needs a path", hint="/file notes.txt")
    target.attach_file(read_file(argument))


def answer_again(target: CommandTarget, argument: str) -> None:
    """/regen: answer the last question anew."""
    target.show_answer(target.session.regenerate)


def edit_question(target: CommandTarget, argument: str) -> None:
    """/edit: take the last question back into the prompt."""
    target.next_line = target.session.undo() or ""


def undo_question(target: CommandTarget, argument: str) -> None:
    """/undo: take the last question and its answer back."""
    question = target.session.undo()
    target.screen.note("there is nothing to take back" if question is None else f"taken back: {_shorten(question)}")


def save_session(target: CommandTarget, argument: str) -> None:
    """/save: give the session a name, or say where it is."""
    transcript = target.session.transcript
    if transcript is None:
        raise OutputError("this chat is not saved", hint="Start without --no-save, or use /export.")
    if argument:
        transcript.rename(argument)
    target.screen.note(str(transcript.path) if transcript.path else "it is saved from the first message on")


def load_session(target: CommandTarget, argument: str) -> None:
    """/load: go on with a saved session, by name or by its number in the list."""
    if not argument:
        raise RequestError("/load needs a name or a number", hint="/list shows them.")
    paths = list_sessions(target.folder)
    if argument.isdecimal() and 0 < int(argument) <= len(paths):
        target.load_session(paths[int(argument) - 1])
    else:
        target.load_session(session_path(target.folder, argument))


def show_sessions(target: CommandTarget, argument: str) -> None:
    """/list: the saved sessions, newest first; one that cannot be read says why."""
    lines = []
    for i, path in enumerate(list_sessions(target.folder)[:_MOST_LISTED], 1):
        try:
            saved = read_session(path)
        except OutputError as error:
            lines.append(f"{i:>2}  {path.stem}  ({error.message})")
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        lines.append(f"{i:>2}  {when}  {path.stem}  {counted(len(saved.entries), 'message')}  {_shorten(saved.title)}")
    target.screen.note("\n".join(lines) or "no sessions yet")


def start_new_session(target: CommandTarget, argument: str) -> None:
    """/new: start over with these settings."""
    target.start_new_session()
    target.screen.note("a new chat")


def export_session(target: CommandTarget, argument: str) -> None:
    """/export: write the conversation to a new file, as Markdown or JSON."""
    form, _, name = argument.partition(" ")
    writers = {"md": export_markdown, "json": export_json}
    if form not in writers or not name:
        raise RequestError(f"/export {argument}: not known", hint="/export md chat.md, or /export json chat.json")
    session, path = target.session, Path(os.path.expanduser(name))
    text = writers[form](session.backend.origin, session.settings_record(), session.entries)
    try:
        with path.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", hint="Give the name of a new file.") from error
    target.screen.note(f"wrote {path}")


def copy_answer(target: CommandTarget, argument: str) -> None:
    """/copy: the last answer to the clipboard."""
    messages = [entry.message for entry in target.session.entries]
    text = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
    target.screen.copy_to_clipboard(text)
    target.screen.note(f"{len(text):,} characters copied, if this terminal allows it")


def leave(target: CommandTarget, argument: str) -> None:
    """/exit."""
    target.leaving = True


def _shorten(text: str, n: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 1] + "…"
