"""Saved sessions: a file of JSON lines that is only ever appended to, so that a kill leaves all but the last moment.

    {"type": "session", "version": 1, "created": ..., "origin": {"model": ..., "file": ..., "size": ..., "digest": ...}}
    {"type": "settings", "sampling": {...}, "system": ..., ...}                       from here on
    {"type": "message", "message": {...}, "usage": {...}?, "interrupted": true?}      OpenAI's message, with reasoning
    {"type": "part", "reasoning": ..., "text": ...}     of an answer under way; counts only if its message never came
    {"type": "cut", "n": 2}                  messages from number 2 on were taken back

Reading folds the lines. A line that is damaged is passed over and counted, and the file is never changed but by adding
to it. It appears with its first message and is locked while a session writes to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stepgguf.conversation.records import AnswerOrigin, ChatSettings, ConversationEntry
from stepgguf.errors import OutputError
from stepgguf.files import disk
from stepgguf.files.json_lines import LineWriter, read_lines
from stepgguf.files.jsonread import Value

VERSION = 1
_SUFFIX = ".jsonl"
_NO_SESSION = "It is not a session of stepgguf's, or its start is damaged; it is left as it is."


@dataclass(slots=True)
class SavedSession:
    """A session as it was when its last line was written. n_damaged: lines that could not be read."""

    path: Path
    origin: AnswerOrigin = field(default_factory=lambda: AnswerOrigin("", ""))
    settings: ChatSettings = field(default_factory=ChatSettings)
    entries: list[ConversationEntry] = field(default_factory=list)
    n_damaged: int = 0

    @property
    def name(self) -> str:
        """What the session is called: its file without the ending."""
        return self.path.stem

    @property
    def title(self) -> str:
        """The first line of the first question, "" if there is none."""
        questions = (entry.message["content"] for entry in self.entries if entry.message["role"] == "user")
        return next((line for question in questions for line in question.splitlines() if line.strip()), "")


class Transcript:
    """Writes one session. Without `path` it gets a name in `folder` when the first message comes.

    OutputError: another chat has the session open, or it may not be written.
    """

    def __init__(self, folder: Path, origin: AnswerOrigin, path: Path | None = None) -> None:
        self._folder, self.path = folder, path
        self._lines = _open_held(path) if path is not None else None
        self._unsaved: dict[str, dict[str, object]] = {}  # by type: what the file starts with once there is one
        created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.append({"type": "session", "version": VERSION, "created": created, "origin": asdict(origin)})

    def append(self, record: Mapping[str, object]) -> None:
        """Write a line and have it on the disk. Before the first message the last of each type is kept instead.

        OutputError says why it cannot be written.
        """
        if self._lines is None and record["type"] != "message":
            self._unsaved[str(record["type"])] = dict(record)
            return
        try:
            if self._lines is None:
                self.path, self._lines = self._create_file()
            unsaved, self._unsaved = self._unsaved, {}
            self._lines.append(*unsaved.values(), record)
        except OSError as error:
            raise OutputError(
                f"{self.path or self._folder}: the session cannot be saved: {error.strerror}",
                hint="From here on nothing is saved; /export writes the conversation to another place.",
            ) from error

    def rename(self, name: str) -> Path:
        """Give the session a name to find it by. OutputError: there is one of this name, or nothing was said yet."""
        if self.path is None:
            raise OutputError("there is nothing to save yet", hint="A session is saved from its first message on.")
        path = session_path(self._folder, name)
        try:
            if path.exists():
                raise OutputError(f"there is a session {path.stem}", hint="Take another name.")
            self.path = self.path.rename(path)
        except OSError as error:
            raise OutputError(f"{path.stem}: {error.strerror}", hint="Take another name.") from error
        return path

    def close(self) -> None:
        """Let others write to the session. Nothing can be appended any more."""
        if self._lines is not None:
            self._lines.close()

    def _create_file(self) -> tuple[Path, LineWriter]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stem = time.strftime("%Y%m%d-%H%M%S")
        for i in range(1, 1000):
            path = self._folder / f"{stem}{f'-{i}' if i > 1 else ''}{_SUFFIX}"
            try:  # two chats may start within one second
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                continue
            return path, _open_held(path)
        raise OutputError(f"{self._folder}: no free name for a session")


def _open_held(path: Path) -> LineWriter:
    """Open a session to go on with it. OutputError if another chat has it open, or it may not be written."""
    try:
        return LineWriter(os.fdopen(disk.hold(path), "ab"), sync=True)
    except BlockingIOError:
        raise OutputError(f"{path.stem} is open in another chat", hint="Leave that one first.") from None
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", hint="Start without -c for a new session.") from error


def session_path(folder: Path, name: str) -> Path:
    """Return where a session of this name is, or would be. OutputError: no session can have it."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise OutputError(f"{name!r} cannot be the name of a session", hint="Take a word, without slashes.")
    return folder / f"{name.removesuffix(_SUFFIX)}{_SUFFIX}"


def read_session(path: Path) -> SavedSession:
    """Read what was saved. OutputError: there is no such file, or it is no session."""
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: it is not a file", hint="/list shows the sessions that there are.")
        first, *others = read_lines(path)
    except OSError as error:
        raise OutputError(f"{path.stem}: {error.strerror}", hint="/list shows the sessions that there are.") from error
    fold = _SessionFold(SavedSession(path))
    fold.add_head(first.parse(OutputError, _NO_SESSION))
    for line in others:
        try:
            fold.add_line(line.parse(OutputError))
        except OutputError:
            fold.saved.n_damaged += line.is_whole  # else a kill cut it off: nothing special
    return fold.finish()


class _SessionFold:
    """Builds a session up from its lines, one after the other. OutputError: this line is not one of a session."""

    def __init__(self, saved: SavedSession) -> None:
        self.saved = saved
        self._part = {"reasoning": "", "text": ""}  # of an answer whose message has not come

    def add_head(self, value: Value) -> None:
        """Add the first line, which says what the file is."""
        version = value["version"].integer()
        if version > VERSION:
            raise OutputError(
                f"{self.saved.name} has version {version}, expected {VERSION}", hint="Update stepgguf to go on with it."
            )
        self.add_line(value)

    def add_line(self, value: Value) -> None:
        """Add another line; of a type that is not known it says nothing."""
        record_type, saved, part = value["type"].text(), self.saved, {"reasoning": "", "text": ""}
        if record_type == "session":
            saved.origin = AnswerOrigin.from_record(value["origin"])
        elif record_type == "settings":
            saved.settings = ChatSettings.from_record(value)
        elif record_type == "message":
            saved.entries.append(ConversationEntry.from_record(value))
        elif record_type == "cut":
            del saved.entries[value["n"].integer() :]
        elif record_type == "part":
            part = {name: self._part[name] + value[name].text() for name in part}
        self._part = part

    def finish(self) -> SavedSession:
        """Return the session. Parts whose message never came are an answer that was interrupted."""
        if any(self._part.values()):
            content, reasoning = self._part["text"], self._part["reasoning"]
            message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
            self.saved.entries.append(ConversationEntry(message, interrupted=True))
        return self.saved


def list_sessions(folder: Path) -> list[Path]:
    """Return the saved sessions of a folder, newest first."""
    files = [path for path in folder.glob(f"*{_SUFFIX}") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
