"""Is this file what was made? Against its manifest, or against the source by making it again.

Both name what is wrong down to the expert. The source comparison encodes again what it looks at, so it also proves
that a file from elsewhere is what its name says.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.convert import header as gguf_header
from stepgguf.convert.checkpoint import read_exactly
from stepgguf.convert.ggufsource import split_files
from stepgguf.convert.header import Header, TensorInfo
from stepgguf.convert.pipeline import UnitMaker
from stepgguf.convert.plan import Plan, PlannedTensor, Unit, replan, unit_rows
from stepgguf.convert.source import TensorSource
from stepgguf.convert.writer import manifest_path
from stepgguf.errors import VerifyError
from stepgguf.quants.ggml import row_size


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at, and what was wrong in words."""

    tensors: int
    units: int
    n_bytes: int
    problems: tuple[str, ...]


Step = Callable[[int], None]  # called with the bytes of each unit looked at


def verify_manifest(path: Path, step: Step) -> Report:
    """Compare every byte of a file (all its splits) with the digests in its manifest."""
    problems: list[str] = []
    tensors = units = n_bytes = 0
    for file in split_files(path):
        header, manifest = gguf_header.read(file), _manifest(file)
        if _header_digest(header) != manifest["header_sha256"]:
            problems.append(f"{file.name}: the header (metadata or tensor list) is not the one that was written")
        infos = {tensor.name: tensor for tensor in header.tensors}
        for name in infos.keys() ^ manifest["tensors"].keys():
            problems.append(f"{file.name}: {name} is not in both file and manifest")
        jobs = [
            (infos[name], start, stop, digest)
            for name, entry in manifest["tensors"].items()
            if name in infos
            for (start, stop), digest in zip(_ranges(infos[name], entry["rows_per_unit"]), entry["sha256"], strict=True)
        ]
        fd = os.open(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for size, problem in pool.map(lambda job, h=header, f=fd: _check_digest(h, f, *job), jobs):  # type: ignore[misc]
                    units, n_bytes = units + 1, n_bytes + size
                    problems += [problem] if problem else []
                    step(size)
        finally:
            os.close(fd)
        tensors += len(infos)
    return Report(tensors, units, n_bytes, tuple(problems))


def verify_source(path: Path, plan: Plan, source: TensorSource, share: float, step: Step) -> Report:
    """Make a share of each tensor's units again (at least one) and compare the bytes. `plan` gives names and sources."""
    rng, maker = random.Random(0), UnitMaker(source)
    problems: list[str] = []
    tensors = units = n_bytes = 0
    for file in split_files(path):
        header = gguf_header.read(file)
        planned = {tensor.name: tensor for tensor in replan(header.tensors, plan)}
        jobs = []
        for info in header.tensors:
            tensor = planned.get(info.name)
            if tensor is None or tensor.shape != info.shape:
                problems.append(f"{info.name} {list(info.shape)} is not in {source.path}")
                continue
            ranges = list(unit_rows(tensor))
            chosen = rng.sample(ranges, max(1, round(share * len(ranges))))
            jobs += [(tensor, info, start, stop) for start, stop in sorted(chosen)]
        fd = os.open(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for size, problem in pool.map(lambda job, h=header, f=fd: _remake(maker, h, f, *job), jobs):  # type: ignore[misc]
                    units, n_bytes = units + 1, n_bytes + size
                    problems += [problem] if problem else []
                    step(size)
        finally:
            os.close(fd)
        tensors += len(header.tensors)
    return Report(tensors, units, n_bytes, tuple(problems))


def _check_digest(header: Header, fd: int, info: TensorInfo, start: int, stop: int, digest: str) -> tuple[int, str | None]:
    data = _read(header, fd, info, start, stop)
    same = hashlib.sha256(data.data).hexdigest() == digest
    return data.nbytes, None if same else f"{where(info, start, stop)} differs from the manifest"


def _remake(
    maker: UnitMaker, header: Header, fd: int, tensor: PlannedTensor, info: TensorInfo, start: int, stop: int
) -> tuple[int, str | None]:
    made = maker.make(tensor, Unit(0, 0, start, stop)).reshape(-1)
    found = _read(header, fd, info, start, stop)
    if bool((made == found).all()):
        return found.nbytes, None
    share = float((made != found).mean())
    return found.nbytes, f"{where(info, start, stop)} is not what the source gives ({share:.1%} of its bytes differ)"


def _read(header: Header, fd: int, info: TensorInfo, start: int, stop: int) -> Any:
    size = row_size(info.ggml_type, info.shape[-1])
    return read_exactly(fd, (stop - start) * size, header.data_start + info.offset + start * size, info.name)


def where(info: TensorInfo, start: int, stop: int) -> str:
    """A unit in words: tensor, expert, rows."""
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    expert = f" expert {start // rows}" if len(info.shape) == 3 else ""
    return f"{info.name}{expert} rows {start % rows}-{(stop - 1) % rows}"


def _ranges(info: TensorInfo, rows_per_unit: int) -> Iterator[tuple[int, int]]:
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    for first in range(0, info.n_values // info.shape[-1], rows):
        for start in range(0, rows, rows_per_unit):
            yield first + start, first + min(start + rows_per_unit, rows)


def _manifest(file: Path) -> dict[str, Any]:
    path = manifest_path(file)
    try:
        manifest = json.loads(path.read_text())
    except OSError:
        raise VerifyError(
            f"{path} is not there", hint="Verify against the checkpoint instead: --against DIRECTORY."
        ) from None
    except ValueError as error:
        raise VerifyError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or not {"header_sha256", "tensors"} <= manifest.keys():
        raise VerifyError(f"{path}: not a manifest of stepgguf")
    return manifest


def _header_digest(header: Header) -> str:
    with header.path.open("rb") as file:
        return hashlib.sha256(file.read(header.data_start)).hexdigest()
