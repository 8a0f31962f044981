"""Chats in the browser: kept, branched, searched, exported, deleted; drafts."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tests.scripted_engine import ScriptedEngine
from tests.server.browser import ENTER, WAIT, Page
from tests.server.conftest import Server
from tests.server.page.conftest import Tell

pytestmark = pytest.mark.slow

QUESTIONS = "return [...document.querySelectorAll('.question > p')].map(p => p.textContent)"
ANSWERS = "return [...document.querySelectorAll('.answer .text')].map(p => p.textContent)"


def downloaded(folder: Path) -> Path:
    deadline = time.monotonic() + WAIT
    while not (files := list(folder.glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return files[0]


def test_chats_are_kept_exported_and_deleted(tell: Tell, page: Page) -> None:
    tell("Hm.", "</think>", "An answer.")
    page.ask("First?")
    page.ask("Second?")
    page.click("aside > a")
    assert page.count(".message") == 0
    page.ask("Elsewhere?")
    page.reload()
    page.until("document.querySelector('.question > p')")
    assert page.text(".question > p") == "Elsewhere?"
    assert page.run("return [...document.querySelectorAll('aside li a')].map(a => a.textContent)") == [
        "Elsewhere?",
        "First?",
    ]
    page.click("aside li:nth-child(2) a")
    page.until("document.querySelectorAll('.answer').length === 2")
    assert page.text(".answer:last-child .text") == "An answer."
    assert page.text(".answer:last-child summary").startswith("Thought for")
    page.click("#export")
    exported = json.loads(downloaded(page.downloads).read_text())
    assert exported["model"] == "demo"
    assert sorted(len(chat["messages"]) for chat in exported["chats"]) == [2, 4]
    page.click("aside li:nth-child(2) button")
    page.ask_driver("POST", "alert/accept")
    assert page.count(".message") == 0
    page.click("#delete-all")
    page.ask_driver("POST", "alert/accept")
    assert page.count("aside li") == 0
    assert page.run("return Object.keys(localStorage)") == ["stepgguf.settings"]


def test_a_deleted_chat_is_deleted_on_the_server_too(tell: Tell, page: Page, scripted: Server) -> None:
    tell("</think>", "An answer.")
    page.ask("First?")
    id = page.run("return JSON.parse(localStorage.getItem(Object.keys(localStorage).find(k => k.includes('chat'))))")
    id = id["messages"][1]["id"]
    assert scripted.client.get(f"/v1/responses/{id}").is_success
    page.click("aside li button")
    page.ask_driver("POST", "alert/accept")
    deadline = time.monotonic() + WAIT
    while scripted.client.get(f"/v1/responses/{id}").is_success:
        assert time.monotonic() < deadline


def test_any_question_can_be_edited_into_a_branch(tell: Tell, script: Tell, page: Page) -> None:
    tell("</think>", "One.")
    page.ask("First?")
    page.ask("Second?")
    script("</think>", "Two.")
    page.click(".question .edit")
    page.run("document.querySelector('.question textarea').value = 'Other?'")
    page.click(".question form .main")
    assert page.answer() == "Two."
    assert page.run(QUESTIONS) == ["Other?"]
    assert page.text(".question .versions").split() == ["‹", "2", "of", "2", "›"]
    page.click(".question .version")
    assert page.run(QUESTIONS) == ["First?", "Second?"]
    assert page.run(ANSWERS) == ["One.", "One."]
    page.reload()
    page.until("document.querySelectorAll('.question').length === 2")
    page.click(".question .version:last-child")
    assert page.run(QUESTIONS) == ["Other?"]
    assert page.run("return document.activeElement.ariaLabel") == "Previous version"  # the keyboard stays here


def test_the_model_sees_the_branch_that_is_shown(tell: Tell, page: Page, scripted_engine: ScriptedEngine) -> None:
    tell("</think>", "An answer.")
    page.ask("First?")
    page.ask("Second?")
    page.click(".question:nth-of-type(3) .edit")
    page.run("document.querySelector('.question textarea').value = 'Third?'")
    page.click(".question form .main")
    page.answer()
    prompt = scripted_engine.prompts[-1]
    assert prompt.index("First?") < prompt.index("An answer.") < prompt.index("Third?")
    assert "Second?" not in prompt


def test_another_answer_is_a_version_and_the_first_is_kept(tell: Tell, script: Tell, page: Page) -> None:
    tell("</think>", "One.")
    page.ask("First?")
    page.ask("Second?")
    script("</think>", "Two.")
    page.click(".answer .again")  # the first answer's
    assert page.answer() == "Two."
    assert page.run(ANSWERS) == ["Two."]
    page.click(".answer .version")
    assert page.run(ANSWERS) == ["One.", "One."]


def test_chats_of_an_older_version_are_read(tell: Tell, page: Page) -> None:
    tell("</think>", "New.")
    answer = {"role": "assistant", "content": "Old.", "reasoning_content": "Hm.", "pieces": 2, "end": "stop"}
    answer |= {"seconds": {"first": 0.5, "thought": 1.5, "last": 2}, "usage": {"completion_tokens": 9}}
    old = {"id": "x", "created": "2025-01-01T00:00:00Z", "title": "Before?"}
    old["messages"] = [{"role": "user", "content": "Before?"}, answer]  # type: ignore[assignment]
    page.run("localStorage.setItem('stepgguf.chat.x', arguments[0])", json.dumps(old))
    page.run("localStorage.setItem('stepgguf.chat.y', '{')")  # is passed over
    page.reload()
    page.click("aside li a")
    page.until("document.querySelector('.answer')")
    assert page.text(".answer .text") == "Old."
    assert page.text("summary") == "Thought for 1.0 s"
    assert page.ask("And now?") == "New."
    assert page.run(QUESTIONS) == ["Before?", "And now?"]


def test_damaged_storage_is_passed_over(tell: Tell, page: Page) -> None:
    tell("</think>", "New.")
    good = {"id": "x", "created": "2025-01-01", "title": "Kept", "messages": [{"role": "user", "content": "Kept?"}]}
    damaged = [
        None, [], "text", {**good, "id": 1}, {**good, "title": None}, {**good, "messages": {}},
        *({**good, "messages": [{"role": "user", "content": "?", **part}]} for part in (
            {"content": None}, {"content": [{"type": "text"}]}, {"role": "system"}, {"parent": 0}, {"parent": 7},
            {"parent": "-1"},
        )),
    ]  # fmt: skip
    stored = {f"stepgguf.chat.{i}": json.dumps(one) for i, one in enumerate(damaged)}
    stored["stepgguf.chat.x"] = json.dumps({**good, "leaf": 99})
    for settings in ("{", "null", "7", '"text"', '{"length": 1, "top_k": {}, "gone": "1"}'):
        for key, value in {**stored, "stepgguf.settings": settings}.items():
            page.run("localStorage.setItem(arguments[0], arguments[1])", key, value)
        page.reload()
        page.until("document.getElementById('context').textContent")
        assert page.run("return [...document.querySelectorAll('aside li a')].map(a => a.textContent)") == ["Kept"]
        page.type("kept", "#search")
        page.click("aside li a")
        page.until("document.querySelector('.question')")
        assert page.run(QUESTIONS) == ["Kept?"]


def test_a_full_storage_keeps_the_page_alive_and_says_so(tell: Tell, page: Page) -> None:
    tell("</think>", "An answer.")
    page.run("localStorage.clear()")
    page.run("""for (let n = 2 ** 22, i = 0; n; ) try { localStorage.setItem(i++, "x".repeat(n)); }
        catch { n = Math.floor(n / 2); }""")
    page.reload()
    page.until("document.getElementById('context').textContent")
    page.click("#settings-button")
    page.type("1", "[name=top_k]")
    page.click("#settings form button")
    assert page.text("#settings-button") == "Settings (1)"
    assert page.ask("First?") == "An answer."
    assert page.text("#warning").startswith("This browser stores no more")


def test_the_search_finds_the_place_and_opens_its_branch(tell: Tell, script: Tell, page: Page) -> None:
    tell("</think>", "The capital is Canberra, not Sydney.")
    page.ask("Australia?")
    script("</think>", "Another answer.")
    page.click(".again")
    page.answer()
    page.click("aside > a")
    page.ask("Elsewhere?")
    page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'k', ctrlKey: true, bubbles: true}))")
    assert page.run("return document.activeElement.id") == "search"
    page.type("canBERRA", "#search")
    assert page.text("#found") == "1 chat found"
    assert page.text("aside li mark") == "Canberra"
    assert page.text("aside li a").startswith("Australia?\nThe capital is Canberra, not")
    page.click("aside li a")
    page.until("document.querySelector('.answer .text').textContent.includes('Canberra')")
    assert page.run(QUESTIONS) == ["Australia?"]
    page.type("nowhere", "#search")
    assert page.text("#found") == "No chats found"
    assert page.count("aside li") == 0
    page.type("\ue00c", "#search")  # Escape
    assert page.count("aside li") == 2


def test_drafts_survive_a_reload_each_with_its_chat(tell: Tell, page: Page) -> None:
    tell("</think>", "An answer.")
    draft = "return document.querySelector('#composer textarea').value"
    page.ask("First?")
    page.type("half a")
    page.reload()
    page.until("document.querySelector('#composer textarea').value")
    assert page.run(draft) == "half a"
    page.click("aside > a")
    page.until("!document.querySelector('.message')")
    assert page.run(draft) == ""
    page.type("of a new one")
    page.reload()
    page.until("document.querySelector('#composer textarea').value")
    assert page.run(draft) == "of a new one"
    page.click("aside li a")
    page.until("document.querySelector('.message')")
    assert page.run(draft) == "half a"
    page.ask(" question?")
    page.reload()
    page.until("document.querySelectorAll('.message').length === 4")
    assert page.run(QUESTIONS) == ["First?", "half a question?"]
    assert page.run(draft) == ""


def test_an_edit_survives_a_reload_too(tell: Tell, page: Page) -> None:
    tell("</think>", "An answer.")
    page.ask("First?")
    page.click(".edit")
    page.type(" Or", ".question textarea")
    page.reload()
    page.until("document.querySelector('.question textarea')")
    assert page.run("return document.querySelector('.question textarea').value") == "First? Or"
    page.type(" not?" + ENTER, ".question textarea")
    assert page.answer() == "An answer."
    assert page.run(QUESTIONS) == ["First? Or not?"]
    page.click(".version")
    assert page.run(QUESTIONS) == ["First?"]
    page.click(".edit")
    page.type("x", ".question textarea")
    page.click(".cancel")
    page.click("aside li button")
    page.ask_driver("POST", "alert/accept")
    assert page.run("return Object.keys(localStorage)") == ["stepgguf.settings"]


def test_another_tab_sees_what_this_one_does(tell: Tell, page: Page, scripted: Server) -> None:
    tell("</think>", "An answer.")
    page.ask("First?")
    first = page.ask_driver("GET", "window")
    second = page.ask_driver("POST", "window/new", type="tab")["handle"]
    page.ask_driver("POST", "window", handle=second)
    page.ask_driver("POST", "url", url=scripted.url)
    page.until("document.querySelector('aside li a')")
    page.click("aside li a")
    page.until("document.querySelector('.message')")
    page.ask("Second?")
    page.ask_driver("POST", "window", handle=first)
    page.until("document.querySelectorAll('.message').length === 4")
    assert page.run(QUESTIONS) == ["First?", "Second?"]
    page.ask_driver("POST", "window", handle=second)
    page.ask_driver("DELETE", "window")
    page.ask_driver("POST", "window", handle=first)


def test_what_another_tab_saved_meanwhile_is_kept(tell: Tell, page: Page) -> None:
    """This tab is busy with its answer and has not looked at what the other one asked."""
    go_on = threading.Event()
    tell("</think>", "One", go_on, " answer.")
    page.send("First?")
    page.until("document.querySelector('.text').textContent === 'One'")
    page.until("Object.keys(localStorage).some((name) => name.startsWith('stepgguf.chat.'))")
    page.run("""
      const name = Object.keys(localStorage).find((name) => name.startsWith("stepgguf.chat."));
      const chat = JSON.parse(localStorage[name]);
      chat.messages.push({ key: "x", role: "user", content: "Elsewhere?", parent: 1 });
      chat.messages.push({ key: "y", role: "assistant", content: "There.", parent: 2, end: "stop", at: {} });
      localStorage[name] = JSON.stringify(chat);
    """)
    go_on.set()
    assert page.answer() == "One answer."
    page.reload()
    page.until("document.querySelector('aside li a')")
    stored = page.run("return Object.entries(localStorage).find(([name]) => name.startsWith('stepgguf.chat.'))[1]")
    messages = [(message["content"], message["parent"]) for message in json.loads(stored)["messages"]]
    assert messages == [("First?", -1), ("One answer.", 0), ("Elsewhere?", 1), ("There.", 2)]


def test_two_chats_are_answered_at_a_time(tell: Tell, page: Page) -> None:
    go_on = threading.Event()
    tell("</think>", "One", go_on, " answer.")
    page.send("First?")
    page.until("document.querySelector('.text').textContent === 'One'")
    page.click("aside > a")
    page.send("Second?")
    page.until("document.querySelector('.text')?.textContent === 'One'")
    page.click("aside li:last-child a")
    page.until("document.querySelector('.question > p')?.textContent === 'First?'")
    go_on.set()
    assert page.answer() == "One answer."
    page.click("aside li:first-child a")
    page.until("document.querySelector('.question > p')?.textContent === 'Second?'")
    assert page.answer() == "One answer."
