"""What is known of a finished file: its tensors, and what quantizing measured of each.

    FILE.gguf                 header: names, shapes, types, sizes, n_expert and n_used     the truth about the file
    FILE.gguf.manifest.json   how it was made, and tensors[name].ledger                    what was measured

The manifest may be missing, as beside a file that other tools made: then nothing is measured, and the header says how
it was made as far as llama-quantize writes it there.

A ledger (convert/ledger.py) has one figure for each expert, one in all for a tensor without experts; w is the
importance of a channel, 1 without an imatrix, x a weight and q what became of it:

    error  sum w (x - q)^2 / sum w x^2       rmse   sqrt(mean (x - q)^2)
    mass   sum of w over the channels        count  calibration tokens that the expert saw      both: with imatrix only
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.manifest import manifest_path, read_manifest
from stepgguf.convert.metadata import recorded_type
from stepgguf.convert.sources.splits import read_headers
from stepgguf.errors import UnsupportedModel, VerifyError
from stepgguf.files.gguf_header import Header, TensorInfo
from stepgguf.model.hparams import ARCHITECTURE, HParams
from stepgguf.model.names import TensorName

Floats = NDArray[np.float64]
ROUTED, SHARED, ATTENTION, DENSE = "routed experts", "shared experts", "attention", "dense FFN"
EMBEDDINGS, OUTPUT, MTP, OTHER = "embeddings", "output", "MTP", "other"
GROUPS = (ROUTED, SHARED, ATTENTION, DENSE, EMBEDDINGS, OUTPUT, MTP, OTHER)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was measured of a tensor, float64 [n_expert or 1] each; NaN where there is no figure."""

    error: Floats
    rmse: Floats
    mass: Floats | None
    count: Floats | None


@dataclass(frozen=True, slots=True)
class MeasuredTensor:
    """One tensor of the file.

    layer: None outside the layers. role: its name without layer and ending, as the page shows it.
    group: one of GROUPS. ledger: None if the tensor was not quantized or not measured.
    """

    info: TensorInfo
    layer: int | None
    role: str
    group: str
    ledger: Ledger | None

    @property
    def type_name(self) -> str:
        return self.info.ggml_type.name

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.info.n_bytes / self.info.n_values


@dataclass(frozen=True, slots=True)
class ImatrixOrigin:
    """Where the importance came from, as far as the manifest says."""

    file: str | None
    prior: str | None
    datasets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasuredFile:
    """A finished GGUF; a split one with all its files.

    n_layer: layers of the trunk; those behind them are MTP blocks. n_used: routed experts that a token uses.
    without_manifest: those of the files that have none.
    """

    paths: tuple[Path, ...]
    name: str
    n_layer: int
    n_expert: int
    n_used: int
    tensors: tuple[MeasuredTensor, ...]
    without_manifest: tuple[Path, ...]
    made_by: str | None
    type: str | None
    source: str | None
    recipe: str | None
    imatrix: ImatrixOrigin | None


_DAMAGED_HINT = "Fetch the manifest again, or remove it: types and sizes are shown without."


def read_file(path: Path) -> MeasuredFile:
    """Read the headers and manifests of a GGUF; of a split one `path` may be any file.

    Raises GGUFError if it is no GGUF file, UnsupportedModel if it is of another architecture, VerifyError if a manifest
    is damaged or is of another file.
    """
    headers = read_headers(path)
    manifests = [_read_own_manifest(header.path) for header in headers]
    first, how = headers[0], manifests[0] or {}  # every part's manifest says the same of how it was made
    architecture = first.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedModel(
            f"{path}: general.architecture is {architecture!r}, expected {ARCHITECTURE!r}",
            hint="stepgguf reports on Step-3.5 and Step-3.7 files only.",
        )
    hp = HParams.from_gguf(first)
    return MeasuredFile(
        paths=tuple(header.path for header in headers),
        name=str(first.get("general.name", first.path.stem)),
        n_layer=hp.n_layer,
        n_expert=hp.n_expert,
        n_used=hp.n_expert_used,
        tensors=tuple(
            _measured_tensor(info, manifest and manifest["tensors"], hp.n_layer, manifest_path(header.path))
            for header, manifest in zip(headers, manifests, strict=True)
            for info in header.tensors
        ),
        without_manifest=tuple(h.path for h, manifest in zip(headers, manifests, strict=True) if manifest is None),
        made_by=_text_member(how, "made_by"),
        type=_text_member(how, "type") or recorded_type(first),
        source=_text_or_none(first.get("stepgguf.source")),
        recipe=_text_member(how, "recipe"),
        imatrix=_manifest_imatrix(how.get("imatrix")) or _header_imatrix(first),
    )


