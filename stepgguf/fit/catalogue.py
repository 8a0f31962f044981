"""Machines by name: machines.toml, which says where each figure is from.

    machines.toml  ->  ListedMachine: a Machine as probe_machine() would find it, its bandwidth, published speeds
    cards and RAM  ->  a box that nobody has listed: its Machine

So what fits a machine that is not here is decided by the same arithmetic as what fits this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
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


class _RunEntry(TypedDict):
    file: str
    depth: list[int]
    read_gb: list[float]
    tps: list[float]
    source: str


class _MachineEntry(TypedDict, total=False):
    """A table of machines.toml, whose head says what the keys mean. Sizes in GiB, bandwidth in GB/s."""

    title: str
    system: str
    cpu: str
    gpu: str
    cards: list[float]
    nodes: int
    ram: float
    wired_limit: float
    vram: float
    gtt: float
    bandwidth: float
    bandwidth_source: str
    card_bandwidth: float
    card_bandwidth_source: str
    setup: str
    measured: list[_RunEntry]


@dataclass(frozen=True, slots=True)
class PublishedSpeed:
    """A published speed of this model: tok/s without MTP, where a token reads `read` bytes of weights and KV cache.

    depth: tokens in the context. Speeds of one run have the same file and source.
    """

    file: str
    depth: int
    read: float
    tps: float
    source: str

    def efficiency(self, bandwidth: float) -> float:
        """The share of the bandwidth, in bytes per second, that it reached."""
        return self.tps * self.read / bandwidth


@dataclass(frozen=True, slots=True)
class ListedMachine:
    """A machine of the catalogue, or of `nodes` such machines that a token goes through one after the other.

    bandwidth: of its memory, or of the RAM beside cards, and card_bandwidth of these, in bytes per second; None if it
    has none. setup: the setting that `machine` assumes.
    """

    name: str
    title: str
    machine: Machine
    bandwidth: float
    bandwidth_source: str
    setup: str
    measured: tuple[PublishedSpeed, ...]
    nodes: int = 1
    card_bandwidth: float | None = None
    card_bandwidth_source: str = ""

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """The share of the bandwidth that each measurement reached, ascending; none without a measurement."""
        return tuple(sorted(m.efficiency(self.bandwidth) for m in self.measured))


def load_catalogue() -> dict[str, ListedMachine]:
    """All machines by name, in the file's order."""
    entries: dict[str, _MachineEntry] = tomllib.loads(MACHINES.read_text(encoding="utf-8"))
    return {name: _read_entry(name, entry, entries.values()) for name, entry in entries.items()}


def find_listed(machine: Machine) -> ListedMachine | None:
    """The first of the catalogue with this machine's chip, whose memory is as fast; None for chips that it lacks."""
    if machine.kind == "gpu":  # its card may be listed, but not the RAM beside it
        return None
    alike = (m for m in load_catalogue().values() if m.machine.kind == machine.kind)
    if machine.kind == "mac":  # the other kinds have one chip each
        return next((m for m in alike if m.machine.cpu == machine.cpu), None)
    return next(alike, None)


def describe_box(cards: Sequence[int], ram: int) -> Machine:
    """A Linux machine with so many bytes of RAM installed, and cards of so many bytes each.

    The kernel and the firmware take about 2 % of the RAM before the system counts it.
    """
    return _machine(ram=int(ram * 0.98), gpus=tuple(Gpu("", n_bytes, n_bytes) for n_bytes in cards))


def _engine(entry: _MachineEntry) -> tuple[str, str, int]:
    """The chip and how many, which efficiency depends on: a measurement counts for all machines that have the same."""
    return entry.get("cpu", ""), entry.get("gpu", ""), entry.get("nodes", 1)


def _read_entry(name: str, entry: _MachineEntry, entries: Iterable[_MachineEntry]) -> ListedMachine:
    alike = [other for other in entries if _engine(other) == _engine(entry)]
    return ListedMachine(
        name=name,
        title=entry["title"],
        machine=_listed_machine(entry),
        bandwidth=entry["bandwidth"] * 1e9,
        bandwidth_source=entry["bandwidth_source"],
        setup=entry["setup"],
        measured=tuple(speed for other in alike for run in other.get("measured", ()) for speed in _read_run(run)),
        nodes=entry.get("nodes", 1),
        card_bandwidth=entry["card_bandwidth"] * 1e9 if "card_bandwidth" in entry else None,
        card_bandwidth_source=entry.get("card_bandwidth_source", ""),
    )


def _read_run(run: _RunEntry) -> Iterator[PublishedSpeed]:
    for depth, read_gb, tps in zip(run["depth"], run["read_gb"], run["tps"], strict=True):
        yield PublishedSpeed(run["file"], depth, read_gb * 1e9, tps, run["source"])


def _listed_machine(entry: _MachineEntry) -> Machine:
    cards = [int(gib * GIB) for gib in entry.get("cards", ())]
    shared = [None] if "gpu" in entry and not cards else []  # a GPU without memory of its own
    return _machine(
        system=entry["system"],
        cpu=entry.get("cpu", ""),
        ram=int(entry["ram"] * GIB),
        gpus=tuple(Gpu(entry["gpu"], n_bytes, n_bytes) for n_bytes in (*cards, *shared)),
        # A Mac's wired limit, and what amdgpu may map, are settings: the table says which ones `setup` makes.
        wired_limit=int(entry["wired_limit"] * GIB) if "wired_limit" in entry else None,
        amd=AmdMemory(int(entry["vram"] * GIB), int(entry["gtt"] * GIB)) if "gtt" in entry else None,
    )


def _machine(
    *,
    ram: int,
    gpus: tuple[Gpu, ...],
    system: str = "Linux",
    cpu: str = "",
    wired_limit: int | None = None,
    amd: AmdMemory | None = None,
) -> Machine:
    """A machine with all of its memory available; what memory_budget() does not ask for is left empty."""
    return Machine(
        system=system,
        architecture="",
        cpu=cpu,
        cores=0,
        threads=0,
        features=frozenset(),
        ram=ram,
        ram_available=ram,
        swap=0,
        gpus=gpus,
        wired_limit=wired_limit,
        amd=amd,
    )
