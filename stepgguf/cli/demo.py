"""stepgguf demo: the whole way with the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepgguf.cli import engine_options, loading

QUESTION = "How many 'r's are in the word strawberry?"


def demo(
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Stay in chat afterwards.")] = False,
    type: Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help="A llama.cpp mixture.")] = "Q4_K_M",
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

    from stepgguf.chat.exchange import ChatModel
    from stepgguf.cli import output
    from stepgguf.cli.answering import answer_once, open_view
    from stepgguf.cli.conversion import Conversion, RunOptions
    from stepgguf.cli.dialogue import Dialogue
    from stepgguf.cli.terminal.screen import Screen
    from stepgguf.conversation.inprocess import InProcessBackend
    from stepgguf.conversation.records import ChatSettings
    from stepgguf.conversation.session import Session
    from stepgguf.convert.plan import Options
    from stepgguf.convert.planner import plan_source
    from stepgguf.convert.sources.checkpoint import Checkpoint
    from stepgguf.demo import CHECKPOINT
    from stepgguf.quants.recipe_files import load_recipe
    from stepgguf.quants.type_names import check_type_name

    with tempfile.TemporaryDirectory(prefix="stepgguf-demo-") as folder:
        options = Options(load_recipe(check_type_name(type)), name="stepgguf demo")
        path = keep or Path(folder) / f"demo-{options.recipe.name}.gguf"
        with Checkpoint(CHECKPOINT) as checkpoint:
            how = RunOptions(restart=True, overwrite=True)
            conversion = Conversion(plan_source(checkpoint, path, options), checkpoint, how)
            output.note(f"The plan: what each tensor of the embedded model becomes in a {options.recipe.name} file.\n")
            output.note(f"{conversion.plan_text()}\n\nConverting it.\n")
            conversion.execute()
        output.note("\nLoading the file into llama.cpp, and asking the model a question.")
        with loading.open_engine(path, engine_options.EngineOptions(), command="chat", quiet=False) as engine:
            session = Session(InProcessBackend(ChatModel(engine)), ChatSettings({"temperature": 0.0}))
            view = open_view(reasoning_display="full")
            output.note(f"\n> {QUESTION}")
            sys.stderr.flush()
            answer_once(session, QUESTION, view, quiet=False)
            if interactive and isinstance(view, Screen):
                Dialogue(session, view, Path(folder), history=None).run()
