"""What this machine is: processor, memory, GPUs and the limits that the system puts on them.

    Linux    /proc/{cpuinfo,meminfo,mounts}  /proc/self/cgroup  /sys/fs/cgroup/**/memory.{max,limit_in_bytes}
             amdgpu: /sys/class/drm/card*/device/mem_info_{vram,gtt}_total  /sys/module/ttm/parameters/pages_limit
    macOS    sysctl -n NAME  vm_stat
    NVIDIA   nvidia-smi --query-gpu=name,memory.total,memory.free

Nothing is loaded and nothing is changed. `root` and `run` stand for the file system and for starting programs, so that
a machine can be described by the files and outputs that it has.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepgguf.runtime.llama_build import Gpu

RunCommand = Callable[[Sequence[str]], "bytes | None"]
MachineKind = Literal["spark", "mac", "strix", "gpu", "cpu"]
SHARED_MEMORY = {"spark": "DGX Spark", "mac": "Mac", "strix": "Strix Halo"}  # kinds whose CPU and GPU have one memory

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_PAGE = 4096  # of ttm.pages_limit
_NO_LIMIT = 2**62  # cgroup v1 says the most that it can count
_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.rclone"))


@dataclass(frozen=True, slots=True)
class AmdMemory:
    """What the amdgpu driver may use of an APU's memory, in bytes: set aside by the firmware, and mapped as needed."""

    vram: int
    gtt: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes in bytes. container_limit: the least memory limit of the cgroups; wired_limit: macOS, 0 is its default."""

    system: str
    architecture: str
    cpu: str
    cores: int
    threads: int
    features: frozenset[str]
    ram: int
    ram_available: int
    swap: int
    container_limit: int | None = None
    gpus: tuple[Gpu, ...] = ()
    wired_limit: int | None = None
    amd: AmdMemory | None = None

    @property
    def kind(self) -> MachineKind:
        """The class of machines that share its traps. All but "gpu" have one memory for everything."""
        if any("GB10" in gpu.name for gpu in self.gpus):
            return "spark"
        if self.system == "Darwin":
            return "mac"
        if "ryzen ai max" in self.cpu.lower() and self.amd is not None:
            return "strix"
        return "gpu" if any(gpu.total for gpu in self.gpus) else "cpu"


def use_mmap(machine: Machine, wish: bool | None) -> bool:
    """Whether to map the model's file: as wished, by default (None) everywhere but on a DGX Spark.

    Its CUDA driver takes mapped pages slowly: 22 s were measured for reading a model, and 224 s for mapping it.
    """
    return machine.kind != "spark" if wish is None else wish


def run_command(command: Sequence[str]) -> bytes | None:
    """Return what a program prints; None if it is not there, fails or takes longer than 10 s."""
    try:
        return subprocess.run(
            command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=10
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def probe_machine(system: str | None = None, *, root: Path = Path("/"), run: RunCommand = run_command) -> Machine:
    """Describe this machine. `system` as platform.system() names it; others than Darwin are read like Linux."""
    system = system or platform.system()
    return _probe_macos(run) if system == "Darwin" else _probe_linux(system, root, run)


def _probe_linux(system: str, root: Path, run: RunCommand) -> Machine:
    cpuinfo, memory = _read_text(root / "proc/cpuinfo"), _parse_meminfo(_read_text(root / "proc/meminfo"))
    threads = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or os.cpu_count() or 1
    return Machine(
        system=system,
        architecture=platform.machine(),
        cpu=_cpuinfo_field(cpuinfo, "model name") or platform.machine(),
        cores=_count_cores(cpuinfo) or threads,
        threads=threads,
        features=frozenset((_cpuinfo_field(cpuinfo, "flags") or _cpuinfo_field(cpuinfo, "Features") or "").split()),
        ram=memory.get("MemTotal", 0),
        ram_available=memory.get("MemAvailable", 0),
        swap=memory.get("SwapTotal", 0),
        container_limit=container_limit(root),
        gpus=nvidia_gpus(run),
        amd=amd_memory(root),
    )


def _probe_macos(run: RunCommand) -> Machine:
    def sysctl(name: str) -> str:
        return (run(("sysctl", "-n", name)) or b"").decode().strip()

    swap = re.match(r"total = ([\d.]+)M", sysctl("vm.swapusage"))
    wired = sysctl("iogpu.wired_limit_mb")
    return Machine(
        system="Darwin",
        architecture=sysctl("hw.machine"),
        cpu=sysctl("machdep.cpu.brand_string"),
        cores=int(sysctl("hw.physicalcpu") or 1),
        threads=int(sysctl("hw.logicalcpu") or 1),
        features=frozenset(),
        ram=int(sysctl("hw.memsize") or 0),
        ram_available=_available_memory((run(("vm_stat",)) or b"").decode()),
        swap=int(float(swap[1]) * 2**20) if swap else 0,
        wired_limit=int(wired) * 2**20 if wired else None,
    )


def nvidia_gpus(run: RunCommand) -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists, one per line; a GPU that shares the system's memory answers [N/A] for its own."""
    gpus = []
    for line in (run(_NVIDIA_SMI) or b"").decode(errors="replace").splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        total, free = (int(size) * 2**20 if size.isdigit() else None for size in sizes)
        gpus.append(Gpu(name, total, free))
    return tuple(gpus)


