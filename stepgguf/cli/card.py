"""stepgguf card: the model card of a GGUF repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments
from stepgguf.cli.destinations import Destination


def _parse_hub_id(text: str) -> str:
    from stepgguf.convert.sources.hub import is_hub_id

    if not is_hub_id(text):
        raise typer.BadParameter(
            f"{text!r} is no name on the Hugging Face Hub; write for example me/Step-3.5-Flash-GGUF"
        )
    return text


def card(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE.gguf...", help="The GGUF files of the repository; of a split one, any part."),
    ],
    page: Annotated[
        Destination | None,
        typer.Option(
            "--output",
            "-o",
            parser=lambda text: Destination(text, ".md"),
            metavar="README.md",
            help="Where the card goes; a folder/ is made. Default: README.md beside the first file.",
        ),
    ] = None,
    evaluated: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="RESULT.json",
            help="Show this result of `stepgguf eval -o`; repeat it for each file. Others are shown to compare with.",
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(parser=_parse_hub_id, metavar="USER/NAME", help="The repository in which the files will be."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            parser=_parse_hub_id,
            metavar="ORG/NAME",
            help="The model that was quantized. Default: what the files say, if they do.",
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    quiet: arguments.Quiet = False,
) -> None:
    """Write the README.md of a GGUF repository: front matter, files with size and loss, what fits where, checksums.

    It says what the files and their manifests say: licence, languages, base model, type, recipe, importance matrix,
    calibration. A file's SHA-256 is computed once, and kept in its manifest. The command that publishes all of it is
    shown at the end; nothing is sent anywhere.

    Examples:

    - `stepgguf card step-q4_k_s.gguf --repo me/Step-3.5-Flash-GGUF`
    - `stepgguf card step-q4_k_s.gguf step-iq4_xs.gguf -o README.md --eval q4_k_s.json --eval iq4_xs.json`
    - `stepgguf card step-00001-of-00003.gguf --base-model stepfun-ai/Step-3.5-Flash --overwrite`
    """
    from stepgguf.cli import output
    from stepgguf.cli.progress import ProgressMeter
    from stepgguf.convert.manifest import file_sha256, manifest_path
    from stepgguf.errors import OutputError
    from stepgguf.files import disk
    from stepgguf.report.card import read_card_data
    from stepgguf.report.card_text import render_card, upload_commands

    target = page.file_path("README") if page else paths[0].with_name("README.md")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists", hint="Choose another name with -o or replace it with --overwrite.")
    data = read_card_data(paths, evaluated or [], repo=repo, source=base_model)
    headers = [header for file in data.files for header in file.headers]
    total = sum(file.n_bytes for file in data.files)
    with ProgressMeter("SHA-256", total, quiet=quiet) as meter:
        digests = {header.path: file_sha256(header, meter.add_bytes) for header in headers}
    if page is not None:
        page.make_folder()
    with disk.disk_errors(target):
        disk.replace(target, render_card(data, digests).encode())
    if data.provenance.source is None:
        output.warn(["the files do not say which model on the Hub they are made of: give it with --base-model"])
    if quiet:
        return
    output.note(f"wrote {target}")
    manifests = [path for path in map(manifest_path, digests) if path.exists()]
    output.note("read it, then publish it with the files:")
    for line in upload_commands(data, target, manifests):
        output.note(f"  {line}")
    if repo is None:
        output.note("USER is to be replaced by your name there; --repo USER/NAME writes it into the card too")
