"""What a command acts on: as much of a dialogue as commands need. They know nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from stepgguf.cli.terminal.complete import Attachment
from stepgguf.cli.terminal.screen import Screen
from stepgguf.conversation.session import Session, Updates

Answering = Callable[[float], Updates]  # starts an answer; it takes the seconds after which a wait is interrupted


class CommandTarget(Protocol):
    """A dialogue. folder: where its sessions are saved. next_line: what the next prompt starts with."""

    session: Session
    screen: Screen
    folder: Path
    next_line: str
    leaving: bool

    def attach_file(self, file: Attachment) -> None:
        """Put a file into the next question."""

    def show_answer(self, answering: Answering) -> None:
        """Show an answer, then those that the results of its tool calls lead to."""

    def start_new_session(self) -> None:
        """Start over with the same settings."""

    def load_session(self, path: Path) -> None:
        """Go on with a saved session. OutputError: it cannot be had."""
