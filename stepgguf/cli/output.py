"""What the terminal shows. stdout is data, stderr is everything else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.convert.fold import FoldedLine

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
_FLOATS = ("F32", "F16", "BF16")


def error(message: str, hint: str | None) -> None:
    stderr.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
    if hint:
        stderr.print(f"[bold]hint:[/] {_escape(hint)}", soft_wrap=True)


def warn(messages: Iterable[str]) -> None:
    for message in messages:
        stderr.print(f"[yellow]warning:[/] {_escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    stderr.print(_escape(message), soft_wrap=True)


def data(value: Any) -> None:
    """JSON to stdout, escaped where its encoding has not every character."""
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=ascii_only) + "\n")


def lines(texts: Iterable[str]) -> None:
    """Text to stdout."""
    sys.stdout.write("".join(f"{text}\n" for text in texts))


def show(texts: Iterable[Text]) -> None:
    """Lines to stdout, with their colours if it is a terminal."""
    for text in texts:
        stdout.print(text, soft_wrap=True)


def table(lines: Iterable[FoldedLine]) -> str:
    """`columns` as plain text."""
    return "\n".join(text.plain for text in columns(lines))


def columns(lines: Iterable[FoldedLine]) -> list[Text]:
    """Folded tensors, one a line: label, count, type, size, bits per weight, reason."""
    rows = [
        (
            line.label,
            f"{line.count}x",
            line.type,
            readable_size(line.n_bytes),
            f"{line.n_bytes * 8 / line.n_values:.2f}",
            line.reason,
        )
        for line in lines
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    return [
        Text.assemble(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  ",
            (f"{c:<{widths[2]}}", "dim" if c in _FLOATS else "cyan"),
            f"  {d:>{widths[3]}}  {e:>{widths[4]}}",
            (f"  {f}".rstrip(), "dim"),
        )
        for a, b, c, d, e, f in rows
    ]


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
