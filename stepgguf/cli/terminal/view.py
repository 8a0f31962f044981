"""What shows an answer while it comes: a Screen or a PipeView."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from stepgguf.conversation.records import AnswerUsage
from stepgguf.conversation.session import Update

ReasoningDisplay = Literal["full", "fold", "hide"]
REASONING_DISPLAYS: tuple[ReasoningDisplay, ...] = get_args(ReasoningDisplay)


class AnswerView(Protocol):
    """Shows one answer after the other: start, take for each update, finish, and the footer if that is wanted."""

    @property
    def is_reasoning(self) -> bool:
        """Whether reasoning comes, and no answer yet."""

    def start(self, *, keys: bool = False, raw: bool = False) -> None:
        """Be ready for a new answer. keys: somebody can press Enter. raw: it is no Markdown."""

    def take(self, update: Update | None, usage: AnswerUsage) -> None:
        """Show what an update brings; None: nothing came for a while."""

    def finish(self, usage: AnswerUsage) -> None:
        """Take the answer for over, or stopped."""

    def toggle_reasoning(self) -> None:
        """Change between folded and full reasoning, where there is a choice."""

    def show_footer(self, usage: AnswerUsage, max_tokens: int | None) -> None:
        """Show the counts of an answer, and what there is to say about how it ended."""

    def remark(self, *texts: str) -> None:
        """Show what the user should know."""
