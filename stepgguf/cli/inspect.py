"""stepgguf inspect: what is in a GGUF or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepgguf.cli import arguments
from stepgguf.files.byte_sizes import readable_size

if TYPE_CHECKING:
    from stepgguf.convert.sources.place import Place
    from stepgguf.files.gguf_header import Header
    from stepgguf.model.layers import Layer


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help=f"A GGUF file (of a split one, any) or a checkpoint directory; {arguments.ON_HUB}.",
        ),
    ],
    json: arguments.Json = False,
) -> None:
    """Show metadata, types folded by layer, sizes and bits per weight.

    Examples:

    - `stepgguf inspect step-q4_k_s.gguf`
    - `stepgguf inspect Step-3.5-Flash-FP8/`
    - `stepgguf inspect step-q4_k_s.gguf --json`
    """
    from stepgguf.cli import output
    from stepgguf.convert.fold import fold_tensors

    contents, metadata, tensors = _read_files(path)
    lines = fold_tensors(tensors)
    n_bytes, n_values = sum(line.n_bytes for line in lines), sum(line.n_values for line in lines)
    summary = {
        "tensors": len(tensors),
        "values": n_values,
        "bytes": n_bytes,
        "bpw": round(n_bytes * 8 / max(1, n_values), 4),
    }
    if json:
        folded = [output.line_report(line) for line in lines]
        output.print_json({"path": str(path), "contents": contents, "metadata": metadata, "folded": folded, **summary})
        return
    width = max((len(_shorten(key)) for key in metadata), default=0)
    output.print_lines(f"{_shorten(key):<{width}}  {_shorten(value)}" for key, value in metadata.items())
    table = ["", *(row.plain for row in output.tensor_table(lines))] if lines else [""]
    total = (
        f"{len(tensors)} tensors, {n_values / 1e9:.3f} B values, {readable_size(n_bytes)} "
        f"({n_bytes / 1e9:.2f} GB), {summary['bpw']:.3f} bpw"
    )
    output.print_lines([*table, contents, total])


Tensors = list[tuple[str, str, int, int, str]]  # name, type, bytes, values, and no reason: as fold_tensors takes them


def _read_files(path: Path) -> tuple[str, dict[str, Any], Tensors]:
    from stepgguf.convert.sources.gguf_files import GGUFFiles
    from stepgguf.convert.sources.opening import open_files

    found = open_files(path)
    if not isinstance(found, GGUFFiles):
        return _read_checkpoint(found)
    with closing(found):
        return _read_gguf(found.headers)


def _read_gguf(headers: Sequence[Header]) -> tuple[str, dict[str, Any], Tensors]:
    """What any GGUF holds, its keys and its tensors; of another architecture too."""
    metadata = {name: key.value for name, key in headers[0].keys.items()}
    tensors = [(t.name, t.ggml_type.name, t.n_bytes, t.n_values, "") for h in headers for t in h.tensors]
    return gguf_contents(metadata, [name for name, *_ in tensors]), metadata, tensors


def gguf_contents(metadata: Mapping[str, Any], names: Sequence[str]) -> str:
    """What a GGUF holds, in a sentence."""
    from stepgguf.cli.output import counted
    from stepgguf.model.hparams import ARCHITECTURE
    from stepgguf.model.names import TensorName

    contents, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if contents != "model":  # an adapter, a vision tower, an importance matrix
        return f"a GGUF of type {_shorten(contents)}, which is no model that runs alone"
    if architecture != ARCHITECTURE:
        return f"a model of architecture {_shorten(architecture)}; stepgguf quantizes and runs {ARCHITECTURE} alone"
    if not names:
        return "metadata alone: no tensors"
    mtp = {TensorName(name).layer for name in names if ".nextn." in name}
    trunk = {layer for name in names if (layer := TensorName(name).layer) is not None} - mtp
    if mtp and not trunk:
        return f"{counted(len(mtp), 'MTP block')} alone, to be used with the file that holds the model's layers"
    return f"{counted(len(trunk), 'layer')} and {counted(len(mtp), 'MTP block')}"


def _read_checkpoint(place: Place) -> tuple[str, dict[str, Any], Tensors]:
    """What a checkpoint holds, its hparams and its tensors by the names that they get in a GGUF."""
    from stepgguf.cli import output
    from stepgguf.convert.sources.checkpoint import Checkpoint

    with Checkpoint(place) as checkpoint:
        output.warn(checkpoint.notes)
        hp = checkpoint.hparams
        metadata: dict[str, Any] = {"name": checkpoint.name}
        metadata |= {field: getattr(hp, field) for field in hp.__slots__ if field != "layers"}
        metadata["rope_scaling"] = str(hp.rope_scaling)
        metadata["layers"] = [_layer_words(layer) for layer in hp.layers]
        tensors: Tensors = []
        for spec in checkpoint.specs:
            stored = checkpoint.tensors[spec.source]
            tensors.append((spec.name, stored.dtype, stored.n_bytes, math.prod(spec.shape), ""))
    contents = f"a checkpoint of {output.counted(hp.n_layer, 'layer')} and {output.counted(hp.n_mtp, 'MTP block')}"
    return contents, metadata, tensors


def _layer_words(layer: Layer) -> str:
    """ "moe sliding", "mtp dense full"."""
    network = "moe" if layer.is_moe else "dense"
    return f"{'mtp ' if layer.is_mtp else ''}{network} {'sliding' if layer.is_sliding else 'full'}"


def _shorten(value: Any) -> str:
    """The value in one line that a terminal can show: long lists and texts are cut, control characters are escaped."""
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} items: {', '.join(map(_shorten, value[:6]))}, ..."
    text = str(value)
    cut = text if len(text) <= 110 else f"{text[:100]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)
