"""Whatever becomes of the lines of a saved session, reading it ends in a session or in one sentence."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.terminal import footer
from stepgguf.conversation.export import export_json, export_markdown
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage
from stepgguf.conversation.session import Session
from stepgguf.conversation.transcript import Transcript, read_session
from stepgguf.errors import OutputError

pytestmark = pytest.mark.slow

FUNCTION = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
USAGE = asdict(AnswerUsage(n_prompt=10, n_reasoning=3, n_text=4, n_ctx=512, prompt_seconds=0.1, finish_reason="stop"))
RECORDS: list[dict[str, Any]] = [
    {
        "type": "session",
        "version": 1,
        "created": "2026",
        "origin": asdict(AnswerOrigin("a model", "a.gguf", 10, "abc")),
    },
    {
        "type": "settings",
        "sampling": {"temperature": 0.5, "top_k": 40, "seed": 7},
        "system": "Be short.",
        "max_tokens": 100,
        "reasoning_budget": 50,
        "tools": [{"type": "function", "function": FUNCTION}],
        "json": False,
    },
    {"type": "message", "message": {"role": "user", "content": "Hello"}},
    {
        "type": "message",
        "message": {"role": "assistant", "content": "Hi", "reasoning_content": "Hm.", "tool_calls": [CALL]},
        "usage": USAGE,
    },
    {"type": "message", "message": {"role": "tool", "tool_call_id": "call_1", "content": "noon"}},
    {"type": "cut", "n": 2},
    {"type": "part", "reasoning": "Let me", "text": ""},
]
SCRAPS: list[Any] = [
    None, True, -1, 0, 3.5, 2**70, 10**400, float("nan"), "", "x", "\ud800", [], [[]], {}, {"a": None}, ["x", 1],
]  # fmt: skip


class Silent:
    """A backend that a session can be resumed with."""

    origin, n_ctx, default = AnswerOrigin("a model", "a.gguf"), 512, None


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, member in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(member, (*at, key))


def mutated(rng: random.Random) -> bytes:
    records = copy.deepcopy(RECORDS)
    for _ in range(rng.choice((1, 1, 2, 4))):
        *path, last = rng.choice([p for p in places(records) if p])
        parent: Any = records
        for key in path:
            parent = parent[key]
        what = rng.randrange(4)
        if what == 0:
            del parent[last]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(["n", "role", "type", "extra"])] = parent.pop(last)
        elif what == 2 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), rng.choice(SCRAPS))
        else:
            parent[last] = rng.choice(SCRAPS)
    data = bytearray("\n".join(json.dumps(r) for r in records).encode() + b"\n")
    for _ in range(rng.choice((0, 0, 1, 3))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def use(path: Path) -> None:
    """What chat does with a saved session, without asking anything."""
    saved = read_session(path)
    transcript = Transcript(path.parent, AnswerOrigin("b", "b.gguf"), path)
    session = Session.resume(Silent(), saved, transcript)  # type: ignore[arg-type]
    for call in session.open_calls:
        session.give_result(call["id"], "12:00")
    assert all(isinstance(message["content"], str) for message in session.messages)
    footer.usage_parts(session.usage)
    for entry in session.entries:
        assert entry.usage is None or entry.usage.n_context >= 0
    arguments = (session.backend.origin, session.settings_record(), session.entries)
    export_json(*arguments).encode()
    export_markdown(*arguments).encode()
    assert saved.title.count("\n") == 0
    session.undo()
    session.close()


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_mutated_sessions_are_read_or_refused_and_never_changed(tmp_path: Path) -> None:
    rng, path = random.Random(5), tmp_path / "s.jsonl"
    refused = []
    for _ in range(4000):
        data = mutated(rng)
        path.write_bytes(data)
        try:
            use(path)
        except OutputError as error:
            refused.append(error.message)
        assert path.read_bytes().startswith(data), "what was there is kept"
    assert 0 < len(refused) < 2000
    assert all("s.jsonl: line 1" in message or message.startswith("s has version") for message in refused)


def test_a_damaged_line_is_counted_and_the_others_hold(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path, [*RECORDS[:3], {"type": "message", "message": {"role": "assistant"}}, {"type": "cut"}, RECORDS[3]])
    saved = read_session(path)
    assert saved.n_damaged == 2
    assert [entry.message["role"] for entry in saved.entries] == ["user", "assistant"]
    assert (saved.settings.system, saved.settings.sampling["seed"]) == ("Be short.", 7)
    assert saved.origin == AnswerOrigin("a model", "a.gguf", 10, "abc")


def test_what_a_newer_version_adds_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    settings = {**RECORDS[1], "sampling": {"temperature": 0.5, "new": 1}, "voice": "alto"}
    usage = {**USAGE, "n_pictures": 3}
    write(path, [RECORDS[0], settings, {"type": "weather"}, RECORDS[2], {**RECORDS[3], "usage": usage}])
    saved = read_session(path)
    assert (saved.n_damaged, len(saved.entries)) == (0, 2)
    assert saved.settings.sampling == {"temperature": 0.5}
    assert saved.entries[1].usage == AnswerUsage(**USAGE)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("temperature", -1), ("top_k", 2.5), ("top_p", 1.5), ("seed", 2**80)]
)
def test_a_sampling_that_cannot_be_is_not_taken_over(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "s.jsonl"
    write(path, [*RECORDS[:2], {**RECORDS[1], "sampling": {key: value}}])
    saved = read_session(path)
    assert saved.n_damaged == 1
    assert saved.settings.sampling == RECORDS[1]["sampling"]
