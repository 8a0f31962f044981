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
    """Show an error on stderr, and what to do about it on the next line."""
    stderr.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
    if hint:
        stderr.print(f"[bold]hint:[/] {_escape(hint)}", soft_wrap=True)


def warn(messages: Iterable[str]) -> None:
    """Show each message as a warning on stderr."""
    for message in messages:
        stderr.print(f"[yellow]warning:[/] {_escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """Show what a person may want to know on stderr. Callers look at --quiet first."""
    stderr.print(_escape(message), soft_wrap=True)


def print_json(value: object) -> None:
    """Write a value to stdout as JSON, escaped where stdout's encoding has not every character."""
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=ascii_only) + "\n")


def print_lines(texts: Iterable[str]) -> None:
    """Write lines to stdout, as they are."""
    sys.stdout.write("".join(f"{text}\n" for text in texts))


def print_texts(texts: Iterable[Text]) -> None:
    """Write lines to stdout, with their colours if it is a terminal."""
    for text in texts:
        stdout.print(text, soft_wrap=True)


def counted(n: int, noun: str) -> str:
    """How many there are, in words: "no layers", "1 layer", "45 layers"."""
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"


def tensor_table(lines: Iterable[FoldedLine]) -> list[Text]:
    """Folded tensors as a table, a row each: label, count, type, size, bits per weight, reason."""
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


def line_report(line: FoldedLine) -> dict[str, Any]:
    """Folded tensors as data; the reason of their type is not in it."""
    return {
        "layers": line.layers, "role": line.stem, "count": line.count, "type": line.type, "bytes": line.n_bytes,
    }  # fmt: skip


def _escape(text: str) -> str:
    """Keep rich from reading a bracket in a path or a message as markup."""
    return text.replace("[", r"\[")
