"""/commands: one function each, in one table that /help, Tab and the hint for a misspelled one read."""

from __future__ import annotations

import base64
import difflib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgguf.chat.request import EFFORTS
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.complete import read_file
from stepgguf.cli.terminal.view import THINKING
from stepgguf.conversation import records, transcript
from stepgguf.conversation.records import BOUNDS, Usage
from stepgguf.errors import OutputError, RequestError
from stepgguf.files.jsonread import Value

if TYPE_CHECKING:
    from stepgguf.cli.dialogue import Dialogue

LEVELS = {"off": 0, **{name: EFFORTS[name] for name in ("low", "medium", "high")}}  # tokens of thinking
_LISTED = 20  # sessions
_UNSET = {"seed": "random", "max_tokens": "no limit"}
_ELSEWHERE = {  # what other programs call them
    "/?": "/help", "/bye": "/exit", "/quit": "/exit", "/q": "/exit", "/clear": "/new", "/reset": "/new",
    "/retry": "/regen", "/regenerate": "/regen", "/sessions": "/list", "/resume": "/load", "/read": "/file",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    usage: str
    help: str
    run: Callable[[Dialogue, str], None]
    words: Callable[[Dialogue], Iterable[str]] = lambda _: ()  # what may follow; see complete.candidates


def execute(dialogue: Dialogue, line: str) -> None:
    """Run a line that starts with a slash. Errors say what was wrong with it."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.7)), None)
        raise RequestError(
            f"unknown command {name}",
            hint=(f"Did you mean {near}? " if near else "") + "/help lists all; // at the start sends a slash.",
        )
    command.run(dialogue, argument.strip())


def words(dialogue: Dialogue, command: str) -> Iterable[str]:
    """What Tab offers after a command; the commands themselves for ""."""
    if not command:
        return COMMANDS
    return COMMANDS[command].words(dialogue) if command in COMMANDS else ()


# answers ------------------------------------------------------------------------------------------------------------


def _think(dialogue: Dialogue, argument: str) -> None:
    shown = {"show": "full", "none": "off"}.get(argument, argument)
    session = dialogue.session
    if shown in THINKING:
        dialogue.screen.thinking = shown
    elif shown in LEVELS:
        session.set(replace(session.settings, reasoning_budget=LEVELS[shown]))
    elif argument.isdecimal():
        session.set(replace(session.settings, reasoning_budget=int(argument)))
    elif argument:
        raise RequestError(f"/think {argument}: not known", hint=f"Say {COMMANDS['/think'].usage}")
    budget = session.settings.reasoning_budget
    limit = "without limit" if budget is None else f"at most {budget:,} tokens" if budget else "off"
    dialogue.screen.note(f"thinking: {limit}, shown {dialogue.screen.thinking}")


def _toggle(dialogue: Dialogue, argument: str) -> None:
    screen = dialogue.screen
    screen.toggle()
    if screen.thinking == "full":
        messages = [entry.message for entry in dialogue.session.entries]
        thoughts = next((m["reasoning_content"] for m in reversed(messages) if m.get("reasoning_content")), "")
        screen.thoughts(thoughts or "(no thinking yet)")
    else:
        screen.note("thinking is folded")


def _set(dialogue: Dialogue, argument: str) -> None:
    session = dialogue.session
    settings = session.settings
    if argument:
        key, _, text = argument.replace("=", " ").partition(" ")
        if key not in BOUNDS:
            raise RequestError(f"/set {key}: not known", hint=f"There are {', '.join(BOUNDS)}.")
        value = _number(key, text.strip())
        if key == "max_tokens":
            settings = replace(settings, max_tokens=value)
        else:
            others = {k: v for k, v in settings.sampling.items() if k != key}
            settings = replace(settings, sampling=others if value is None else {**others, key: value})
        session.set(settings)
    default = session.backend.default
    lines = []
    for key in [key for key in BOUNDS if key != "max_tokens"]:
        standard = getattr(default, key) if default is not None else "the server's"
        standard = _UNSET[key] if standard is None else standard
        own = key in settings.sampling
        lines.append(f"{key} {settings.sampling[key] if own else standard}" + (f" (default {standard})" if own else ""))
    lines.append(f"max_tokens {_UNSET['max_tokens'] if settings.max_tokens is None else settings.max_tokens}")
    dialogue.screen.note("\n".join(lines))
    if settings.sampling.get("temperature") == 0:
        dialogue.screen.remark("temperature 0 makes this model repeat itself in long thinking")


def _number(key: str, text: str) -> Any:
    """None for "default"."""
    if text in ("default", "none", "off"):
        return None
    try:
        raw: Any = json.loads(text)
    except ValueError:
        raw = text
    return records.number(Value(raw, f"/set {key}", RequestError, "Or say default.", key), key)


def _system(dialogue: Dialogue, argument: str) -> None:
    session = dialogue.session
    if argument:
        session.set(replace(session.settings, system=None if argument == "off" else argument))
    dialogue.screen.note(f"system: {session.settings.system or 'none'}")


def _tools(dialogue: Dialogue, argument: str) -> None:
    session = dialogue.session
    if argument:
        tools = () if argument == "off" else tuple(_read_tools(argument))
        session.set(replace(session.settings, tools=tools))
    names = [tool.get("function", tool)["name"] for tool in session.settings.tools]
    dialogue.screen.note(f"tools: {', '.join(names) or 'none'}")


def _read_tools(name: str) -> list[dict[str, Any]]:
    tools = _read_json(name)
    tools = tools if isinstance(tools, list) else [tools]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{name}: not a list of functions",
                hint='Write OpenAI\'s form: [{"type": "function", "function": {"name": ..., "parameters": {...}}}].',
            )
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _json(dialogue: Dialogue, argument: str) -> None:
    session = dialogue.session
    value: Any = argument != "off" and (not argument or _read_json(argument))
    session.set(replace(session.settings, json=value))
    kind = "what the schema allows" if isinstance(value, dict) else "any JSON object" if value else "text"
    dialogue.screen.note(f"answers: {kind}")


def _read_json(name: str) -> Any:
    try:
        return json.loads(read_file(name).text)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}", hint="Correct it.") from error


# the conversation ---------------------------------------------------------------------------------------------------


def _file(dialogue: Dialogue, argument: str) -> None:
    if not argument:
        raise RequestError("/file needs a path", hint="/file notes.txt")
    dialogue.attach(read_file(argument))


def _regenerate(dialogue: Dialogue, argument: str) -> None:
    dialogue.answer(dialogue.session.regenerate)


def _edit(dialogue: Dialogue, argument: str) -> None:
    dialogue.default = dialogue.session.undo() or ""


def _undo(dialogue: Dialogue, argument: str) -> None:
    question = dialogue.session.undo()
    dialogue.screen.note("there is nothing to take back" if question is None else f"taken back: {_short(question)}")


def _save(dialogue: Dialogue, argument: str) -> None:
    saved = dialogue.session.transcript
    if saved is None:
        raise OutputError("this chat is not saved", hint="Start without --no-save, or use /export.")
    if argument:
        saved.rename(argument)
    dialogue.screen.note(str(saved.path) if saved.path else "it is saved from the first message on")


def _load(dialogue: Dialogue, argument: str) -> None:
    if not argument:
        raise RequestError("/load needs a name or a number", hint="/list shows them.")
    paths = transcript.sessions(dialogue.folder)
    if argument.isdecimal() and 0 < int(argument) <= len(paths):
        dialogue.load(paths[int(argument) - 1])
    else:
        dialogue.load(transcript.session_path(dialogue.folder, argument))


def _list(dialogue: Dialogue, argument: str) -> None:
    lines = []
    for i, path in enumerate(transcript.sessions(dialogue.folder)[:_LISTED], 1):
        try:
            saved = transcript.read(path)
        except OutputError as error:
            lines.append(f"{i:>2}  {path.stem}  ({error.message})")
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        lines.append(f"{i:>2}  {when}  {path.stem}  {len(saved.entries)} messages  {_short(saved.title)}")
    dialogue.screen.note("\n".join(lines) or "no sessions yet")


def _new(dialogue: Dialogue, argument: str) -> None:
    dialogue.renew()
    dialogue.screen.note("a new chat")


def _export(dialogue: Dialogue, argument: str) -> None:
    kind, _, name = argument.partition(" ")
    writers = {"md": transcript.as_markdown, "json": transcript.as_json}
    if kind not in writers or not name:
        raise RequestError(f"/export {argument}: not known", hint="/export md chat.md, or /export json chat.json")
    session, path = dialogue.session, Path(os.path.expanduser(name))
    text = writers[kind](session.backend.origin, session.settings_record(), session.entries)
    try:
        with path.open("x", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", hint="Give the name of a new file.") from error
    dialogue.screen.note(f"wrote {path}")


def _copy(dialogue: Dialogue, argument: str) -> None:
    """By OSC 52, which also works over ssh."""
    messages = [entry.message for entry in dialogue.session.entries]
    text = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
    dialogue.screen.live.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")
    dialogue.screen.note(f"{len(text):,} characters copied, if this terminal allows it")


# numbers ------------------------------------------------------------------------------------------------------------


def _stats(dialogue: Dialogue, argument: str) -> None:
    usages = [Usage(**entry.usage) for entry in dialogue.session.entries if entry.usage]
    total = Usage()
    for usage in usages:
        for name in ("n_prompt", "n_cached", "n_reasoning", "n_text", "n_steps", "n_drafted", "n_accepted",
                     "prompt_seconds", "reasoning_seconds", "generation_seconds"):  # fmt: skip
            setattr(total, name, getattr(total, name) + getattr(usage, name))
    total.n_ctx = dialogue.session.backend.n_ctx
    parts = [part for part in footer.counts(total) if not part.startswith("ctx")]
    seconds = f"{total.reasoning_seconds:.0f}s of thinking, {total.prompt_seconds:.0f}s of reading"
    dialogue.screen.note("\n".join([f"{len(usages)} answers, {seconds}", *parts]))


def _context(dialogue: Dialogue, argument: str) -> None:
    session = dialogue.session
    lines = [footer.context(session.usage)]
    for role, name in (
        ("system", "system message"),
        ("user", "questions"),
        ("assistant", "answers"),
        ("tool", "tools"),
    ):
        texts = [message["content"] for message in session.messages if message["role"] == role]
        n = session.backend.count("\n".join(texts)) if texts else None
        if n is not None:
            lines.append(f"{name}: {n:,} tokens")
    dialogue.screen.note("\n".join([*lines, "Thinking leaves the context when the next question comes."]))


def _help(dialogue: Dialogue, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    dialogue.screen.note("\n".join([*lines, "", *_HELP]))


def _exit(dialogue: Dialogue, argument: str) -> None:
    dialogue.leaving = True


def _short(text: str, n: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 1] + "…"


_HELP = (
    'Enter sends; a new line: Alt+Enter, or \\ before Enter, or within three quotes ("""). @path inlines a file.',
    "Ctrl+X Ctrl+E opens $EDITOR, Ctrl+R searches, Ctrl+D leaves. A second slash sends a line that starts with one.",
    "While it answers: Ctrl+C stops it and keeps what came; while it thinks: Enter has it answer now, Ctrl+T folds.",
)

