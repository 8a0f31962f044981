"""Options that several commands share, and the parsing of sizes."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepgguf.cli.destinations import Destination
from stepgguf.files.byte_sizes import GIB
from stepgguf.quants import ImatrixPrior, KernelName
from stepgguf.reference import DeviceName

if TYPE_CHECKING:
    from stepgguf.convert.budget import Limits
    from stepgguf.convert.importance import Importance

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_CARDS = re.compile(r"\s*([0-9.]+\s*[KMGT]?i?B?)\s*(?:\*\s*([1-9][0-9]?))?\s*", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int) -> int:
    """Read a size in bytes: "50G" is 50 * 10^9 (as llama.cpp reads it), "50GiB" is 50 * 2^30. An int is a default."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise typer.BadParameter(f"{text!r} is not a size; write for example 50G or 2GiB")
    unit = match[2].upper()
    value = int(Fraction(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))
    if value <= 0:
        raise typer.BadParameter(f"{text!r}: a size must be positive")
    return value


def parse_bandwidth(text: str | int) -> int:
    """Read "233GB/s" in bytes per second; the "/s" may be left out."""
    return parse_size(text.removesuffix("/s") if isinstance(text, str) else text)


def parse_memory(text: str) -> int:
    """Read the size of RAM or of a card's memory, which is made in powers of two: "24GB" is 24 * 2^30 bytes."""
    n_bytes = parse_size(re.sub(r"(?<=[KMGT])B?$", "iB", text.strip(), flags=re.IGNORECASE))
    if n_bytes < GIB:
        raise typer.BadParameter(f"{text!r} is less than 1 GiB; write for example 24GB")
    return n_bytes


class Cards(tuple[int, ...]):
    """Bytes of memory of each card: "24GB*2" is two cards with 24 GiB each."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Cards:
        match = _CARDS.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"{text!r} names no cards; write for example 24GB, or 24GB*2 for two of them")
        return cls((parse_memory(match[1]),) * int(match[2] or 1))


ON_HUB = "on the Hugging Face Hub: hf:ORG/NAME[@REVISION][/FILE.gguf]"
DEFAULT_TYPE = "Q4_K_S"
Type = Annotated[
    str | None,
    typer.Option(
        "--type", "-t", metavar="TYPE", show_default=DEFAULT_TYPE,
        help="F32, F16, BF16, Q8_0, any llama.cpp mixture (Q4_K_M, Q4_K_S, Q5_K_M, Q6_K, Q3_K_M, Q2_K, IQ4_XS, "
        "IQ3_XXS, IQ2_XS, MXFP4_MOE, ...), a recipe (64gb, 96gb, 128gb, 192gb; see `stepgguf recipes`) or your .toml.",
    ),
]  # fmt: skip
Fit = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE",
        help="Choose each tensor's type so that all files fit, e.g. 104GiB, at the least predicted loss.",
    ),
]  # fmt: skip
TargetBpw = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        max=32,
        metavar="N",
        help="Choose the types for so many bits per weight, e.g. 4.2, in the same way as --fit.",
    ),
]
MinTps = Annotated[
    float | None,
    typer.Option(
        min=0.01, metavar="N",
        help="Choose types that are small enough for N tok/s at --bandwidth (one request, empty context).",
    ),
]  # fmt: skip
Bandwidth = Annotated[
    int | None,
    typer.Option(
        parser=parse_bandwidth,
        metavar="SIZE/s",
        help="Memory bandwidth that is reached in practice, e.g. 180GB/s (see plan).",
    ),
]
MtpType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", help="Type of the MTP blocks' matrices. Default: Q8_0, or TYPE if that is F32, F16 or BF16."
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix", exists=True, dir_okay=False, metavar="FILE",
        help="Importance matrix of `stepgguf imatrix` or llama-imatrix; each expert is quantized with its own row.",
    ),
]  # fmt: skip
ImatrixPriorOption = Annotated[
    ImatrixPrior,
    typer.Option(
        "--imatrix-prior",
        help="What experts that calibration hardly saw get: their layer's mean, or 1.0 as llama-quantize does.",
    ),
]  # fmt: skip
Kernel = Annotated[
    KernelName,
    typer.Option(help="Who encodes: stepgguf's kernels or ggml's; on x86 the bytes are the same."),
]
Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        "--calibrate", metavar="FILE",
        help="Choose each matrix's codes by what calibration text gives to it: less loss in the same types and bytes, "
        "at three passes over the model. Plain text, dialogues as .jsonl, or `default`; may be repeated.",
    ),
]  # fmt: skip
CalibrateTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="With --calibrate: at most about N tokens of the text.")
]
Costs = Annotated[
    Path | None,
    typer.Option(
        "--costs", dir_okay=False, metavar="FILE",
        help="With --fit: what each type costs each tensor. Read where the file is there; else --calibrate writes it, "
        "for other sizes.",
    ),
]  # fmt: skip
Device = Annotated[DeviceName, typer.Option(help="With --calibrate: where the model's products are computed.")]
SplitMaxSize = Annotated[
    int | None,
    typer.Option(parser=parse_size, metavar="SIZE", help="Write llama.cpp splits of at most this size, e.g. 50G."),
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Worker threads. Default: all cores.")]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        show_default="2GiB",
        help="Memory for tensors in flight, whatever the model's size. With --calibrate also for experts in work, else "
        "one for each thread.",
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        "--keep", file_okay=False, metavar="DIR",
        help="With SRC on the Hub: keep its files in this folder as they are read, each byte downloaded once, and "
        "compare each with the SHA-256 that the Hub lists.",
    ),
]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away and start anew.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Json = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")]
Dest = Annotated[
    Destination,
    typer.Argument(
        parser=Destination, metavar="DEST",
        help="The GGUF to write, or a folder/ for it, made if it is not there: then the file is named SRC-TYPE.gguf.",
    ),
]  # fmt: skip
Gguf = Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file; of a split one, any of its files.")]


def read_budget(
    fit: int | None, target_bpw: float | None, min_tps: float | None, bandwidth: int | None
) -> Limits | None:
    """What --fit, --target-bpw and --min-tps with --bandwidth say; None if none of them is given."""
    from stepgguf.convert.budget import Limits

    for option, value in (("--target-bpw", target_bpw), ("--min-tps", min_tps)):
        if value is not None and not math.isfinite(value):
            raise typer.BadParameter(f"{value} is not a number", param_hint=option)
    if (min_tps is None) != (bandwidth is None):
        given, lacking = ("--bandwidth", "--min-tps") if min_tps is None else ("--min-tps", "--bandwidth")
        raise typer.BadParameter(f"{given} needs {lacking}: together they say how much a token may read")
    if fit is None and target_bpw is None and min_tps is None:
        return None
    return Limits(fit, target_bpw, bandwidth / min_tps if bandwidth is not None and min_tps is not None else None)


def read_importance(path: Path | None, prior: ImatrixPrior) -> Importance | None:
    """What --imatrix and --imatrix-prior say; None without an importance matrix. ImatrixError for one that is none."""
    from stepgguf.convert.importance import Importance

    return None if path is None else Importance.read(path, prior)
