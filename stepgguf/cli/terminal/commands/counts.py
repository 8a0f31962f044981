"""Commands that count: tokens and speeds of all answers, and what fills the context."""

from __future__ import annotations

from stepgguf.cli.output import counted
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.commands.target import CommandTarget
from stepgguf.conversation.records import AnswerUsage

_SUMMED = (
    "n_prompt", "n_cached", "n_reasoning", "n_text", "n_steps", "n_drafted", "n_accepted",
    "prompt_seconds", "reasoning_seconds", "generation_seconds",
)  # fmt: skip
_ROLES = {"system": "system message", "user": "questions", "assistant": "answers", "tool": "tools"}


def show_statistics(target: CommandTarget, argument: str) -> None:
    """/stats: the sums over all answers of this session."""
    usages = [entry.usage for entry in target.session.entries if entry.usage]
    total = AnswerUsage(n_ctx=target.session.backend.n_ctx)
    for usage in usages:
        for name in _SUMMED:
            setattr(total, name, getattr(total, name) + getattr(usage, name))
    parts = [part for part in footer.usage_parts(total) if not part.startswith("ctx")]  # a sum of contexts is none
    seconds = f"{total.reasoning_seconds:.0f}s of thinking, {total.prompt_seconds:.0f}s of reading"
    target.screen.note("\n".join([f"{counted(len(usages), 'answer')}, {seconds}", *parts]))


def show_context(target: CommandTarget, argument: str) -> None:
    """/context: how full it is, and how many tokens each role's messages have, if the backend can count."""
    session = target.session
    lines = [footer.context_part(session.usage)]
    for role, name in _ROLES.items():
        texts = [message["content"] for message in session.messages if message["role"] == role]
        n = session.backend.count_tokens("\n".join(texts)) if texts else None
        if n is not None:
            lines.append(f"{name}: {n:,} tokens")
    target.screen.note("\n".join([*lines, "Thinking leaves the context when the next question comes."]))
