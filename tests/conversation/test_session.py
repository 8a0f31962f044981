"""Conversations with the embedded model: what is kept, what is taken back, what survives a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stepgguf.chat.exchange import ChatModel
from stepgguf.chat.output import Delta
from stepgguf.conversation import session as session_module
from stepgguf.conversation.export import export_json, export_markdown
from stepgguf.conversation.inprocess import InProcessBackend
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage, ChatSettings
from stepgguf.conversation.session import Session, Update
from stepgguf.conversation.transcript import Transcript, list_sessions, read_session, session_path
from stepgguf.errors import ContextLengthExceeded, OutputError
from stepgguf.runtime.engine import Prefill
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

GREEDY = ChatSettings({"temperature": 0.0})
STRAWBERRY = "How many 'r's are in the word strawberry?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def engine(demo_gguf: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(demo_gguf, LlamaOptions(n_ctx=1024, threads=1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def backend(engine: LlamaEngine, demo_gguf: Path) -> InProcessBackend:
    return InProcessBackend(ChatModel(engine), AnswerOrigin.of_file(engine.info.name, demo_gguf))


@pytest.fixture(scope="module")
def endless(engine: LlamaEngine) -> ChatSettings:
    """The model can neither stop reasoning nor stop."""
    bias = [(engine.token_id(text), -100.0) for text in ("</think>", "<|im_end|>", "<｜end▁of▁sentence｜>")]
    return ChatSettings({"temperature": 1.0, "top_k": 0, "seed": 1, "logit_bias": tuple(bias)})


@pytest.fixture
def saved(backend: InProcessBackend, tmp_path: Path) -> Iterator[Session]:
    with closing(Session(backend, GREEDY, Transcript(tmp_path, backend.origin))) as session:
        yield session


def path_of(session: Session) -> Path:
    assert session.transcript is not None
    assert session.transcript.path is not None
    return session.transcript.path


def deltas(updates: Generator[Update | None, None, None], kind: str = "text") -> str:
    return "".join(update.text for update in updates if isinstance(update, Delta) and update.kind == kind)


def cut_at(updates: Generator[Update | None, None, None], kind: str, n: int = 3) -> None:
    """Read n deltas of a kind, then close."""
    for update in updates:
        n -= isinstance(update, Delta) and update.kind == kind
        if n == 0:
            break
    updates.close()


def test_an_answer_is_prefill_then_deltas_then_usage(backend: InProcessBackend) -> None:
    session = Session(backend, GREEDY)
    updates = list(session.ask("What is 347 + 286?"))
    assert isinstance(updates[0], Prefill)
    kinds = [update.kind for update in updates if isinstance(update, Delta)]
    assert kinds == sorted(kinds)  # reasoning, then text
    usage = updates[-1]
    assert isinstance(usage, AnswerUsage)
    assert (usage.finish_reason, usage.n_ctx) == ("stop", 1024)
    assert usage.n_reasoning > usage.n_text > 0
    assert usage.n_drafted >= usage.n_accepted > 0
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"] == "347 + 286 = 633"
    assert "write 3, carry 1" in session.messages[1]["reasoning_content"]


def test_with_a_tick_the_caller_gets_control_while_nothing_comes(backend: InProcessBackend) -> None:
    assert None in list(Session(backend, GREEDY).ask("Hello", tick=1e-5))
    assert None not in list(Session(backend, GREEDY).ask("Hello"))


def test_a_conversation_goes_on_from_the_cache(backend: InProcessBackend) -> None:
    session = Session(backend, GREEDY)
    assert deltas(session.ask("Hello")) == "Hello! How can I help you?"
    assert deltas(session.ask("What is 12 + 30?")) == "12 + 30 = 42"
    assert session.usage.n_cached > 20


@pytest.mark.parametrize("kind", ["reasoning", "text"])
def test_what_came_before_an_interruption_stays_and_is_marked(saved: Session, kind: str) -> None:
    cut_at(saved.ask("What is 347 + 286?"), kind)
    entry = saved.entries[-1]
    assert entry.interrupted
    assert entry.message["reasoning_content"].startswith("Ones")
    assert bool(entry.message["content"]) == (kind == "text")
    assert saved.usage.finish_reason == "cancelled"
    assert saved.usage.n_prompt > 0
    assert read_session(path_of(saved)).entries == saved.entries
    assert deltas(saved.ask("What is 12 + 30?")) == "12 + 30 = 42"


def test_stop_lets_the_updates_end_by_themselves(backend: InProcessBackend, endless: ChatSettings) -> None:
    session = Session(backend, endless)
    updates = session.ask(STRAWBERRY)
    for update in updates:
        if isinstance(update, Delta):
            session.stop_answer()
            break
    rest = list(updates)
    assert isinstance(rest[-1], AnswerUsage)
    assert rest[-1].finish_reason == "cancelled"
    assert session.entries[-1].interrupted


def test_end_reasoning_has_the_model_answer_now(backend: InProcessBackend, endless: ChatSettings) -> None:
    session = Session(backend, endless)
    assert not session.end_reasoning()  # nothing is being answered
    updates = session.ask(STRAWBERRY)
    kinds = []
    for update in updates:
        if isinstance(update, Delta):
            kinds.append(update.kind)
            assert session.end_reasoning()
        if kinds[-1:] == ["text"]:
            break
    updates.close()
    assert kinds[0] == "reasoning"
    assert not session.usage.loop_broken


def test_a_question_that_gets_no_answer_is_taken_back(saved: Session) -> None:
    assert deltas(saved.ask("Hello"))
    with pytest.raises(ContextLengthExceeded):
        list(saved.ask("word " * 2000))
    assert [message["content"] for message in saved.messages] == ["Hello", "Hello! How can I help you?"]
    assert read_session(path_of(saved)).entries == saved.entries


def test_undo_and_regenerate(saved: Session) -> None:
    assert saved.undo() is None
    first = deltas(saved.ask("Hello"))
    assert deltas(saved.regenerate()) == first
    list(saved.ask("What is 12 + 30?"))
    assert saved.undo() == "What is 12 + 30?"
    assert [message["content"] for message in saved.messages] == ["Hello", first]
    assert read_session(path_of(saved)).entries == saved.entries


def test_a_tool_is_called_and_its_result_answered(backend: InProcessBackend) -> None:
    session = Session(backend, ChatSettings({"temperature": 0.0}, tools=(WEATHER,)))
    list(session.ask("What is the weather in Paris?"))
    assert session.usage.finish_reason == "tool_calls"
    (call,) = session.open_calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    session.give_result(call["id"], json.dumps({"temp_c": 21, "sky": "sunny"}))
    assert session.open_calls == []
    assert deltas(session.answer()) == "It is 21 degrees and sunny in Paris."
    assert session.open_calls == []


def test_settings_reach_the_model(backend: InProcessBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    session = Session(backend, ChatSettings({"temperature": 0.0}, system="Be brief.", json=schema, reasoning_budget=5))
    assert json.loads(deltas(session.ask("What is 2 + 3?"))) in ({"n": 1}, {"n": 2})
    assert session.messages[0] == {"role": "system", "content": "Be brief."}
    assert session.usage.budget_reached
    session.change_settings(ChatSettings({"temperature": 0.0}, max_tokens=4))
    list(session.ask("What is 2 + 3?"))
    assert session.usage.finish_reason == "length"
    assert not session.usage.context_is_full


# saved sessions -----------------------------------------------------------------------------------------------------


def test_a_session_is_resumed_with_messages_settings_and_usage(saved: Session, backend: InProcessBackend) -> None:
    saved.change_settings(
        ChatSettings({"temperature": 0.0, "seed": 7}, system="Be kind.", tools=(WEATHER,), max_tokens=99)
    )
    list(saved.ask("Hello"))
    path = path_of(saved)
    saved.close()
    with closing(Session.resume(backend, read_session(path), Transcript(path.parent, backend.origin, path))) as again:
        assert (again.messages, again.settings, again.usage) == (saved.messages, saved.settings, saved.usage)
        list(again.ask("Thank you!"))
        assert read_session(path).entries == again.entries
    assert read_session(path).origin == backend.origin
    assert read_session(path).title == "Hello"


def test_a_file_appears_with_the_first_message_and_is_private(saved: Session, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "sessions"
    assert saved.transcript is not None
    saved.transcript = Transcript(folder, saved.backend.origin)
    assert not folder.exists()
    list(saved.ask("Hello"))
    (path,) = list_sessions(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


KILLED = """
import os, signal, sys
from pathlib import Path
from stepgguf.conversation import session
from stepgguf.chat.exchange import ChatModel
from stepgguf.conversation.inprocess import InProcessBackend
from stepgguf.conversation.records import ChatSettings
from stepgguf.conversation.transcript import Transcript
from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

