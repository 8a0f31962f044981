"""Is this file what was made? Against its manifest, or against the source by making it again.

Both name what is wrong down to the expert. The source comparison encodes again what it looks at, so it also proves
that a file from elsewhere is what its name says.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepgguf.convert.manifest import header_sha256, read_entries, read_manifest
from stepgguf.convert.metadata import CALIBRATION, IMATRIX_FILE
from stepgguf.convert.pipeline import RowMaker
from stepgguf.convert.plan import Plan, PlannedTensor, retype_tensors, row_ranges, unit_rows
from stepgguf.convert.sources.source import TensorSource, rows_per_expert
from stepgguf.convert.sources.splits import read_headers
from stepgguf.errors import TruncatedFile, VerifyError
from stepgguf.files import disk
from stepgguf.files.gguf_header import Header, TensorInfo
from stepgguf.files.jsonread import shown
from stepgguf.quants.types import row_size

Bytes = NDArray[np.uint8]
FindProblem = Callable[[Bytes], str | None]  # what is wrong with these bytes, if anything
Job = tuple[TensorInfo, int, int, FindProblem]  # rows [start, stop) of a tensor, and how to look at their bytes
Step = Callable[[int], None]  # called with the size of each unit looked at


@dataclass(slots=True)
class Verification:
    """What was looked at, and what was wrong in words."""

    step: Step
    tensors: int = 0
    units: int = 0
    n_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def check_rows(self, header: Header, jobs: Iterable[Job]) -> None:
        """Read each job's rows from a file and note what is wrong with them, on all cores."""
        fd = os.open(header.path, os.O_RDONLY)

        def check(job: Job) -> tuple[int, str | None]:
            info, start, stop, find_problem = job
            size = row_size(info.ggml_type, info.shape[-1])
            offset = header.data_start + info.offset + start * size
            data = np.empty((stop - start) * size, np.uint8)
            disk.read_at(fd, data.data, offset, info.name, TruncatedFile)
            problem = find_problem(data)
            return data.nbytes, f"{_describe_rows(info, start, stop)} {problem}" if problem else None

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for size, problem in pool.map(check, jobs):
                    self.units, self.n_bytes = self.units + 1, self.n_bytes + size
                    self.problems += [problem] if problem else []
                    self.step(size)
        finally:
            os.close(fd)
        self.tensors += len(header.tensors)


def verify_manifest(path: Path, step: Step) -> Verification:
    """Compare every byte of a file (all its splits) with the digests in its manifest."""
    report = Verification(step)
    for header in read_headers(path):
        file = header.path
        digest, tensors = read_entries(file, read_manifest(file, "Verify against the checkpoint: --against DIRECTORY."))
        if header_sha256(header) != digest:
            report.problems.append(f"{file.name}: the header (metadata or tensor list) is not the one that was written")
        infos = {tensor.name: tensor for tensor in header.tensors}
        jobs = []
        for name in {**infos, **tensors}:
            info, entry = infos.get(name), tensors.get(name)
            if info is None or entry is None or (entry.type, entry.shape) != (info.ggml_type.name, info.shape):
                report.problems.append(f"{file.name}: {name} is not the same tensor in file and manifest")
                continue
            rows = list(row_ranges(info.shape, entry.rows_per_unit))
            if len(rows) != len(entry.digests):
                report.problems.append(f"{file.name}: {name} has {len(entry.digests)} digests, expected {len(rows)}")
            jobs += [(info, *r, partial(_compare_digest, d)) for r, d in zip(rows, entry.digests, strict=False)]
        report.check_rows(header, jobs)
    return report


def verify_source(path: Path, plan: Plan, source: TensorSource, share: float, step: Step) -> Verification:
    """Make a share of each tensor's units again (at least one) and compare. `plan` gives names and sources.

    VerifyError for a file whose bytes do not follow from the source alone: with calibrated codes, or made with an
    importance matrix while the plan has none.
    """
    headers = read_headers(path)
    if (calibration := headers[0].get(CALIBRATION)) is not None:
        raise VerifyError(
            f"{path}: the codes are calibrated on {shown(calibration)}, so the source alone does not give them",
            hint="Compare it with its manifest: leave --against out.",
        )
    if plan.importance is None and (imatrix := headers[0].get(IMATRIX_FILE)) is not None:
        raise VerifyError(
            f"{path}: it was made with the importance matrix {shown(imatrix)}, which is not given",
            hint="Give it with --imatrix, or compare the file with its manifest: leave --against out.",
        )
    report, rng, maker = Verification(step), random.Random(0), RowMaker(source, plan.importance)
    for header in headers:
        planned: dict[str, PlannedTensor] = {tensor.name: tensor for tensor in retype_tensors(header.tensors, plan)}
        jobs = []
        for info in header.tensors:
            tensor = planned.get(info.name)
            if tensor is None or tensor.shape != info.shape:
                report.problems.append(f"{info.name} {list(info.shape)} is not in {source.path}")
                continue
            ranges = list(unit_rows(tensor))
            chosen = sorted(rng.sample(ranges, max(1, round(share * len(ranges)))))
            jobs += [(info, *rows, partial(_compare_with_source, maker, tensor, *rows)) for rows in chosen]
        report.check_rows(header, jobs)
    return report


def _compare_digest(digest: str, data: Bytes) -> str | None:
    return None if hashlib.sha256(data.data).hexdigest() == digest else "differs from the manifest"


def _compare_with_source(maker: RowMaker, tensor: PlannedTensor, start: int, stop: int, data: Bytes) -> str | None:
    made = maker.make_rows(tensor, start, stop)[0].reshape(-1)
    wrong = float((made != data).mean())
    return f"is not what the source gives ({wrong:.1%} of its bytes differ)" if wrong else None


def _describe_rows(info: TensorInfo, start: int, stop: int) -> str:
    """A unit in words: tensor, expert, rows."""
    rows = rows_per_expert(info.shape)
    expert = f" expert {start // rows}" if len(info.shape) == 3 else ""
    return f"{info.name}{expert} rows {start % rows}-{(stop - 1) % rows}"
