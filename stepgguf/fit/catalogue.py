"""Machines by name: machines.toml, which says where each figure is from.

    machines.toml  ->  Listed: a Machine as probe() would find it, its bandwidth, published speeds

So what fits a machine that is not here is decided by the same arithmetic as what fits this one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.runtime.llama_build import Gpu

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MACHINES = Path(__file__).with_name("machines.toml")


@dataclass(frozen=True, slots=True)
class Measurement:
    """A published speed of this model: tok/s without MTP, where a token reads `read` bytes of weights and KV cache."""

    file: str
    read: float
    tps: float
    source: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A machine of the catalogue. bandwidth in bytes per second; setup: the setting that `machine` assumes."""

    name: str
    title: str
    machine: Machine
    bandwidth: float
    bandwidth_source: str
    setup: str
    measured: tuple[Measurement, ...]

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """The share of the bandwidth that each measurement reached, ascending; none without a measurement."""
        return tuple(sorted(m.tps * m.read / self.bandwidth for m in self.measured))


def load() -> dict[str, Listed]:
    """All machines by name, in the file's order."""
    entries: dict[str, dict[str, Any]] = tomllib.loads(MACHINES.read_text(encoding="utf-8"))
    return {
        name: _listed(name, entry, [m for other in entries.values() if _chip(other) == _chip(entry)
                                    for m in other.get("measured", ())])
        for name, entry in entries.items()
    }  # fmt: skip


def like(machine: Machine) -> Listed | None:
    """The one whose memory is as fast as this machine's: the same chip. None for chips that are not listed."""
    alike = (m for m in load().values() if m.machine.kind == machine.kind)
    if machine.kind == "mac":
        return next((m for m in alike if m.machine.cpu == machine.cpu), None)
    return next(alike, None)


def _chip(entry: dict[str, Any]) -> tuple[str, str]:
    """Efficiency is the chip's: a measurement counts for all machines that have it."""
    return entry.get("cpu", ""), entry.get("gpu", "")


def _listed(name: str, entry: dict[str, Any], measured: list[dict[str, Any]]) -> Listed:
    return Listed(
        name=name,
        title=entry["title"],
        machine=_machine(entry),
        bandwidth=entry["bandwidth"] * 1e9,
        bandwidth_source=entry["bandwidth_source"],
        setup=entry["setup"],
        measured=tuple(Measurement(m["file"], m["read_gb"] * 1e9, m["tps"], m["source"]) for m in measured),
    )


def _machine(entry: dict[str, Any]) -> Machine:
    """All of the memory is available; what memory.budget() does not ask for is left empty."""

    def gib(key: str) -> int:
        return int(entry.get(key, 0) * GIB)

    return Machine(
        system=entry["system"],
        architecture="",
        cpu=entry.get("cpu", ""),
        cores=0,
        threads=0,
        features=frozenset(),
        ram=gib("ram"),
        ram_available=gib("ram"),
        swap=0,
        gpus=(Gpu(entry["gpu"], None, None),) if "gpu" in entry else (),
        wired_limit=gib("wired_limit") or None,
        amd=AmdMemory(gib("vram"), gib("gtt")) if "gtt" in entry else None,
    )
