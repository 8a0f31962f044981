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
    restore: Annotated[
        bool, typer.Option("--restore", help="Put back the template that the file was made with.")
    ] = False,
) -> None:
    """Show or replace a GGUF's chat template without quantizing again.

    The tensor data is not touched where the new header fits in the old one's place; otherwise it is moved on, by a
    copy that replaces the file when it is whole. A new template is tried on a conversation first, and the one that the
    file was made with is kept in it.

    Examples:

    - `stepgguf template step-q4_k_s.gguf > present.jinja`
    - `stepgguf template step-q4_k_s.gguf fixed.jinja`
    - `stepgguf template step-q4_k_s.gguf --restore`
    """
    import sys

    from stepgguf.chat.template import read_template
    from stepgguf.cli import output
    from stepgguf.convert import rewrite

    if restore and jinja is not None:
        raise typer.BadParameter("it puts back the old template: leave out NEW.jinja", param_hint="--restore")
    if restore:
        rewrite.restore_chat_template(path)
        output.note(f"{path}: the chat template is the one that the file was made with")
    elif jinja is None:
        sys.stdout.write(rewrite.read_chat_template(path))
    else:
        text = read_template(jinja)
        rewrite.replace_chat_template(path, text)
        output.note(f"{path}: the chat template is now {jinja} ({len(text)} characters)")
