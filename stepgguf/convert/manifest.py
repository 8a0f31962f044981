"""FILE.gguf.manifest.json: digests and losses of what was made, beside the file, for `stepgguf verify` and `report`.

{"made_by", "file", "bytes", "type", "recipe"?, "header_sha256", "sha256"? (see file_sha256), "imatrix"?,
 "tensors": {name: {"type", "shape", "rows_per_unit", "sha256": [one of each unit], "ledger"?}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf import __version__
from stepgguf.convert import ledger
from stepgguf.convert.journal import FinishedUnit
from stepgguf.convert.plan import Plan, Unit
from stepgguf.errors import VerifyError
from stepgguf.files import disk, jsonread
from stepgguf.files.gguf_header import Header
from stepgguf.files.jsonread import Value

_CHANGED = "The manifest was changed or is damaged: fetch it again."


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One tensor as `verify` needs it: how it was cut into units, and the digest of each."""

    type: str
    shape: tuple[int, ...]
    rows_per_unit: int
    digests: tuple[str, ...]


def manifest_path(path: Path) -> Path:
    """The manifest of a finished file."""
    return path.with_name(f"{path.name}.manifest.json")


def describe_file(plan: Plan, index: int, finished: Mapping[int, FinishedUnit]) -> dict[str, Any]:
    """The manifest of the plan's file number `index`, as JSON. finished: all units of the plan, by number."""
    file = plan.files[index]
    units: dict[int, list[tuple[Unit, FinishedUnit]]] = {}
    for number, unit in enumerate(plan.units()):
        if unit.file == index:
            units.setdefault(unit.tensor, []).append((unit, finished[number]))
    importance, recipe = plan.importance, plan.recipe
    return {
        "made_by": f"stepgguf {__version__}",
        "file": file.path.name,
        "bytes": file.size,
        "type": plan.type_name,
        **({} if recipe.is_stock else {"recipe": recipe.text}),
        "header_sha256": hashlib.sha256(file.header).hexdigest(),
        **({} if importance is None else {"imatrix": importance.manifest_field()}),
        "tensors": {
            tensor.name: {
                "type": tensor.ggml_type.name,
                "shape": list(tensor.shape),
                "rows_per_unit": tensor.rows_per_unit,
                "sha256": [done.digest.hex() for _, done in units[i]],
                **ledger.ledger_field(tensor, [(unit, done.loss) for unit, done in units[i]], importance),
            }
            for i, tensor in enumerate(file.tensors)
        },
    }


def write_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Put the manifest beside its file, durably."""
    disk.replace(manifest_path(file), (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(file: Path, otherwise: str) -> dict[str, Any]:
    """The manifest of a finished file. Raises VerifyError, with the hint `otherwise`, if none can be read."""
    path = manifest_path(file)
    if not path.exists():
        raise VerifyError(f"{path} is not there", hint=otherwise)
    manifest: Any = jsonread.read(path, VerifyError, otherwise).raw
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tensors"), dict):
        raise VerifyError(f"{path}: not a manifest of stepgguf", hint=otherwise)
    return manifest


def read_entries(file: Path, manifest: Mapping[str, Any]) -> tuple[str, dict[str, ManifestEntry]]:
    """The header's digest, and the tensors by name. Raises VerifyError for a manifest of another shape."""
    document = Value(manifest, str(manifest_path(file)), VerifyError, _CHANGED)
    return document["header_sha256"].text(), {name: _read_entry(entry) for name, entry in document["tensors"].members()}


def header_sha256(header: Header) -> str:
    """The SHA-256 of a file's header, in hex."""
    with header.path.open("rb") as file:
        return hashlib.sha256(file.read(header.data_start)).hexdigest()


def file_sha256(header: Header, step: Callable[[int], None]) -> str:
    """The SHA-256 of a whole finished file, in hex; its manifest, if it has one, keeps it for the next time.

    step: called with the bytes that are done. Raises VerifyError for a damaged manifest.
    """
    file, n_bytes = header.path, header.path.stat().st_size
    manifest = read_manifest(file, _CHANGED) if manifest_path(file).exists() else {}
    is_own = manifest.get("bytes") == n_bytes and manifest.get("header_sha256") == header_sha256(header)
    known = manifest.get("sha256")
    if is_own and isinstance(known, str):
        step(n_bytes)
        return known
    digest = disk.sha256(file, step)
    if is_own:
        with suppress(OSError):  # in a folder that is read-only it is computed each time
            write_manifest(file, manifest | {"sha256": digest})
    return digest


def _read_entry(entry: Value) -> ManifestEntry:
    return ManifestEntry(
        entry["type"].text(),
        tuple(extent.integer(1) for extent in entry["shape"].array()),
        entry["rows_per_unit"].integer(1),
        tuple(digest.text() for digest in entry["sha256"].array()),
    )
