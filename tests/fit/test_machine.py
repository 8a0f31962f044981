"""Probing, on what real machines say: files in a tree and the output of programs, as they were recorded."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from stepgguf.fit import machine
from stepgguf.fit.machine import AmdMemory, RunCommand, network_filesystem, probe_machine
from stepgguf.runtime.llama_build import Gpu

NVIDIA_SMI = "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits"

SPARK = {
    "proc/cpuinfo": "".join(
        f"processor\t: {i}\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd aes crc32 atomics asimddp sve i8mm bf16\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd85\n\n"
        for i in range(20)
    ),
    "proc/meminfo": "MemTotal:       127600748 kB\nMemFree:        98325432 kB\nMemAvailable:   118566368 kB\n"
    "SwapTotal:      16777212 kB\nSwapFree:       16777212 kB\nHugePages_Total:       0\n",
}

STRIX_HALO = {
    "proc/cpuinfo": "".join(
        f"processor\t: {i}\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD RYZEN AI MAX+ 395 w/ Radeon 8060S\n"
        f"physical id\t: 0\nsiblings\t: 32\ncore id\t\t: {i % 16}\ncpu cores\t: 16\n"
        "flags\t\t: fpu sse4_2 fma f16c avx2 avx512f avx512_vnni avx512_bf16\n\n"
        for i in range(32)
    ),
    "proc/meminfo": "MemTotal:       130966528 kB\nMemFree:        120000000 kB\nMemAvailable:   122000000 kB\n"
    "SwapTotal:             0 kB\n",
    "sys/class/drm/card1/device/mem_info_gtt_total": "103079215104\n",
    "sys/class/drm/card1/device/mem_info_vram_total": "4294967296\n",
    "sys/module/ttm/parameters/pages_limit": "25165824\n",
    "sys/module/amdgpu/parameters/gttsize": "-1\n",
}

MAC = {
    "sysctl -n hw.machine": "arm64",
    "sysctl -n machdep.cpu.brand_string": "Apple M1 Ultra",
    "sysctl -n hw.physicalcpu": "20",
    "sysctl -n hw.logicalcpu": "20",
    "sysctl -n hw.memsize": "137438953472",
    "sysctl -n vm.swapusage": "total = 2048.00M  used = 1006.25M  free = 1041.75M  (encrypted)",
    "sysctl -n iogpu.wired_limit_mb": "0",
    "vm_stat": "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
    "Pages free:                             5242880.\nPages active:                           1181245.\n"
    "Pages inactive:                         1048576.\nPages speculative:                        99345.\n",
}


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def says(outputs: Mapping[str, str]) -> RunCommand:
    """Programs that print this; others are not installed."""

    def run(command: Sequence[str]) -> bytes | None:
        text = outputs.get(" ".join(command))
        return None if text is None else f"{text}\n".encode()

    return run


def test_a_dgx_spark_is_known_by_its_gpu_which_tells_no_memory(tmp_path: Path) -> None:
    found = probe_machine("Linux", root=tree(tmp_path, SPARK), run=says({NVIDIA_SMI: "NVIDIA GB10, [N/A], [N/A]"}))
    assert found.kind == "spark"
    assert found.gpus == (Gpu("NVIDIA GB10", None, None),)
    assert (found.ram, found.ram_available, found.swap) == (127600748 << 10, 118566368 << 10, 16777212 << 10)
    assert (found.cores, found.threads) == (20, 20)
    assert {"asimddp", "i8mm", "sve"} <= found.features


def test_strix_halo_is_known_by_its_processor_and_tells_what_it_maps(tmp_path: Path) -> None:
    found = probe_machine("Linux", root=tree(tmp_path, STRIX_HALO), run=says({}))
    assert found.kind == "strix"
    assert found.cpu == "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S"
    assert (found.cores, found.threads) == (16, 32)
    assert found.amd == AmdMemory(vram=4 << 30, gtt=96 << 30)


def test_the_page_limit_counts_where_it_is_below_the_driver_s_gtt_size(tmp_path: Path) -> None:
    files = STRIX_HALO | {"sys/module/ttm/parameters/pages_limit": "16380000\n"}
    assert machine.amd_memory(tree(tmp_path, files)) == AmdMemory(vram=4 << 30, gtt=16380000 * 4096)
    assert machine.amd_memory(tmp_path / "elsewhere") is None


def test_of_two_amd_cards_the_one_that_maps_most_counts(tmp_path: Path) -> None:
    small = {"sys/class/drm/card0/device/mem_info_gtt_total": "1073741824\n"}
    assert machine.amd_memory(tree(tmp_path, STRIX_HALO | small)) == AmdMemory(vram=4 << 30, gtt=96 << 30)


def test_a_mac() -> None:
    found = probe_machine("Darwin", run=says(MAC))
    assert (found.kind, found.cpu, found.architecture) == ("mac", "Apple M1 Ultra", "arm64")
    assert (found.ram, found.swap, found.wired_limit) == (128 << 30, 2 << 30, 0)
    assert found.ram_available == (5242880 + 1048576) * 16384
    cached = (
        MAC["vm_stat"]
        + "Pages purgeable:                         100000.\nFile-backed pages:                      2000000.\n"
    )
    after_writing = probe_machine("Darwin", run=says(MAC | {"vm_stat": cached}))
    assert after_writing.ram_available == (5242880 + 100000 + 2000000) * 16384, "cached files can go"
    assert (
        probe_machine("Darwin", run=says(MAC | {"sysctl -n iogpu.wired_limit_mb": "114688"})).wired_limit == 112 << 30
    )
    without = {key: value for key, value in MAC.items() if "wired" not in key}
    assert probe_machine("Darwin", run=says(without)).wired_limit is None


def test_nvidia_cards_of_their_own(tmp_path: Path) -> None:
    lines = "NVIDIA GeForce RTX 3090, 24576, 24259\nNVIDIA H200, 143771, 143156"
    found = probe_machine("Linux", root=tree(tmp_path, SPARK), run=says({NVIDIA_SMI: lines}))
    assert found.kind == "gpu"
    assert found.gpus == (
        Gpu("NVIDIA GeForce RTX 3090", 24576 << 20, 24259 << 20),
        Gpu("NVIDIA H200", 143771 << 20, 143156 << 20),
    )


def test_a_machine_that_tells_nothing_is_described_all_the_same(tmp_path: Path) -> None:
    found = probe_machine("Linux", root=tmp_path, run=says({}))
    assert (found.kind, found.ram, found.gpus, found.amd, found.container_limit) == ("cpu", 0, (), None, None)
    assert found.cores == found.threads > 0


@pytest.mark.parametrize(
    ("group", "limits", "least"),
    [
        ("/", {"": "68719476736"}, 64 << 30),
        ("/", {"": "max"}, None),
        ("/system.slice/a.scope", {"system.slice": "34359738368", "system.slice/a.scope": "max"}, 32 << 30),
        ("/a/b", {"a": "2147483648", "a/b": "1073741824"}, 1 << 30),
        ("/a/b", {}, None),
    ],
)
def test_the_least_limit_of_the_cgroups_above_holds(
    tmp_path: Path, group: str, limits: dict[str, str], least: int | None
) -> None:
    files = {f"sys/fs/cgroup/{name}/memory.max": f"{text}\n" for name, text in limits.items()}
    assert machine.container_limit(tree(tmp_path, files | {"proc/self/cgroup": f"0::{group}\n"})) == least


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        ("4:memory:/a/b", {"a": "2147483648", "a/b": "9223372036854771712", "": "9223372036854771712"}, 2 << 30),
        ("4:hugetlb,memory:/", {"": "1073741824"}, 1 << 30),
        ("4:memory:/docker/abc", {"": "1073741824"}, 1 << 30),  # a container sees its own group at the top
        ("4:memory:/a", {"a": "9223372036854771712"}, None),
        ("9:name=systemd:/", {"": "1073741824"}, None),
    ],
)
def test_the_limits_of_cgroups_of_the_first_version_hold_too(
    tmp_path: Path, own: str, limits: dict[str, str], least: int | None
) -> None:
    files = {f"sys/fs/cgroup/memory/{name}/memory.limit_in_bytes": f"{text}\n" for name, text in limits.items()}
    assert machine.container_limit(tree(tmp_path, files | {"proc/self/cgroup": f"{own}\n0::/\n"})) == least


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/mnt/nas/step.gguf", "nfs4"),
        ("/mnt/nas/fast/step.gguf", None),
        ("/mnt/my share/step.gguf", "cifs"),
        ("/home/me/step.gguf", None),
        ("/mnt/nasty/step.gguf", None),
    ],
)
def test_a_network_file_system_is_found_by_the_longest_mount(tmp_path: Path, path: str, kind: str | None) -> None:
    mounts = (
        "/dev/nvme0n1p2 / ext4 rw,relatime 0 0\n"
        "nas:/models /mnt/nas nfs4 rw,relatime,vers=4.2,rsize=1048576 0 0\n"
        "/dev/nvme1n1 /mnt/nas/fast xfs rw 0 0\n"
        "//nas/share /mnt/my\\040share cifs rw,relatime,vers=3.1.1 0 0\n"
    )
    assert network_filesystem(Path(path), tree(tmp_path, {"proc/mounts": mounts})) == kind


def test_programs_are_really_run() -> None:
    assert machine.run_command([sys.executable, "-c", "print('hello')"]) == b"hello\n"
    assert machine.run_command([sys.executable, "-c", "print('hello'); raise SystemExit(9)"]) is None
    assert machine.run_command(["no-such-program-anywhere"]) is None


@pytest.mark.skipif(platform.system() != "Linux", reason="what the C library says comes from the same files")
def test_this_machine_is_what_the_c_library_says() -> None:
    found = probe_machine()
    assert found.ram == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.threads == os.cpu_count()
    assert 0 < found.cores <= found.threads
    assert 0 < found.ram_available <= found.ram