def amd_memory(root: Path) -> AmdMemory | None:
    """What the amdgpu driver gives the card with the most memory; None without that driver.

    ttm.pages_limit bounds what can be mapped, whatever the driver says.
    """
    cards = sorted(
        (_read_number(path) or 0, _read_number(path.with_name("mem_info_vram_total")) or 0)
        for path in (root / "sys/class/drm").glob("card*/device/mem_info_gtt_total")
    )
    if not cards:
        return None
    gtt, vram = cards[-1]
    # amdgpu maps through ttm, whose limit in pages holds where it is lower.
    pages = _read_number(root / "sys/module/ttm/parameters/pages_limit")
    return AmdMemory(vram, gtt if pages is None else min(gtt, pages * _PAGE))


def container_limit(root: Path) -> int | None:
    """The memory limit that holds for this process, in bytes; None if no cgroup sets one.

    Every group from the process's own up to the root may set one, and the least holds. In cgroup v2 it is in
    memory.max; in v1, which older systems have, in memory.limit_in_bytes of a tree of its own.
    """
    text, folder = _read_text(root / "proc/self/cgroup"), root / "sys/fs/cgroup"
    limits: list[int | None] = []
    for pattern, tree, file in (
        (r"^0::/(.*)$", folder, "memory.max"),
        (r"^\d+:(?:.*,)?memory(?:,.*)?:/(.*)$", folder / "memory", "memory.limit_in_bytes"),
    ):
        if (own := re.search(pattern, text, re.MULTILINE)) is not None:
            group = Path(own[1])
            limits += [_read_number(tree / g / file) for g in (group, *group.parents)]
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def network_filesystem(path: Path, root: Path = Path("/")) -> str | None:
    """The type of the file system that holds the path if it is reached over a network, else None."""
    mounts = [line.split()[1:3] for line in _read_text(root / "proc/mounts").splitlines()]
    target = path.resolve()
    holding = [(m, t) for m, t in mounts if target.is_relative_to(re.sub(r"\\040", " ", m))]
    _, fs_type = max(holding, key=lambda mount: len(mount[0]), default=("", ""))  # the innermost mount has it
    return fs_type if fs_type in _NETWORK else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None


def _cpuinfo_field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _parse_meminfo(text: str) -> dict[str, int]:
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _count_cores(cpuinfo: str) -> int:
    """Physical cores, by (package, core) pairs; 0 on ARM, which numbers neither and has one thread per core."""
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", cpuinfo, re.MULTILINE)
    return len(set(zip(packages, re.findall(r"^core id\s*:\s*(\d+)$", cpuinfo, re.MULTILINE), strict=False)))


def _available_memory(vm_stat: str) -> int:
    """What programs could get on macOS, in bytes: free pages and the inactive ones, as psutil counts them, or free ones
    and cached files, which a file that was just written or read makes many of; whichever is more."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = {name: int(n) for name, n in re.findall(r"^(.+?):\s+(\d+)\.$", vm_stat, re.MULTILINE)}
    files = pages.get("Pages purgeable", 0) + pages.get("File-backed pages", 0)  # read ahead ("speculative") included
    available = pages.get("Pages free", 0) + max(pages.get("Pages inactive", 0), files)
    return available * int(page[1]) if page else 0
