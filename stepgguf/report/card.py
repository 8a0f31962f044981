"""What the model card of some GGUF files says, as data; card_text.py writes it down.

    header, manifest     -> MeasuredFile (measured.py): types, recipe, imatrix, source
    general.* keys       -> Provenance: whose model it is, of what, under which licence
    eval's results       -> KL divergence of each file (frontier.py)
    the list of machines -> PlanRow of each file on each machine (fit/planning.py)

Whatever comes from a file is as it stands there: card_text.py escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepgguf.convert.metadata import CALIBRATION
from stepgguf.convert.sources.gguf_file import GGUFSource
from stepgguf.convert.sources.hub import HUB, is_hub_id
from stepgguf.convert.sources.splits import read_headers
from stepgguf.errors import EvaluationError
from stepgguf.files.gguf_header import Header
from stepgguf.fit.catalogue import load_catalogue
from stepgguf.fit.memory import ContextParams
from stepgguf.fit.planning import PlanRow, TargetMachine, plan_for_machine, target_machine
from stepgguf.report.frontier import read_frontier
from stepgguf.report.measured import MTP, MeasuredFile, read_file
from stepgguf.runtime.engine import DEFAULT_CTX


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the general.* keys of a file say of its model; None and empty where they say nothing.

    source: the model that was quantized, as a Hub id.
    """

    name: str
    source: str | None
    organization: str | None
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    languages: tuple[str, ...]
    tags: tuple[str, ...]
    quantized_by: str | None


@dataclass(frozen=True, slots=True)
class EvaluatedFile:
    """A file of which eval's results tell. kld: for each column its value and its error, in nats a token.

    n_bytes, bpw: of its tensors without the MTP blocks.
    """

    name: str
    n_bytes: int
    bpw: float
    kld: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class CardFile:
    """A GGUF of the card, with all its parts.

    headers: of its parts. evaluated: None if nobody has. rows: what it needs on each machine; None for MTP blocks
    alone.
    """

    measured: MeasuredFile
    headers: tuple[Header, ...]
    evaluated: EvaluatedFile | None
    rows: tuple[PlanRow, ...] | None

    @property
    def first(self) -> Path:
        """The file that programs are given; the other parts are found beside it."""
        return self.measured.paths[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts as they are on the disk."""
        return sum(path.stat().st_size for path in self.measured.paths)

    @property
    def calibration(self) -> str | None:
        """In words, what the codes were calibrated on."""
        return _text_key(self.headers[0], CALIBRATION)

    @property
    def bpw(self) -> float:
        """Bits per weight of all tensors."""
        tensors = self.measured.tensors
        return 8 * sum(t.info.n_bytes for t in tensors) / max(1, sum(t.info.n_values for t in tensors))


@dataclass(frozen=True, slots=True)
class CardData:
    """All that the card says but for digests. repo: where it will be published, as a Hub id.

    n_ctx: the context in which the files are run. columns: of the evaluation; number `off` has the random tokens.
    top_k: likeliest tokens that divergences are over, 0 for all. compared: other files that were evaluated.
    """

    repo: str | None
    provenance: Provenance
    files: tuple[CardFile, ...]
    n_ctx: int
    machines: tuple[TargetMachine, ...]
    columns: tuple[str, ...]
    off: int | None
    top_k: int
    compared: tuple[EvaluatedFile, ...]


def read_card_data(
    paths: Sequence[Path], results: Sequence[Path] = (), *, repo: str | None = None, source: str | None = None
) -> CardData:
    """Read files, of split ones any part, and results of eval. source: the Hub id of the model, if the files lack it.

    Raises GGUFError and UnsupportedModel for files that are none of this architecture, VerifyError for a damaged
    manifest, EvaluationError for results that are none, or are of other files with the same names.
    """
    frontier = read_frontier(results) or {"columns": (), "off": None, "top_k": 0, "files": ()}
    evaluated = [_evaluated_file(found) for found in frontier["files"]]
    measured = list({file.paths: file for file in map(read_file, paths)}.values())  # parts of one file are one
    pairs = [_find_evaluated(file, evaluated) for file in measured]
    machines = tuple(target_machine(name) for name in load_catalogue())
    n_ctx = min([DEFAULT_CTX, *(_max_context(file.paths[0]) for file in measured)])
    files = tuple(
        CardFile(file, tuple(read_headers(file.paths[0])), found, _plan_rows(file, machines, n_ctx))
        for file, found in zip(measured, pairs, strict=True)
    )
    provenance = _read_provenance(files[0].headers[0])
    return CardData(
        repo=repo,
        provenance=replace(provenance, source=source or provenance.source),
        files=files,
        n_ctx=n_ctx,
        machines=machines,
        columns=tuple(frontier["columns"]),
        off=frontier["off"],
        top_k=frontier["top_k"],
        compared=tuple(found for found in evaluated if found not in pairs),
    )


def _plan_rows(measured: MeasuredFile, machines: Sequence[TargetMachine], n_ctx: int) -> tuple[PlanRow, ...] | None:
    """What the file needs on each machine; None for MTP blocks alone, which do not run."""
    if not any(t.layer is not None and t.layer < measured.n_layer for t in measured.tensors):
        return None
    with GGUFSource(measured.paths[0]) as source:
        context = ContextParams(n_ctx)
        return tuple(plan_for_machine(source, machine, context, names=()).rows[0] for machine in machines)


def _max_context(path: Path) -> int:
    """The longest context that the model was trained for."""
    with GGUFSource(path) as source:
        return source.hparams.max_position


def _evaluated_file(found: Mapping[str, Any]) -> EvaluatedFile:
    kld = tuple((value, error) for value, error in found["kld"])
    return EvaluatedFile(found["file"], found["bytes"], found["bpw"], kld)


def _find_evaluated(measured: MeasuredFile, evaluated: Sequence[EvaluatedFile]) -> EvaluatedFile | None:
    """The result of a file. EvaluationError if one of its name has other tensors."""
    names = {path.name for path in measured.paths}
    found = next((result for result in evaluated if result.name in names), None)
    n_bytes = sum(t.info.n_bytes for t in measured.tensors if t.group != MTP)
    if found is not None and found.n_bytes != n_bytes:
        raise EvaluationError(
            f"the result of {found.name} is of a file with {found.n_bytes:,} bytes of tensors, here it has {n_bytes:,}",
            hint="The file was made again since: evaluate it with `stepgguf eval`, or leave the result out.",
        )
    return found


def _read_provenance(header: Header) -> Provenance:
    address = _text_key(header, "general.source.repo_url") or _text_key(header, "general.repo_url") or ""
    source = address.removeprefix(f"{HUB}/")
    return Provenance(
        name=_text_key(header, "general.name") or header.path.stem,
        source=source if is_hub_id(source) else None,
        organization=_text_key(header, "general.organization"),
        licence=_text_key(header, "general.license"),
        licence_name=_text_key(header, "general.license.name"),
        licence_link=_text_key(header, "general.license.link"),
        languages=_text_list(header, "general.languages"),
        tags=_text_list(header, "general.tags"),
        quantized_by=_text_key(header, "general.quantized_by"),
    )


def _text_key(header: Header, key: str) -> str | None:
    value = header.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _text_list(header: Header, key: str) -> tuple[str, ...]:
    values = header.get(key)
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()
