"""All commands in one table, which /help, Tab and the hint for a misspelled one read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stepgguf.cli.terminal.commands import answering, conversation, counts
from stepgguf.cli.terminal.commands.target import CommandTarget
from stepgguf.conversation.records import SETTING_BOUNDS
from stepgguf.conversation.transcript import list_sessions
from stepgguf.errors import RequestError

_OTHER_NAMES = {  # what other programs call them
    "/?": "/help", "/bye": "/exit", "/quit": "/exit", "/q": "/exit", "/clear": "/new", "/reset": "/new",
    "/retry": "/regen", "/regenerate": "/regen", "/sessions": "/list", "/resume": "/load", "/read": "/file",
}  # fmt: skip
_KEYS_HELP = (
    'Enter sends; a new line: Alt+Enter, or \\ before Enter, or within three quotes ("""). @path inlines a file.',
    "Ctrl+X Ctrl+E opens $EDITOR, Ctrl+R searches, Ctrl+D leaves. A second slash sends a line that starts with one.",
    "While it answers: Ctrl+C stops it and keeps what came; while it thinks: Enter has it answer now, Ctrl+T folds.",
)


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """usage starts with the command's name. completions: words that may follow it; see complete.completions."""

    usage: str
    help: str
    run: Callable[[CommandTarget, str], None]
    completions: Callable[[CommandTarget], Iterable[str]] = lambda _: ()

    @property
    def name(self) -> str:
        """What is typed, slash included."""
        return self.usage.partition(" ")[0]


def run_command(target: CommandTarget, line: str) -> None:
    """Run a line that starts with a slash. Errors say what was wrong with it."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.7)), None)
        raise RequestError(
            f"unknown command {name}",
            hint=(f"Did you mean {near}? " if near else "") + "/help lists all; // at the start sends a slash.",
        )
    command.run(target, argument.strip())


def completions_after(target: CommandTarget, name: str) -> Iterable[str]:
    """Return what Tab offers after the command of this name; the commands themselves for ""."""
    if not name:
        return COMMANDS
    return COMMANDS[name].completions(target) if name in COMMANDS else ()


def _show_help(target: CommandTarget, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    target.screen.note("\n".join([*lines, "", *_KEYS_HELP]))


def _session_names(target: CommandTarget) -> Iterable[str]:
    return (path.stem for path in list_sessions(target.folder))


COMMANDS = {
    command.name: command
    for command in (
        ChatCommand("/help", "this", _show_help),
        ChatCommand(
            answering.THINK_USAGE,
            "how long it may think, and how that is shown",
            answering.limit_or_show_reasoning,
            lambda _: (*answering.LEVELS, "show", "fold", "hide"),
        ),
        ChatCommand("/t", "fold or unfold the thinking; shows the last", answering.toggle_reasoning),
        ChatCommand(
            "/set [KEY VALUE|default]", "sampling and max_tokens", answering.change_setting, lambda _: SETTING_BOUNDS
        ),
        ChatCommand("/system [TEXT|off]", "the system message", answering.change_system_message),
        ChatCommand("/file PATH", "put a file into the next question", conversation.attach_file, lambda _: ["@"]),
        ChatCommand("/regen", "answer the last question anew", conversation.answer_again),
        ChatCommand("/edit", "take the last question back and change it", conversation.edit_question),
        ChatCommand("/undo", "take the last question and its answer back", conversation.undo_question),
        ChatCommand("/save [NAME]", "name this session; it is saved all the time", conversation.save_session),
        ChatCommand("/load NAME|NUMBER", "go on with a saved session", conversation.load_session, _session_names),
        ChatCommand("/list", "saved sessions", conversation.show_sessions),
        ChatCommand("/new", "start over, with these settings", conversation.start_new_session),
        ChatCommand("/stats", "tokens and speeds of this session", counts.show_statistics),
        ChatCommand("/context", "what fills the context", counts.show_context),
        ChatCommand(
            "/tools [FILE.json|off]",
            "functions it may call; you type their results",
            answering.change_tools,
            lambda _: ["@"],
        ),
        ChatCommand("/json [SCHEMA.json|off]", "answers as JSON", answering.change_format, lambda _: ["off", "@"]),
        ChatCommand(
            "/export md|json PATH",
            "write the conversation to a file",
            conversation.export_session,
            lambda _: ["md", "json"],
        ),
        ChatCommand("/copy", "the last answer to the clipboard", conversation.copy_answer),
        ChatCommand("/exit", "leave; so does Ctrl+D", conversation.leave),
    )
}