def _read_own_manifest(file: Path) -> dict[str, Any] | None:
    return read_manifest(file, _DAMAGED_HINT) if manifest_path(file).exists() else None


def _measured_tensor(info: TensorInfo, entries: dict[str, Any] | None, n_layer: int, path: Path) -> MeasuredTensor:
    entry = None if entries is None else entries.get(info.name)
    if not isinstance(entry, dict):
        entry = {}
    found, expected = [entry.get("type"), entry.get("shape")], [info.ggml_type.name, [*info.shape]]
    if entries is not None and found != expected:
        raise VerifyError(
            f"{path}: {info.name} is {found}, the file has {expected}",
            hint="The manifest is of another file; fetch the one that was made with this file.",
        )
    name, ledger = TensorName(info.name), None
    if entry.get("ledger") is not None:
        n_experts = info.shape[0] if len(info.shape) == 3 else 1
        ledger = _read_ledger(entry["ledger"], n_experts, f"{path}: the ledger of {info.name}")
    return MeasuredTensor(info, name.layer, name.stem, _group_of(name, len(info.shape), n_layer), ledger)


def _group_of(name: TensorName, n_dims: int, n_layer: int) -> str:
    role = name.role
    if name.is_mtp(n_layer):
        return MTP
    if role in ("token_embd", "output"):
        return EMBEDDINGS if role == "token_embd" else OUTPUT
    if name.is_expert or role.endswith("_shexp"):
        return ROUTED if name.is_expert else SHARED
    if n_dims < 2 or role == "ffn_gate_inp":
        return OTHER
    return ATTENTION if role.startswith("attn_") else DENSE if role.startswith("ffn_") else OTHER


def _read_ledger(raw: Any, n: int, where: str) -> Ledger:
    """The ledger of a tensor with n experts. Raises VerifyError if it has not n figures of each kind.

    A null is a figure that could not be had, as 0 / 0.
    """

    def figures(key: str) -> Floats:
        try:
            values = np.atleast_1d(np.array(raw[key], float))
        except (KeyError, OverflowError, TypeError, ValueError):
            raise VerifyError(f"{where} has no numbers as {key}", hint=again) from None
        if values.shape != (n,):
            raise VerifyError(f"{where} has {values.size} numbers as {key}, expected {n}", hint=again)
        if not np.all(np.isnan(values) | ((values >= 0) & (values < np.inf))):
            raise VerifyError(f"{where} has a negative or infinite {key}", hint=again)
        return values

    again = "The manifest was changed or is damaged: fetch it again."
    mass, count = (figures(key) if isinstance(raw, dict) and key in raw else None for key in ("mass", "count"))
    return Ledger(figures("error"), figures("rmse"), mass, count)


def _manifest_imatrix(fields: Any) -> ImatrixOrigin | None:
    if not isinstance(fields, dict):
        return None
    datasets = fields.get("datasets")
    names = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    return ImatrixOrigin(_text_member(fields, "file"), _text_member(fields, "prior"), names)


def _header_imatrix(header: Header) -> ImatrixOrigin | None:
    """Where the importance came from, as llama-quantize notes it in the header."""
    file, dataset = (_text_or_none(header.get(f"quantize.imatrix.{key}")) for key in ("file", "dataset"))
    return None if file is None else ImatrixOrigin(file, None, (dataset,) if dataset else ())


def _text_member(fields: dict[str, Any], key: str) -> str | None:
    return _text_or_none(fields.get(key))


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
