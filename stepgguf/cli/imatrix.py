"""stepgguf imatrix: how strongly each input channel of each matrix and expert is driven, measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments, output
from stepgguf.cli.destinations import Destination
from stepgguf.reference import DeviceName


def imatrix(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help=f"A checkpoint, or a GGUF of any type; of a split one any file; {arguments.ON_HUB}.",
        ),
    ],
    dest: Annotated[
        Destination,
        typer.Option("--output", "-o", parser=Destination, metavar="FILE.gguf", help="The importance matrix to write."),
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, show_default=False,
            help='Plain text; or dialogues as .jsonl, one a line: {"messages": [...], "tools": [...]}. Default: the '
            "texts that come with stepgguf.",
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=16, max=2**17, metavar="N", help="Tokens that are read from an empty context.")
    ] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most N chunks of the text.")] = None,
    balance: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N",
            help="Run the text in growing parts until each expert has seen N tokens, or the text ends; each part reads "
            "the model once.",
        ),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where products are computed.")] = "cpu",
    threads: arguments.Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes, and run nothing.")] = False,
    overwrite: arguments.Overwrite = False,
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:  # fmt: skip
    """Record an importance matrix (imatrix), also of a model that does not fit into memory.

    The layers are read one after the other, each once, and all text passes through each. The file is llama-imatrix's,
    with the MTP blocks in it: convert, quantize and llama-quantize read it. Interrupt it as you like: the same command
    goes on after the last whole layer.

    Examples:

    - `stepgguf imatrix Step-3.5-Flash/ -o imatrix.gguf`
    - `stepgguf imatrix Step-3.5-Flash/ wiki.txt chats.jsonl -o imatrix.gguf --balance 1000`
    - `stepgguf imatrix step-q8_0.gguf wiki.txt -o imatrix.gguf --chunks 100 --dry-run`
    """
    from stepgguf.calibration.text import TextReader, default_texts
    from stepgguf.cli.recording import ImatrixRun
    from stepgguf.convert.sources.full_hparams import full_hparams
    from stepgguf.convert.sources.opening import open_source
    from stepgguf.convert.writer import is_taken, name_taken
    from stepgguf.reference.device import open_device
    from stepgguf.reference.weights import WeightReader

    place, paths = open_device(device, threads), texts or default_texts()
    with open_source(source) as opened:
        target = dest.file_path(f"{opened.name}-imatrix")
        if is_taken(target) and not (overwrite or dry_run):
            raise name_taken(target)
        reader = WeightReader(opened, full_hparams(opened), place)
        rows = TextReader(opened, chunk).read(paths)[:chunks]
        run = ImatrixRun(reader, rows, [path.name for path in paths], target, quiet=quiet)
        if not quiet:
            run.say_what_it_takes()
        if not dry_run:
            dest.make_folder()
        found = None if dry_run else run.record(balance)
    if json:
        output.print_json(run.plan_report() | (found.report() if found is not None else {}))
    if found is not None:
        found.show(quiet=quiet or json)
