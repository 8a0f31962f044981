"""Help of every command: each option and argument is explained, and what it takes is a word that says something."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from stepgguf.cli.main import app, main

ROOT = typer.main.get_command(app)
COMMANDS: dict[str, TyperCommand] = {"": ROOT, **ROOT.commands}  # type: ignore[attr-defined, dict-item]


def params() -> Iterator[tuple[str, TyperOption | TyperArgument]]:
    for name, command in COMMANDS.items():
        for param in command.get_params(typer.Context(command)):
            yield f"{name} {'/'.join(param.opts)}".strip(), param  # type: ignore[misc]


@pytest.mark.parametrize("name", dict(params()))
def test_every_option_and_argument_has_help(name: str) -> None:
    param = dict(params())[name]
    assert isinstance(param.help, str)
    assert len(param.help) > 8
    assert param.help.endswith((".", ")"))


@pytest.mark.parametrize("name", dict(params()))
def test_what_an_option_takes_is_said_in_a_word(name: str) -> None:
    param = dict(params())[name]
    if isinstance(param, TyperOption) and param.is_flag:
        assert param.metavar == ""
    else:
        assert param.metavar, "a word for its value"
        assert not re.search("TEXT$|PATH$|INTEGER|FLOAT|<", param.metavar) or "=" in param.metavar


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help_and_no_python_shows_in_it(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "-h"]) == 0
    short = capfd.readouterr().out
    assert main([*name.split(), "--help"]) == 0
    assert capfd.readouterr().out == short
    assert not re.search(r"<\w+>|lambda|TEXT\b|INTEGER|Annotated", short.replace("<tool", ""))


def test_a_capital_v_is_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-V"]) == 0
    short = capfd.readouterr().out
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == short


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert main(["--show-completion", shell]) == 0
    assert "_STEPGGUF_COMPLETE" in capfd.readouterr().out


@pytest.mark.parametrize(("words", "completion"), [("qua", "quantize"), ("convert --imatrix-p", "--imatrix-prior")])
def test_words_are_completed(
    words: str, completion: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_STEPGGUF_COMPLETE", "complete_bash")
    line = f"stepgguf {words}"
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    main([])
    assert completion in capfd.readouterr().out.split()
