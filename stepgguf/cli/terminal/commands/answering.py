"""Commands that change how it answers, and how that is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from stepgguf.chat.request import EFFORTS
from stepgguf.cli.terminal.commands.target import CommandTarget
from stepgguf.cli.terminal.complete import read_file
from stepgguf.cli.terminal.view import REASONING_DISPLAYS
from stepgguf.conversation.records import SETTING_BOUNDS, read_number
from stepgguf.errors import RequestError
from stepgguf.files.jsonread import Value

THINK_USAGE = "/think [off|low|medium|high|N|show|fold|hide]"
LEVELS = {"off": 0, **{name: EFFORTS[name] for name in ("low", "medium", "high")}}  # tokens of reasoning
_WITHOUT_VALUE = {"seed": "random", "max_tokens": "no limit"}


def limit_or_show_reasoning(target: CommandTarget, argument: str) -> None:
    """/think: a limit of reasoning, by name or in tokens, or how it is shown."""
    word = {"show": "full", "none": "off"}.get(argument, argument)
    session = target.session
    if word in REASONING_DISPLAYS:
        target.screen.reasoning_display = word
    elif word in LEVELS:
        session.change_settings(replace(session.settings, reasoning_budget=LEVELS[word]))
    elif argument.isdecimal():
        session.change_settings(replace(session.settings, reasoning_budget=int(argument)))
    elif argument:
        raise RequestError(f"/think {argument}: not known", hint=f"Say {THINK_USAGE}")
    budget = session.settings.reasoning_budget
    limit = "without limit" if budget is None else f"at most {budget:,} tokens" if budget else "off"
    target.screen.note(f"thinking: {limit}, shown {target.screen.reasoning_display}")


def toggle_reasoning(target: CommandTarget, argument: str) -> None:
    """/t: fold or unfold the reasoning, and show the last one when unfolded."""
    screen = target.screen
    screen.toggle_reasoning()
    if screen.reasoning_display == "full":
        messages = [entry.message for entry in target.session.entries]
        last = next((m["reasoning_content"] for m in reversed(messages) if m.get("reasoning_content")), "")
        screen.show_reasoning(last or "(no thinking yet)")
    else:
        screen.note("thinking is folded")


def change_setting(target: CommandTarget, argument: str) -> None:
    """/set: a field of the sampling or max_tokens; without an argument only list them."""
    session = target.session
    settings = session.settings
    if argument:
        key, _, text = argument.replace("=", " ").partition(" ")
        if key not in SETTING_BOUNDS:
            raise RequestError(f"/set {key}: not known", hint=f"There are {', '.join(SETTING_BOUNDS)}.")
        value = _parse_number(key, text.strip())
        if key == "max_tokens":
            settings = replace(settings, max_tokens=None if value is None else int(value))
        else:
            others = {k: v for k, v in settings.sampling.items() if k != key}
            settings = replace(settings, sampling=others if value is None else {**others, key: value})
        session.change_settings(settings)
    target.screen.note("\n".join(_setting_lines(target)))
    if settings.sampling.get("temperature") == 0:
        target.screen.remark("temperature 0 makes this model repeat itself in long thinking")


def _setting_lines(target: CommandTarget) -> list[str]:
    """Each setting with its value, and the default where that is another."""
    settings, default = target.session.settings, target.session.backend.default_sampling
    lines = []
    for key in [key for key in SETTING_BOUNDS if key != "max_tokens"]:
        standard = getattr(default, key) if default is not None else "the server's"
        standard = _WITHOUT_VALUE[key] if standard is None else standard
        own = key in settings.sampling
        lines.append(f"{key} {settings.sampling[key] if own else standard}" + (f" (default {standard})" if own else ""))
    limit = _WITHOUT_VALUE["max_tokens"] if settings.max_tokens is None else settings.max_tokens
    return [*lines, f"max_tokens {limit}"]


def _parse_number(key: str, text: str) -> float | int | None:
    """A setting's value; None for "default"."""
    if text in ("default", "none", "off"):
        return None
    try:
        raw: object = json.loads(text)
    except ValueError:
        raw = text
    return read_number(Value(raw, f"/set {key}", RequestError, "Or say default.", key), key)


def change_system_message(target: CommandTarget, argument: str) -> None:
    """/system: another system message, or none."""
    session = target.session
    if argument:
        session.change_settings(replace(session.settings, system=None if argument == "off" else argument))
    target.screen.note(f"system: {session.settings.system or 'none'}")


def change_tools(target: CommandTarget, argument: str) -> None:
    """/tools: the functions that it may call, from a file."""
    session = target.session
    if argument:
        tools = () if argument == "off" else tuple(_read_tools(argument))
        session.change_settings(replace(session.settings, tools=tools))
    names = [tool.get("function", tool)["name"] for tool in session.settings.tools]
    target.screen.note(f"tools: {', '.join(names) or 'none'}")


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


def change_format(target: CommandTarget, argument: str) -> None:
    """/json: answers are JSON, any object or what a schema from a file allows, or text again."""
    session = target.session
    value: Any = argument != "off" and (not argument or _read_json(argument))
    session.change_settings(replace(session.settings, json=value))
    answers = "what the schema allows" if isinstance(value, dict) else "any JSON object" if value else "text"
    target.screen.note(f"answers: {answers}")


def _read_json(name: str) -> Any:
    try:
        return json.loads(read_file(name).text)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}", hint="Correct it.") from error