COMMANDS = {
    "/help": Command("/help", "this", _help),
    "/think": Command(
        "/think [off|low|medium|high|N|show|fold|hide]",
        "how long it may think, and how that is shown",
        _think,
        lambda _: (*LEVELS, "show", "fold", "hide"),
    ),
    "/t": Command("/t", "fold or unfold the thinking; shows the last", _toggle),
    "/set": Command("/set [KEY VALUE|default]", "sampling and max_tokens", _set, lambda _: BOUNDS),
    "/system": Command("/system [TEXT|off]", "the system message", _system),
    "/file": Command("/file PATH", "put a file into the next question", _file, lambda _: ["@"]),
    "/regen": Command("/regen", "answer the last question anew", _regenerate),
    "/edit": Command("/edit", "take the last question back and change it", _edit),
    "/undo": Command("/undo", "take the last question and its answer back", _undo),
    "/save": Command("/save [NAME]", "name this session; it is saved all the time", _save),
    "/load": Command(
        "/load NAME|NUMBER",
        "go on with a saved session",
        _load,
        lambda dialogue: (path.stem for path in transcript.sessions(dialogue.folder)),
    ),
    "/list": Command("/list", "saved sessions", _list),
    "/new": Command("/new", "start over, with these settings", _new),
    "/stats": Command("/stats", "tokens and speeds of this session", _stats),
    "/context": Command("/context", "what fills the context", _context),
    "/tools": Command(
        "/tools [FILE.json|off]", "functions it may call; you type their results", _tools, lambda _: ["@"]
    ),
    "/json": Command("/json [SCHEMA.json|off]", "answers as JSON", _json, lambda _: ["off", "@"]),
    "/export": Command("/export md|json PATH", "write the conversation to a file", _export, lambda _: ["md", "json"]),
    "/copy": Command("/copy", "the last answer to the clipboard", _copy),
    "/exit": Command("/exit", "leave; so does Ctrl+D", _exit),
}
