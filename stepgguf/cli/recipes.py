"""stepgguf recipes: the recipes that come with the program."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.")] = None,
) -> None:
    """List the recipes that come with stepgguf, or print one: a start for your own.

    A recipe says which type each kind of tensor gets; --type takes its name or your file.

    Examples:

    - `stepgguf recipes`
    - `stepgguf recipes 128gb > mine.toml`
    - `stepgguf convert Step-3.5-Flash/ step.gguf --type mine.toml --dry-run`
    """
    from stepgguf.cli import output
    from stepgguf.quants.recipe_files import shipped_descriptions, shipped_text
    from stepgguf.quants.type_names import did_you_mean

    known = shipped_descriptions()
    if name is None:
        output.print_lines(f"{each:<8} {description}" for each, description in known.items())
        output.note("Print one with: stepgguf recipes NAME")
    elif name.lower() in known:
        sys.stdout.write(shipped_text(name.lower()))
    else:
        guess = did_you_mean(name, known)
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}{guess}", param_hint="NAME")
