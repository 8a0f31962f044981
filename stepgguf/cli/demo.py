"""stepgguf demo: the whole way with the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import arguments

QUESTION = "How many 'r's are in the word strawberry?"


def demo(
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Stay in chat afterwards.")] = False,
    type: arguments.Type = "Q4_K_M",
    keep: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the GGUF under this name.")] = None,
) -> None:
    """Convert the embedded model (a genuine, small, trained Step-3.5) and ask it a question.

    Examples:

    - `stepgguf demo`
    - `stepgguf demo --interactive`
    - `stepgguf demo --keep small.gguf`
    """
    import sys
    import tempfile

    from stepgguf.chat.session import Session
    from stepgguf.cli import output
    from stepgguf.cli.converting import Run
    from stepgguf.cli.dialogue import converse, load, one_shot
    from stepgguf.convert.checkpoint import Checkpoint
    from stepgguf.convert.plan import Options, plan_checkpoint
    from stepgguf.demo import CHECKPOINT
    from stepgguf.quants.mixtures import check_name

    with tempfile.TemporaryDirectory(prefix="stepgguf-demo-") as folder:
        options = Options(check_name(type), name="stepgguf demo")
        path = keep or Path(folder) / f"demo-{options.type_name}.gguf"
        with Checkpoint(CHECKPOINT) as checkpoint:
            run = Run(plan_checkpoint(checkpoint, path, options), checkpoint)
            output.note(f"{run.plan_text()}\n")
            run.execute(restart=True, overwrite=True, threads=None, memory=2 * 2**30)
        with load(path, ctx=None, gpu_layers=-1, threads=None, quiet=False) as engine:
            from dataclasses import replace

            session = Session(engine, replace(engine.info.sampling, temperature=0.0))
            output.note(f"\n> {QUESTION}")
            sys.stderr.flush()
            one_shot(session, QUESTION, show_reasoning=True, quiet=False)
            if interactive:
                converse(session, show_reasoning=True, hint="/new starts over, /exit or Ctrl+D leaves")
