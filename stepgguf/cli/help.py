"""Help that a person can read: a flag has no type, a number is N, a choice is a|b, an argument is its name."""

from __future__ import annotations

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption


class ReadableCommand(TyperCommand):
    """A command whose help a person can read."""

    def get_params(self, ctx: typer.Context) -> list[TyperOption | TyperArgument]:  # type: ignore[override]
        return [_make_readable(param, ctx) for param in super().get_params(ctx)]  # type: ignore[arg-type]


class ReadableGroup(TyperGroup):
    """The same for the command tree itself."""

    def get_params(self, ctx: typer.Context) -> list[TyperOption | TyperArgument]:  # type: ignore[override]
        return [_make_readable(param, ctx) for param in super().get_params(ctx)]  # type: ignore[arg-type]


def _make_readable(param: TyperOption | TyperArgument, ctx: typer.Context) -> TyperOption | TyperArgument:
    if isinstance(param, TyperArgument):
        param.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
    elif param.metavar is None and param.is_flag:
        param.metavar = ""
    elif param.metavar is None:
        shown = param.display_type(ctx)
        param.metavar = "N" if shown.startswith(("<int", "<float")) else shown.strip("<>") if "|" in shown else None
    return param
