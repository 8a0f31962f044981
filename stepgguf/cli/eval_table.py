"""What `stepgguf eval` shows: a table with a column for each part of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from stepgguf.cli import output
from stepgguf.files.byte_sizes import readable_size

ColumnFigures = Mapping[str, Any]  # a member of "columns" in the result

_ROWS: tuple[tuple[str, Callable[[ColumnFigures], str]], ...] = (
    ("predictions", lambda c: f"{c['predictions']:,}"),
    ("perplexity", lambda c: _estimate(c["ppl"], ".4f")),
    ("  of the original", lambda c: _estimate(c["ppl_base"], ".4f")),
    ("ln of their ratio", lambda c: _estimate(c["ln_ratio"], ".5f")),
    ("KL divergence", lambda c: _estimate(c["kld"], ".6f")),
    ("  median", lambda c: f"{c['kld_median']:.6f}"),
    ("  90 %", lambda c: f"{c['kld_quantiles']['0.9']:.6f}"),
    ("  99 %", lambda c: f"{c['kld_quantiles']['0.99']:.6f}"),
    ("  99.9 %", lambda c: f"{c['kld_quantiles']['0.999']:.6f}"),
    ("  largest", lambda c: f"{c['kld_max']:.6f}"),
    ("RMS of delta p, %", lambda c: _estimate(c["delta_p_rms"], ".3f", 100)),
    ("same first choice, %", lambda c: _estimate(c["same_top"], ".3f", 100)),
)


def print_table(result: Mapping[str, Any]) -> None:
    """Write the figures of a result to stdout, and below what is to be known about them."""
    title = f"{result['file']}, {readable_size(result['bytes'])}, {result['bpw']:.3f} bpw, against {result['against']}"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in result["columns"]:
        table.add_column(Text(column["name"]), justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *(cell(column) for column in result["columns"]))
    output.stdout.print(table)
    if result["top_k"]:
        output.print_lines(
            [
                f"KL divergence over the {result['top_k']} likeliest tokens and one bin for the rest: never more than "
                "over all tokens."
            ]
        )


def _estimate(estimate: Mapping[str, float], form: str, scale: int = 1) -> str:
    return f"{scale * estimate['value']:{form}} ± {scale * estimate['error']:{form}}"
