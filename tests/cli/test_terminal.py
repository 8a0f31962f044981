"""What chat shows, piece by piece."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from stepgguf.chat.output import Delta
from stepgguf.cli.terminal import footer
from stepgguf.cli.terminal.commands.table import COMMANDS, run_command
from stepgguf.cli.terminal.complete import Attachment, completions, mentioned_files, read_file
from stepgguf.cli.terminal.line_editor import is_open, strip_quotes
from stepgguf.cli.terminal.live import LiveRows, cut_to_width, strip_controls, wrap_line
from stepgguf.cli.terminal.markdown import MarkdownBlocks, MarkdownRenderer
from stepgguf.cli.terminal.pipe import PipeView
from stepgguf.cli.terminal.screen import Screen
from stepgguf.conversation.records import AnswerOrigin, AnswerUsage
from stepgguf.conversation.session import Session
from stepgguf.errors import RequestError

DOCUMENT = """# Title

A paragraph
of two lines.

1. one

   more of it
2. two
   - nested

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):

    return "x" * 3
```
> quote

The end.
"""


class FakeTerminal:
    """Just enough of a terminal for what Live writes: text, line feeds, returns, and the two escapes it uses."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", text):
            line = self.lines[self.row]
            if token == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row >= len(self.lines))
            elif token == "\r":
                self.column = 0
            elif token == "\x1b[A":
                self.row -= 1
                assert self.row >= 0
            elif token == "\x1b[2K":
                self.lines[self.row] = ""
            elif token[0] != "\x1b":
                self.lines[self.row] = line[: self.column].ljust(self.column) + token + line[self.column + 1 :]
                self.column += 1

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise OSError

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip("\n")


def test_rows_are_rewritten_and_what_is_committed_stays_above_them() -> None:
    screen = FakeTerminal()
    live = LiveRows(screen, color=False)  # type: ignore[arg-type]
    live.show_rows(["one", "two", "three"])
    live.show_rows(["one", "2"])
    assert screen.text == "one\n2"
    live.show_rows(["one", "2", "3"])
    assert screen.text == "one\n2\n3"
    live.commit("kept\nhere", ["row"])
    assert screen.text == "kept\nhere\nrow"
    live.show_rows([])
    live.write("a line ")
    live.write("goes on\n")
    live.show_rows([f"row {i}" for i in range(99)])
    assert screen.lines[:3] == ["kept", "here", "a line goes on"]
    assert screen.lines[3] == "row 76"  # 23 rows of 24 lines
    live.clear()
    assert screen.text == "kept\nhere\na line goes on"


class NarrowWindow(io.StringIO):
    """A terminal whose size the test says, through `os.get_terminal_size`."""

    def fileno(self) -> int:
        return 1


def test_a_row_that_a_narrow_window_broke_is_cleared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    file, columns = NarrowWindow(), 80
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
    live = LiveRows(file, color=True)
    live.show_rows([live.style("2", "x" * 79)])
    columns = 30
    file.truncate(0)
    live.show_rows(["y"])
    assert file.getvalue().count("\x1b[2K") == 3


def test_unchanged_rows_are_not_written_again() -> None:
    file = io.StringIO()
    live = LiveRows(file, color=False)
    live.show_rows(["same", "old"])
    file.truncate(0)
    live.show_rows(["same", "new"])
    assert "same" not in file.getvalue()
    file.truncate(0)
    live.show_rows(["same", "new"])
    assert file.getvalue() == ""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_blocks_do_not_depend_on_how_the_text_comes(size: int) -> None:
    whole = [
        "".join(DOCUMENT.splitlines(keepends=True)[a:b]).strip("\n")
        for a, b in (
            token.map for token in MarkdownIt().enable("table").parse(DOCUMENT) if token.level == 0 and token.map
        )
    ]
    blocks, found = MarkdownBlocks(), []
    for i in range(0, len(DOCUMENT), size):
        found += blocks.feed(DOCUMENT[i : i + size])
    assert found + blocks.finish() == whole
    assert len(whole) == 7


def test_the_start_of_a_line_does_not_begin_a_block() -> None:
    blocks = MarkdownBlocks()
    assert blocks.feed("- an item\n+") == []  # which looks like another list
    assert blocks.feed("1 that goes on\n\nThe end.\n") == ["- an item\n+1 that goes on"]


def test_a_block_is_rendered_for_copying() -> None:
    render = MarkdownRenderer(io.StringIO(), color=False).render
    table = "| a |\n|---|\n| 1 |"
    shown = [
        re.sub(r"\x1b\[[0-9;]*m", "", render(block, 30)) for block in ("# T", "a\nb", "- x\n- y", "`c` *d*", table)
    ]
    assert shown == ["T\n", "a\nb\n", " • x\n • y\n", "c d\n", " a\n ─\n 1\n"]
    long = "x = 1  # " + "y" * 50
    code = re.sub(r"\x1b\[[0-9;]*m", "", render(f"```python\n{long}\n\n  z\n```", 30))
    assert code == f"```python\n{long}\n\n  z\n```\n"


def test_no_color_means_no_escapes() -> None:
    assert LiveRows(io.StringIO(), color=False).style("2", "x") == "x"
    assert "\x1b[3" not in MarkdownRenderer(io.StringIO(), color=False).render("```python\nx = 1\n```", 30)
    assert "\x1b[3" in MarkdownRenderer(io.StringIO(), color=True).render("```python\nx = '1'\n```", 30)


def test_text_of_a_model_cannot_drive_the_terminal() -> None:
    assert strip_controls("a\x1b]0;x\x07b\tc\n\x9b2J") == "a�]0;x�b    c\n�2J"


def test_rows_count_cells() -> None:
    assert wrap_line("one two three", 8) == ["one two", "three"]
    assert wrap_line("日本語日本語", 5) == ["日本", "語日", "本語"]
    assert wrap_line("", 5) == [""]
    assert cut_to_width("日本語", 5) == "日本…"
    assert cut_to_width("short", 5) == "short"


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [("a", False), ("a\\", True), ("a\\\\", False), ('"""', True), ('"""\na', True), ('"""\na\n"""', False)],
)
def test_when_enter_starts_a_new_line(text: str, goes_on: bool) -> None:
    assert is_open(text) == goes_on


def test_quotes_around_all_of_it_are_dropped() -> None:
    assert strip_quotes('"""\na\n  b\n"""') == "a\n  b"
    assert strip_quotes('say """x"""') == 'say """x"""'
    assert strip_quotes(' """ ') == '"""'


def test_mentioned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "with space.txt", "b."):
        Path(name).touch()
    assert mentioned_files('@a.py, (@a.py) and @"with space.txt". me@a.py @nobody @b.') == [
        "a.py",
        "with space.txt",
        "b.",
    ]


def test_a_fence_is_longer_than_any_in_the_file() -> None:
    assert Attachment("x.md", "````\n").fenced() == "x.md:\n`````md\n````\n`````"
    assert Attachment("x", "y").fenced() == "x:\n```\ny\n```"


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("folder/a b", "file.txt", ".hidden"):
        Path(name).touch()
    words = {"": ["/set", "/save"], "/set": ["top_k", "top_p"], "/file": ["@"]}

    def offered(text: str) -> list[tuple[str, int]]:
        return list(completions(text, lambda command: words.get(command, ())))

    assert offered("/s") == [("/set", 2), ("/save", 2)]
    assert offered("/set top_") == [("top_k", 4), ("top_p", 4)]
    assert offered("/set top_k 4") == []
    assert offered("/file fi") == [("file.txt", 2)]
    assert offered("see @f") == [("file.txt", 1), ("folder/", 1)]
    assert offered("see @folder/") == [('"folder/a b', 7)]
    assert offered("me@f") == []
    assert offered("//s") == []


class Nobody:
    """A backend that is never asked."""

    origin, n_ctx, default_sampling = AnswerOrigin("a model", ""), 512, None


class Target:
    """What commands act on, without a dialogue."""

    def __init__(self, folder: Path) -> None:
        self.shown = io.StringIO()
        self.session = Session(Nobody())  # type: ignore[arg-type]
        self.screen = Screen(LiveRows(self.shown, color=False), "fold", renderer=None)
        self.folder, self.next_line, self.leaving = folder, "", False


def test_every_command_is_listed_as_it_is_called(tmp_path: Path) -> None:
    assert all(command.usage.split()[0] == name for name, command in COMMANDS.items())
    target = Target(tmp_path)
    run_command(target, "/help")  # type: ignore[arg-type]
    shown = " ".join(target.shown.getvalue().split())  # long lines are broken in two
    assert all(f"{command.usage} {command.help}" in shown for command in COMMANDS.values())


@pytest.mark.parametrize(
    ("line", "near"),
    [("/hlep", "/help"), ("/q", "/exit"), ("/clear", "/new"), ("/retry", "/regen"), ("/sessions", "/list"), ("/x", "")],
)
def test_a_command_that_there_is_not_is_told_from_one_that_there_is(tmp_path: Path, line: str, near: str) -> None:
    with pytest.raises(RequestError, match=f"unknown command {line}") as error:
        run_command(Target(tmp_path), line)  # type: ignore[arg-type]
    assert (error.value.hint or "").startswith(f"Did you mean {near}? " if near else "/help")
    assert not near or near in COMMANDS


def test_how_it_reasons_is_set_and_shown_by_one_command(tmp_path: Path) -> None:
    target = Target(tmp_path)
    for line, budget, display in [
        ("/think low", 2048, "fold"), ("/think 7", 7, "fold"), ("/think show", 7, "full"), ("/think none", 0, "full"),
        ("/think high", None, "full"), ("/t", None, "fold"),
    ]:  # fmt: skip
        run_command(target, line)  # type: ignore[arg-type]
        assert (target.session.settings.reasoning_budget, target.screen.reasoning_display) == (budget, display)
    with pytest.raises(RequestError, match="/think much: not known"):
        run_command(target, "/think much")  # type: ignore[arg-type]


def test_footer_and_remarks() -> None:
    usage = AnswerUsage(
        n_prompt=1204, n_cached=1000, n_reasoning=431, n_text=212, n_steps=268, n_drafted=400, n_accepted=284,
        n_ctx=2048, prompt_seconds=2.0, generation_seconds=20.0, finish_reason="stop",
    )  # fmt: skip
    assert footer.usage_parts(usage) == [
        "431 think + 212 answer",
        "32.1 t/s",
        "prefill 204 @ 102 t/s (1,000 cached)",
        "ctx 1,847/2,048 (90%)",
        "MTP 2.4 tok/step (71%)",
    ]
    assert footer.ending_remarks(usage, None) == ["90% of the context is used; /new starts over, /undo takes back"]
    usage.finish_reason = "length"
    assert footer.ending_remarks(usage, 643)[0] == "cut off by max_tokens (643)"
    usage.n_text += 201
    assert footer.ending_remarks(usage, 900) == ["cut off by the context (2,048)"]
    usage.n_text, usage.n_ctx, usage.budget_reached, usage.loop_broken = 0, None, True, True
    assert footer.ending_remarks(usage, None) == [
        "cut off by the server's limit; it had not stopped thinking",
        "the budget for thinking was used up",
        "the thinking repeated itself and was ended",
    ]


def test_thinking_and_answer_in_one_file_are_two_paragraphs() -> None:
    file = io.StringIO()
    pipe = PipeView(file, file, reasoning_display="full")
    for delta in (Delta("reasoning", "Hm"), Delta("reasoning", "."), Delta("text", "Y"), Delta("text", "es")):
        pipe.take(delta, AnswerUsage())
    pipe.finish(AnswerUsage())
    assert file.getvalue() == "Hm.\nYes\n"


def test_names_that_no_file_can_have_are_words(tmp_path: Path) -> None:
    for name in ("n" * 300, "~nobody-at-all/x", "a\0b", "loop"):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to("loop")
        assert mentioned_files(f"see @{name} please") == []
        assert list(completions(f"see @{name}/", lambda _: ())) == []
    for path in (tmp_path, tmp_path / "loop", Path("~nobody-at-all/x"), tmp_path / ("n" * 300)):
        with pytest.raises(RequestError):
            read_file(str(path))
