"""stepgguf eval: how far a quantized file is from the original."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments, engine_options, eval_table, evaluating, logit_sources, memory_options, output
from stepgguf.reference import DeviceName


def eval(
    path: arguments.Gguf,
    against: Annotated[
        Path,
        typer.Option(
            metavar="SRC|FILE|BASE",
            help="The original: a checkpoint, a GGUF, or what --base or llama-perplexity kept of one; "
            f"{arguments.ON_HUB}.",
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A text, or chats as .jsonl; may be repeated. Default: those of a BASE, else a short text and "
            "dialogues that come with stepgguf and are in no text for calibration.",
        ),
    ] = None,
    ctx: Annotated[
        list[int] | None,
        typer.Option(
            min=8, max=2**20, metavar="N", show_default="512 and 2048",
            help="Tokens of context in which the text is read; may be repeated. In 512 this model never leaves its "
            "sliding window.",
        ),
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most N rows of each column.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what the original says here, for the next file's --against; llama-perplexity reads it too, "
            "unless --top-k made it small.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K",
            help="Keep the K likeliest tokens and one bin for the rest, e.g. 256: 2 KB a prediction and not 258 KB; "
            "KL divergence is then a lower bound.",
        ),
    ] = None,
    result: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RESULT.json", help="Write the figures here, for report --eval."),
    ] = None,
    overwrite: arguments.Overwrite = False,
    engine: Annotated[
        logit_sources.EngineName | None,
        typer.Option(
            show_default="llama-cpp-python, if installed",
            help="What runs a GGUF: llama.cpp; or a stream, layer by layer in float32, as checkpoints always are: it "
            "shows what the weights lose, without llama.cpp's 8-bit activations, and the file need not fit in memory.",
        ),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where a stream computes.")] = "cpu",
    gpu_layers: memory_options.GpuLayers = None,
    threads: arguments.Threads = None,
    force: engine_options.Force = False,
    quiet: arguments.Quiet = False,
    json: arguments.Json = False,
) -> None:  # fmt: skip
    """Measure the perplexity of a file and its KL divergence from the original, as llama-perplexity defines them.

    Columns: the text in each context, random tokens, dialogues. Random tokens are drawn uniformly from the vocabulary,
    always the same: a column unlike all that calibration shows. A checkpoint is read layer by layer and need not fit in
    memory, and so is a GGUF that does not fit; with --base, the same command goes on after an interruption.

    Examples:

    - `stepgguf eval step-q4_k_s.gguf --against Step-3.5-Flash/ --base step.base`
    - `stepgguf eval step-q3_k_m.gguf --against step.base -o q3_k_m.json`
    - `stepgguf eval step-q3_k_m.gguf --against step.base --engine stream --device cuda`
    - `stepgguf eval step-q4_k_s.gguf --against step-q8_0.gguf --text wiki.txt --text chats.jsonl --top-k 256`
    """
    from stepgguf.evaluation.reference_file import is_reference
    from stepgguf.files import disk

    for target in (base, result):
        if target is not None:
            evaluating.require_free(target, overwrite)
    tokenizer = evaluating.read_tokenizer(path)
    chosen = logit_sources.choose_engine(engine, quiet=quiet)
    options = logit_sources.RunOptions(chosen, device, gpu_layers, threads, force, quiet)
    with logit_sources.place_at(result) as file_place:
        if is_reference(against):
            if base is not None or top_k is not None:
                option = "--top-k" if base is None else "--base"
                raise typer.BadParameter("--against is a BASE already", param_hint=option)
            choose = evaluating.chooser(tokenizer, text, ctx, chunks)
            figures = evaluating.compare(path, file_place, against, str(against), choose, tokenizer, options)
        else:
            columns = evaluating.read_columns(tokenizer, text, ctx, chunks)
            with logit_sources.place_at(base) as kept:
                evaluating.keep(against, kept, columns, tokenizer, top_k or 0, options)
                figures = evaluating.compare(path, file_place, kept.file, str(against), list, tokenizer, options)
    if json:
        output.print_json(figures)
    else:
        eval_table.print_table(figures)
    if result is not None:  # a full disk then loses no figures
        with disk.disk_errors(result):
            disk.replace(result, (dumps(figures, indent=1) + "\n").encode())
