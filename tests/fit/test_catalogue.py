"""The machines that come with stepgguf: what they say is what the memory arithmetic and the doctor say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.catalogue import MACHINES, ListedMachine, describe_box, find_listed, load_catalogue, tomllib
from stepgguf.fit.machine import Machine
from stepgguf.fit.memory import memory_budget
from tests.fit.machines import CARD, LINUX, MAC, SPARK, STRIX

LISTED = load_catalogue()
KEYS = {
    "title", "system", "cpu", "gpu", "cards", "nodes", "ram", "vram", "gtt", "wired_limit", "bandwidth",
    "bandwidth_source", "card_bandwidth", "card_bandwidth_source", "setup", "measured",
}  # fmt: skip


def test_no_key_is_misspelt() -> None:
    for entry in tomllib.loads(MACHINES.read_text(encoding="utf-8")).values():
        assert entry.keys() <= KEYS
        for run in entry.get("measured", ()):
            assert run.keys() == {"file", "depth", "read_gb", "tps", "source"}
            assert len(run["depth"]) == len(run["read_gb"]) == len(run["tps"])


@pytest.mark.parametrize(
    ("name", "kind", "gib"),
    [
        ("spark", "spark", 117.7),
        ("spark-2", "spark", 117.7),  # of each
        ("strix-128", "strix", 121.4),
        ("mac-128", "mac", 116),
        ("mac-192", "mac", 180),
        ("mac-512", "mac", 500),
        ("cuda-24-64", "gpu", 23),
        ("cuda-96-256", "gpu", 94.6),
    ],
)
def test_a_machine_has_the_memory_that_its_setup_gives(name: str, kind: str, gib: float) -> None:
    machine = LISTED[name].machine
    assert machine.kind == kind
    assert memory_budget(machine).limit / GIB == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize("listed", LISTED.values(), ids=lambda m: m.name)
def test_the_setup_in_words_is_the_setup_in_figures(listed: ListedMachine) -> None:
    settings = {key: int(value) for key, value in re.findall(r"([\w.]+)=(\d+)", listed.setup)}
    machine, mib = listed.machine, 2**20
    expected = {}
    if machine.wired_limit:
        expected = {"iogpu.wired_limit_mb": machine.wired_limit // mib}
    if machine.amd:
        expected = {"amdgpu.gttsize": machine.amd.gtt // mib, "ttm.pages_limit": machine.amd.gtt // 4096}
    assert settings == expected


@pytest.mark.parametrize(("machine", "name"), [(SPARK, "spark"), (MAC, "mac-128"), (STRIX, "strix-128")])
def test_a_real_machine_is_known_by_its_chip(machine: Machine, name: str) -> None:
    found = find_listed(machine)
    assert found is not None
    assert found.name == name


def test_a_chip_that_is_not_listed_is_not_guessed() -> None:
    assert find_listed(LINUX) is find_listed(CARD) is find_listed(replace(MAC, cpu="Apple M1")) is None


def test_a_measurement_counts_for_every_machine_with_the_chip() -> None:
    assert LISTED["mac-64"].measured == LISTED["mac-128"].measured != ()
    assert LISTED["mac-192"].measured == ()
    assert LISTED["mac-192"].efficiencies == ()
    assert LISTED["spark-2"].measured == (), "what two of them do is not what one does"


@pytest.mark.parametrize("listed", LISTED.values(), ids=lambda m: m.name)
def test_each_place_that_is_read_has_a_bandwidth_with_its_source(listed: ListedMachine) -> None:
    has_cards = listed.machine.kind == "gpu"
    assert (listed.card_bandwidth is not None, listed.card_bandwidth_source != "") == (has_cards, has_cards)
    assert listed.bandwidth > 10e9
    assert listed.bandwidth_source
    assert all(m.source for m in listed.measured)


@pytest.mark.parametrize("gib", [24, 31.8, 48, 95.6])
def test_cards_are_listed_with_64_128_and_256_gb(gib: float) -> None:
    rams = [
        round(m.machine.ram / GIB) for m in LISTED.values() if [g.total for g in m.machine.gpus] == [int(gib * GIB)]
    ]
    assert rams == [63, 125, 251]


def test_a_box_that_nobody_listed_has_its_cards_and_what_the_kernel_leaves_of_its_ram() -> None:
    box = describe_box((24 * GIB, 24 * GIB), 128 * GIB)
    assert box.kind == "gpu"
    have = memory_budget(box)
    assert have.limit == 46 * GIB
    assert have.ceiling - have.limit == int(128 * GIB * 0.98) - 4 * GIB
    assert describe_box((), 128 * GIB).kind == "cpu"
