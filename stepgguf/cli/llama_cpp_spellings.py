"""What users of llama.cpp's tools write, and what to write here instead."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import takewhile

_RECIPE = "a recipe says it: see `stepgguf recipes`"
_KEPT = "nothing: the metadata is the source's"
_QUANTIZING = {
    "--outtype": "--type TYPE",
    "-o": "DEST, the second argument, without an option",
    "--outfile": "DEST, the second argument, without an option",
    "--ftype": "--type TYPE",
    "--verbose": "nothing: progress is shown without it",
    "--no-lazy": "nothing: memory is bounded by --memory SIZE",
    "--use-temp-file": "nothing: there is no intermediate file",
    "--split-max-tensors": "--split-max-size SIZE",
    "--pure": 'a recipe with a default: default = "Q4_K"',
    "--leave-output-tensor": _RECIPE,
    "--output-tensor-type": _RECIPE,
    "--token-embedding-type": _RECIPE,
    "--tensor-type": _RECIPE,
    "--tensor-type-file": _RECIPE,
    "--custom-q": _RECIPE,
    "--include-weights": "nothing: the matrix of --imatrix counts for every tensor that it has",
    "--exclude-weights": "nothing: the matrix of --imatrix counts for every tensor that it has",
    "--keep-split": "--split-max-size SIZE",
    "--override-kv": _KEPT,
    "--model-name": _KEPT,
    "--mtp-only": "nothing: the MTP blocks stay where the source has them",
    "--no-mtp": "nothing: the MTP blocks stay where the source has them",
    "--nthread": "--threads N",
    "--nthreads": "--threads N",
}
_CONVERTING = _QUANTIZING | {
    "--model-name": "--name NAME",
    "--vocab-only": "nothing: a model always comes whole",
    "--remote": "the folder of a downloaded checkpoint as SRC",
    "--metadata": "--name NAME, and what the checkpoint's README.md says",
    "--mtp-only": "--mtp separate",
    "--no-mtp": "--mtp drop",
}
_RUNNING = {
    "--ctx-size": "--ctx N",
    "-ngl": "--gpu-layers N",
    "--n-gpu-layers": "--gpu-layers N",
    "-ncmoe": "--n-cpu-moe N",
    "-cmoe": "--n-cpu-moe 999",
    "--cpu-moe": "--n-cpu-moe 999",
    "-ot": "--override-tensor REGEX=BUFFER",
    "-ts": "--tensor-split N,N",
    "-sm": "--split-mode none|layer|row|tensor",
    "-mg": "--main-gpu N",
    "-ctk": "--cache-type-k TYPE",
    "-ctv": "--cache-type-v TYPE",
    "-fa": "--flash-attn auto|on|off",
    "-ub": "--ubatch N",
    "--ubatch-size": "--ubatch N",
    "--batch-size": "--batch N with --engine llama-server, --ubatch N without",
    "--fit": "nothing: what is not set is chosen so that it fits",
}
OPTIONS = {"convert": _CONVERTING, "quantize": _QUANTIZING, "chat": _RUNNING, "serve": _RUNNING}


def explain_spelling(arguments: Sequence[str]) -> tuple[str, str] | None:
    """Message and hint for a command line as llama.cpp's tools take it: an option, or the place of an argument.

    None if there is nothing of theirs in it.
    """
    if not arguments or arguments[0] not in OPTIONS:
        return None
    if arguments[0] == "convert" and (found := _explain_place(arguments)) is not None:
        return found
    for argument in arguments[1:]:
        option = argument.partition("=")[0]
        if option == "--":
            return None
        if option in OPTIONS[arguments[0]]:
            return f"{option} is an option of llama.cpp's tools", f"Here it is {OPTIONS[arguments[0]][option]}."
    return None


def _explain_place(arguments: Sequence[str]) -> tuple[str, str] | None:
    """The same for `convert FILE.gguf`, and for `convert SRC DEST TYPE`, as quantize has it."""
    leading = list(takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
    if len(leading) == 1 and leading[0].lower().endswith(".gguf"):
        command = shlex.join(["stepgguf", "quantize", leading[0], "DEST.gguf", "--type", "Q4_K_S"])
        return f"{leading[0]} is a GGUF file and no checkpoint", f"It is converted already; to quantize it: {command}"
    if len(leading) == 3:
        command = shlex.join(["stepgguf", "convert", *leading[:2], "--type", leading[2]])
        return f"convert takes SRC and DEST, and there is {leading[2]!r} too", f"If it is the type: {command}"
    return None
