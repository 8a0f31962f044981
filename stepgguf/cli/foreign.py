"""Options of llama.cpp's tools that are called otherwise here: what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

_RECIPE = "a recipe says it: see `stepgguf recipes`"
_CONVERTING = {
    "--outtype": "--type TYPE",
    "-o": "DEST, the second argument, without an option",
    "--outfile": "DEST, the second argument, without an option",
    "--ftype": "--type TYPE",
    "--model-name": "--name NAME",
    "--verbose": "nothing: progress is shown without it",
    "--no-lazy": "nothing: memory is bounded by --memory SIZE",
    "--use-temp-file": "nothing: there is no intermediate file",
    "--vocab-only": "nothing: a model always comes whole",
    "--split-max-tensors": "--split-max-size SIZE",
    "--remote": "the folder of a downloaded checkpoint as SRC",
    "--metadata": "--name NAME, and what the checkpoint's README.md says",
    "--mtp-only": "--mtp separate",
    "--no-mtp": "--mtp drop",
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
    "--override-kv": "nothing: the metadata is the source's",
    "--nthread": "--threads N",
    "--nthreads": "--threads N",
}
OPTIONS = {"convert": _CONVERTING, "quantize": _CONVERTING}


def answer(arguments: Sequence[str]) -> tuple[str, str] | None:
    """Message and hint for the first option of another tool's; None if there is none."""
    if not arguments or arguments[0] not in OPTIONS:
        return None
    for argument in arguments[1:]:
        option = argument.partition("=")[0]
        if option == "--":
            return None
        if option in OPTIONS[arguments[0]]:
            return f"{option} is an option of llama.cpp's tools", f"Here it is {OPTIONS[arguments[0]][option]}."
    return None
