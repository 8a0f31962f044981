"""stepgguf report: the picture of a quantized file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.cli.destinations import Destination
from stepgguf.files.byte_sizes import readable_size


def report(
    path: arguments.Gguf,
    page: Annotated[
        Destination | None,
        typer.Option(
            "--output",
            "-o",
            parser=lambda text: Destination(text, ".html"),
            metavar="PAGE.html",
            help="Where the page goes; a folder/ is made. Default: FILE.gguf.report.html, beside the file.",
        ),
    ] = None,
    evaluated: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="RESULT.json",
            help="Draw this result of `stepgguf eval -o`; repeat it for each file, stock ones too.",
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:
    """Draw a file: the error of every expert and layer, who stands out, where its bytes are, its types by layer.

    One HTML page with everything in it, to look at offline and to publish with the file. What was measured comes from
    the manifest beside the file; without one there are types and sizes.

    Examples:

    - `stepgguf report step-q4_k_s.gguf`
    - `stepgguf report step-q4_k_s.gguf -o index.html --overwrite`
    - `stepgguf report step-q4_k_s.gguf --json`
    - `stepgguf report step-q4_k_s.gguf --eval q4_k_s.json --eval stock-q4_k_s.json`
    """
    from stepgguf.cli import output
    from stepgguf.errors import OutputError
    from stepgguf.files import disk
    from stepgguf.files.disk import disk_errors
    from stepgguf.report import figures, measured
    from stepgguf.report.frontier import read_frontier
    from stepgguf.report.page import render_page

    subject = measured.read_file(path)
    target = page.file_path(f"{path.name}.report") if page else path.with_name(f"{path.name}.report.html")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="Choose another name with -o or replace it with --overwrite.")
    text = render_page(subject, read_frontier(evaluated or []))
    if page is not None:
        page.make_folder()
    with disk_errors(target):
        disk.replace(target, text.encode())
    if json:
        output.print_json({"page": str(target), **figures.summary(subject)})
    if not quiet:
        output.note(f"wrote {target} ({readable_size(len(text.encode()))})")
