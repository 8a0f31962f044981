"""Machines by name: machines.toml, which says where each figure is from.

    machines.toml  ->  ListedMachine: a Machine as probe_machine() would find it, its bandwidth, published speeds

So what fits a machine that is not here is decided by the same arithmetic as what fits this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.runtime.llama_build import Gpu

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MACHINES = Path(__file__).with_name("machines.toml")


class _SpeedEntry(TypedDict):
    file: str
    read_gb: float
    tps: float
    source: str


class _MachineEntry(TypedDict, total=False):
    """A table of machines.toml, whose head says what the keys mean. Sizes in GiB, bandwidth in GB/s."""

    title: str
    system: str
    cpu: str
    gpu: str
    ram: float
    wired_limit: float
    vram: float
    gtt: float
    bandwidth: float
    bandwidth_source: str
    setup: str
    measured: list[_SpeedEntry]


@dataclass(frozen=True, slots=True)
class PublishedSpeed:
    """A published speed of this model: tok/s without MTP, where a token reads `read` bytes of weights and KV cache."""

    file: str
    read: float
    tps: float
    source: str


@dataclass(frozen=True, slots=True)
class ListedMachine:
    """A machine of the catalogue. bandwidth in bytes per second; setup: the setting that `machine` assumes."""

    name: str
    title: str
    machine: Machine
    bandwidth: float
    bandwidth_source: str
    setup: str
    measured: tuple[PublishedSpeed, ...]

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """The share of the bandwidth that each measurement reached, ascending; none without a measurement."""
        return tuple(sorted(m.tps * m.read / self.bandwidth for m in self.measured))


def load_catalogue() -> dict[str, ListedMachine]:
    """All machines by name, in the file's order."""
    entries: dict[str, _MachineEntry] = tomllib.loads(MACHINES.read_text(encoding="utf-8"))
    return {name: _read_entry(name, entry, entries.values()) for name, entry in entries.items()}


def find_listed(machine: Machine) -> ListedMachine | None:
    """The first of the catalogue with this machine's chip, whose memory is as fast; None for chips that it lacks."""
    alike = (m for m in load_catalogue().values() if m.machine.kind == machine.kind)
    if machine.kind == "mac":  # the other kinds have one chip each
        return next((m for m in alike if m.machine.cpu == machine.cpu), None)
    return next(alike, None)


def _chip(entry: _MachineEntry) -> tuple[str, str]:
    """The chip, which efficiency depends on: a measurement counts for all machines that have it."""
    return entry.get("cpu", ""), entry.get("gpu", "")


def _read_entry(name: str, entry: _MachineEntry, entries: Iterable[_MachineEntry]) -> ListedMachine:
    measured = [speed for other in entries if _chip(other) == _chip(entry) for speed in other.get("measured", ())]
    return ListedMachine(
        name=name,
        title=entry["title"],
        machine=_described_machine(entry),
        bandwidth=entry["bandwidth"] * 1e9,
        bandwidth_source=entry["bandwidth_source"],
        setup=entry["setup"],
        measured=tuple(PublishedSpeed(m["file"], m["read_gb"] * 1e9, m["tps"], m["source"]) for m in measured),
    )


def _described_machine(entry: _MachineEntry) -> Machine:
    """The machine with all of its memory available; what memory_budget() does not ask for is left empty."""
    ram = int(entry["ram"] * GIB)
    return Machine(
        system=entry["system"],
        architecture="",
        cpu=entry.get("cpu", ""),
        cores=0,
        threads=0,
        features=frozenset(),
        ram=ram,
        ram_available=ram,
        swap=0,
        gpus=(Gpu(entry["gpu"], None, None),) if "gpu" in entry else (),
        # A Mac's wired limit, and what amdgpu may map, are settings: the table says which ones `setup` makes.
        wired_limit=int(entry["wired_limit"] * GIB) if "wired_limit" in entry else None,
        amd=AmdMemory(int(entry["vram"] * GIB), int(entry["gtt"] * GIB)) if "gtt" in entry else None,
    )
