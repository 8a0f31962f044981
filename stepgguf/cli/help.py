"""Help that a person can read: a flag has no type, a number is N, an argument is its name."""

from __future__ import annotations

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption


class Command(TyperCommand):
    def get_params(self, ctx: typer.Context) -> list[TyperOption | TyperArgument]:  # type: ignore[override]
        return [_readable(param, ctx) for param in super().get_params(ctx)]  # type: ignore[arg-type]


class Group(TyperGroup):
    def get_params(self, ctx: typer.Context) -> list[TyperOption | TyperArgument]:  # type: ignore[override]
        return [_readable(param, ctx) for param in super().get_params(ctx)]  # type: ignore[arg-type]


def _readable(param: TyperOption | TyperArgument, ctx: typer.Context) -> TyperOption | TyperArgument:
    if isinstance(param, TyperArgument):
        param.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
    elif param.metavar is None and param.is_flag:
        param.metavar = ""
    elif param.metavar is None and param.display_type(ctx).startswith(("<int", "<float")):
        param.metavar = "N"
    return param