session.SAVE_PART_SECONDS = 0.0
backend = InProcessBackend(ChatModel(LlamaEngine(Path(sys.argv[1]), LlamaOptions(n_ctx=512, threads=1))))
settings = ChatSettings({"temperature": 0.0})
chat = session.Session(backend, settings, Transcript(Path(sys.argv[2]), backend.origin))
list(chat.ask("Hello"))
for update in chat.ask("What is 347 + 286?"):
    if isinstance(update, session.Delta) and update.kind == "text":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_last_moment(demo_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(demo_gguf), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (path,) = list_sessions(tmp_path)
    entries = read_session(path).entries
    assert [entry.message["content"] for entry in entries[:3]] == [
        "Hello",
        "Hello! How can I help you?",
        "What is 347 + 286?",
    ]
    assert entries[3].interrupted
    assert entries[3].message["reasoning_content"].endswith("The sum is 633.")


def test_a_line_that_was_not_written_whole_is_passed_over(saved: Session, backend: InProcessBackend) -> None:
    list(saved.ask("Hello"))
    path = path_of(saved)
    saved.close()
    with path.open("a") as file:
        file.write('{"type": "message", "mess')
    assert read_session(path).entries == saved.entries
    transcript = Transcript(path.parent, AnswerOrigin("another model", "x.gguf"), path)
    with closing(Session.resume(backend, read_session(path), transcript)) as again:
        list(again.ask("Thank you!"))
    assert [entry.message["content"] for entry in read_session(path).entries][2:] == ["Thank you!", "You are welcome!"]
    assert read_session(path).origin.model == "another model"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_without_room_to_save_it_is_told_once_and_the_conversation_goes_on(
    saved: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    list(saved.ask("Hello"))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="cannot be saved: No space left"):
        list(saved.ask("Thank you!"))
    assert deltas(saved.ask("Thank you!")) == "You are welcome!"
    assert [message["role"] for message in saved.messages] == ["user", "assistant"] * 2


def test_only_one_chat_writes_to_a_session(saved: Session) -> None:
    list(saved.ask("Hello"))
    path = path_of(saved)
    with pytest.raises(OutputError, match="open in another chat"):
        Transcript(path.parent, saved.backend.origin, path)


def test_parts_are_only_what_is_new(saved: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SAVE_PART_SECONDS", 0.0)
    list(saved.ask("What is 347 + 286?"))
    records = [json.loads(line) for line in path_of(saved).read_text().splitlines()]
    parts = [record for record in records if record["type"] == "part"]
    message = records[-1]["message"]
    assert "".join(part["reasoning"] for part in parts) == message["reasoning_content"]
    assert "".join(part["text"] for part in parts) == message["content"]
    assert len(read_session(path_of(saved)).entries) == 2


def test_a_session_gets_a_name(saved: Session, tmp_path: Path) -> None:
    assert saved.transcript is not None
    with pytest.raises(OutputError, match="nothing to save"):
        saved.transcript.rename("sums")
    list(saved.ask("Hello"))
    assert saved.transcript.rename("sums") == tmp_path / "sums.jsonl"
    list(saved.ask("Thank you!"))
    assert len(read_session(session_path(tmp_path, "sums")).entries) == 4
    with pytest.raises(OutputError, match="there is a session sums"):
        saved.transcript.rename("sums")
    for bad in ("", "../x", ".hidden"):
        with pytest.raises(OutputError, match="cannot be the name"):
            session_path(tmp_path, bad)


def test_what_is_no_session_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(OutputError, match="No such file"):
        read_session(path)
    path.write_text("hello\n")
    with pytest.raises(OutputError, match="line 1: not valid JSON"):
        read_session(path)
    path.write_text('{"type": "session", "version": 2, "origin": {}}\n')
    with pytest.raises(OutputError, match="version 2, expected 1"):
        read_session(path)
    path.write_text("[]\n")
    with pytest.raises(OutputError, match="line 1: the document is a list of 0, expected a JSON object"):
        read_session(path)
    with pytest.raises(OutputError, match="it is not a file"):
        read_session(tmp_path)


def test_the_origin_tells_model_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = bytearray(3 * 2**20)
    digests: set[Any] = set()
    for i in (0, len(data) - 1):
        data[i] = 1
        path.write_bytes(data)
        digests.add(AnswerOrigin.of_file("x", path).digest)
    path.write_bytes(data[:-1])
    digests.add(AnswerOrigin.of_file("x", path).digest)
    assert len(digests) == 3


def test_exports(saved: Session) -> None:
    list(saved.ask("Hello"))
    cut_at(saved.ask("What is 347 + 286?"), "reasoning")
    arguments = (saved.backend.origin, saved.settings_record(), saved.entries)
    document = json.loads(export_json(*arguments))
    assert document["settings"]["sampling"] == {"temperature": 0.0}
    assert [record["message"]["role"] for record in document["messages"]] == ["user", "assistant"] * 2
    assert document["messages"][3]["interrupted"]
    text = export_markdown(*arguments)
    assert "## You\n\nHello\n\n## Answer\n\n<details><summary>Thinking</summary>" in text
    assert text.endswith("*interrupted*\n")
