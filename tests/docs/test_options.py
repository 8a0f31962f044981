"""What pages say in passing, in the middle of a sentence: commands and options that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from tests.cli.test_help import COMMANDS
from tests.docs.pages import PAGES, ROOT

OPTIONS = {
    name: {
        word for param in command.get_params(typer.Context(command)) for word in (*param.opts, *param.secondary_opts)
    }
    for name, command in COMMANDS.items()
}
OF_OTHERS = {"--add-host", "--weights-only", "--continue"}  # of Docker, a benchmark, Claude Code


def spans(page: Path) -> list[str]:
    """The code in the middle of a page's sentences."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    for span in spans(page):
        first, *words = span.split()
        options = {word.partition("=")[0] for word in (first, *words) if re.match(r"--[a-z]", word)} - OF_OTHERS
        if first == "stepgguf" and words and words[0] != "COMMAND" and not words[0].startswith("--"):
            assert words[0] in COMMANDS, span
            assert options <= OPTIONS[words[0]], span
        elif first.startswith("--"):
            assert all(any(option in known for known in OPTIONS.values()) for option in options), span
