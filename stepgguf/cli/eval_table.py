"""What `stepgguf eval` shows: a table with a column for each part of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepgguf.cli import output
from stepgguf.files.byte_sizes import readable_size

ColumnFigures = Mapping[str, Any]  # a member of "columns" in the result

_ENGINES = {"llama-cpp-python": "run by llama.cpp", "stream": "weights only, in float32"}

_ROWS: tuple[tuple[str, Callable[[ColumnFigures], str]], ...] = (
    ("predictions", lambda c: f"{c['predictions']:,}"),
    ("perplexity", lambda c: _estimate(c["ppl"], ".4f")),
    ("  of the original", lambda c: _estimate(c["ppl_base"], ".4f")),
    ("ln of their ratio", lambda c: _estimate(c["ln_ratio"], ".5f")),
    ("KL divergence", lambda c: _estimate(c["kld"], ".6f")),
    ("  by whole dialogues", lambda c: f"± {c['errors_by_row']['kld']:.6f}" if "errors_by_row" in c else ""),
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
    columns = result["columns"]
    rows = [["", *(column["name"] for column in columns)]]
    rows += [[name, *(cell(column) for column in columns)] for name, cell in _ROWS]
    rows = [row for row in rows if any(row[1:])]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    size = f"{readable_size(result['bytes'])}, {result['bpw']:.3f} bpw without MTP blocks"
    output.print_lines([f"{result['file']} ({size}), {_ENGINES[result['engine']]}, against {result['against']}", ""])
    output.print_lines(_line(row, widths) for row in rows)
    if (predicted := result["predicted_kld"]) is not None:
        words = "when the types were chosen, for stock codes on the calibration text"
        output.print_lines(["", f"KL divergence predicted {words}: {predicted:.6f}."])
    if result["top_k"]:
        bins = f"the {result['top_k']} likeliest tokens and one bin for the rest"
        output.print_lines(["", f"KL divergence is over {bins}: it may be a little too low, and is never too high."])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line is never broken, however narrow the terminal."""
    figures = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([f"{cells[0]:<{widths[0]}}", *figures])


def _estimate(estimate: Mapping[str, float], form: str, scale: int = 1) -> str:
    return f"{scale * estimate['value']:{form}} ± {scale * estimate['error']:{form}}"
