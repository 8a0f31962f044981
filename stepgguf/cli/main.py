"""The command tree and the error boundary. Commands import what they need when they run, so --help is instant."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from stepgguf import __version__
from stepgguf.cli import bench, chat, convert, demo, doctor, inspect, plan, quantize, report, serve, template, verify
from stepgguf.errors import StepggufError

# Packages that come with an extra and not with stepgguf itself.
EXTRAS = {
    "fastapi": "run",
    "jinja2": "run",
    "llama_cpp": "run",
    "prometheus_client": "run",
    "prompt_toolkit": "run",
    "uvicorn": "run",
    "safetensors": "reference",
    "tokenizers": "reference",
    "torch": "reference",
}

app = typer.Typer(
    name="stepgguf",
    help="Step-3.5-Flash on your workstation: convert the published safetensors to a quantized GGUF in one pass, "
    "check it, chat with it and serve it.",
    epilog="Try it without any download: stepgguf demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("report")(report.report)
app.command("template")(template.template)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"stepgguf {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # accepted anywhere on the line
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="stepgguf")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except StepggufError as error:
        if debug:
            raise
        from stepgguf.cli import output

        output.error(error.message, error.hint)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if debug or extra is None:
            raise
        from stepgguf.cli import output

        output.error(f"this needs {error.name}, which is not installed", f"pip install 'stepgguf[{extra}]'")
        return 1
    except BrokenPipeError:  # whoever read what we print has seen enough
        return 1
    except OSError as error:
        if debug:
            raise
        from stepgguf.cli import output

        output.error(f"{error.filename or 'standard output'}: {error.strerror or error}", None)
        return 1
    return 0


def run() -> None:
    """The console script. Streams that are closed take everything, and an ASCII terminal gets what it lacks spelled."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: the output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left must not be tried again at the end
    sys.exit(code)
