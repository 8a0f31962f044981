"""stepgguf template: another chat template in a finished file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments


def template(
    path: arguments.Gguf,
    jinja: Annotated[
        Path | None,
        typer.Argument(metavar="NEW.jinja", help="The new template. Without it the present one is printed."),
    ] = None,
) -> None:
    """Show or replace a GGUF's chat template without quantizing again.

    The tensor data is not touched where the new header fits in the old one's place; otherwise it is moved on, by a
    copy that replaces the file when it is whole.

    Examples:

    - `stepgguf template step-q4_k_s.gguf > present.jinja`
    - `stepgguf template step-q4_k_s.gguf fixed.jinja`
    """
    import sys

    from stepgguf.chat.template import ChatTemplate
    from stepgguf.cli import output
    from stepgguf.convert.rewrite import chat_template, replace_chat_template

    if jinja is None:
        sys.stdout.write(chat_template(path))
        return
    text = jinja.read_text(encoding="utf-8")
    ChatTemplate(text)
    replace_chat_template(path, text)
    output.note(f"{path}: the chat template is now {jinja} ({len(text)} characters)")
