"""Options that several commands share, and the parsing of sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int) -> int:
    """ "50G" is 50 * 10^9 bytes (as llama.cpp reads it), "50GiB" is 50 * 2^30. An int is a default: bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise typer.BadParameter(f"{text!r} is not a size; write for example 50G or 2GiB")
    unit = match[2].upper()
    value = int(float(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))
    if value <= 0:
        raise typer.BadParameter(f"{text!r}: a size must be positive")
    return value


Type = Annotated[
    str,
    typer.Option("--type", "-t", metavar="TYPE", help="F32, F16, BF16, Q8_0 or any llama.cpp mixture: Q4_K_M, Q4_K_S, "
                 "Q5_K_M, Q6_K, Q3_K_M, Q2_K, IQ4_XS, IQ4_NL, IQ3_S, IQ3_M, Q4_0, MXFP4_MOE, ..."),
]  # fmt: skip
MtpType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="Type of the MTP blocks' matrices. Default: Q8_0, or TYPE if that is F32, F16 or BF16."
    ),
]
SplitMaxSize = Annotated[
    int | None,
    typer.Option(parser=parse_size, metavar="SIZE", help="Write llama.cpp splits of at most this size, e.g. 50G."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Worker threads. Default: all cores.")]
Memory = Annotated[
    int,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        show_default="2GiB",
        help="Memory for tensors in flight, whatever the model's size.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away and start anew.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Json = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")]
Gguf = Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file; of a split one, any of its files.")]
