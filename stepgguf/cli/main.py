"""The command tree and the error boundary. Commands import what they need when they run, so --help is instant."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from stepgguf import __version__
from stepgguf.cli import (
    bench,
    card,
    chat,
    convert,
    demo,
    doctor,
    eval,
    help,
    imatrix,
    inspect,
    launch,
    llama_cpp_spellings,
    plan,
    quantize,
    recipes,
    report,
    rm,
    serve,
    setup,
    template,
    verify,
)
from stepgguf.cli import list as listing
from stepgguf.errors import StepggufError
from stepgguf.files import installed

# Packages that come with an extra and not with stepgguf itself.
EXTRAS = {
    "httpx2": "hub",
    "huggingface_hub": "hub",
    "fastapi": "run",
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
    cls=help.ReadableGroup,
    help="Step-3.5-Flash on your workstation: convert the published safetensors to a quantized GGUF in one pass, "
    "check it, chat with it and serve it.",
    epilog="Try it without any download: stepgguf demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    convert.convert,
    quantize.quantize,
    imatrix.imatrix,
    plan.plan,
    recipes.recipes,
    inspect.inspect,
    verify.verify,
    eval.eval,
    report.report,
    card.card,
    listing.list,
    rm.rm,
    template.template,
    chat.chat,
    serve.serve,
    launch.launch,
    setup.setup,
    doctor.doctor,
    bench.bench,
    demo.demo,
):  # in the order in which --help lists them
    theirs = launch.CONTEXT_SETTINGS if command is launch.launch else None
    app.command(cls=help.ReadableCommand, context_settings=theirs)(command)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"stepgguf {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]  # accepted anywhere before --
    arguments = [argument for argument in arguments[:end] if argument != "--debug"] + arguments[end:]
    _replace_unwritable()
    try:
        code = _run_command(arguments)
        sys.stdout.flush()
    except (StepggufError, ModuleNotFoundError, OSError) as error:
        explained = None if debug else _explain(error)
        if explained is None:
            raise
        return explained
    return code


def _run_command(arguments: Sequence[str]) -> int:
    """Run one command; its exit code. Wrong usage has been explained on stderr."""
    theirs = llama_cpp_spellings.explain_spelling(arguments)
    if theirs is not None:
        _show_error(*theirs)
        return 2
    try:
        app(args=arguments, prog_name="stepgguf")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    return 0


def _explain(error: StepggufError | ModuleNotFoundError | OSError) -> int | None:
    """Show what an error says and return the exit code; None for one that only its traceback explains."""
    if isinstance(error, StepggufError):
        return _show_error(error.message, error.hint)
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            return None
        command = "stepgguf setup" if extra == "run" else installed.extra_command(extra)
        return _show_error(f"this needs {error.name}, which is not installed", command)
    if error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):  # stdout's: a file would be named
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        return 1 if error.errno == errno.EPIPE else _show_error(f"standard output: {error.strerror}", None)
    return _show_error(f"{error.filename or 'a file'}: {error.strerror or error}", None)


def _show_error(message: str, hint: str | None) -> int:
    """Show an error and return the exit code of one."""
    from stepgguf.cli import output

    output.error(message, hint)
    return 1


def _replace_unwritable() -> None:
    """A terminal of another encoding shows a question mark for what it lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run() -> None:
    """The console script. What was closed before it started takes everything and gives nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the end
    sys.exit(main())
