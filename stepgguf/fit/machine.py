"""What this machine is: processor, memory, GPUs and the limits that the system puts on them.

    Linux    /proc/{cpuinfo,meminfo,mounts}  /proc/self/cgroup  /sys/fs/cgroup/**/memory.max
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

Run = Callable[[Sequence[str]], "bytes | None"]
Kind = Literal["spark", "mac", "strix", "gpu", "cpu"]

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_PAGE = 4096  # of ttm.pages_limit
_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.rclone"))


@dataclass(frozen=True, slots=True)
class AmdMemory:
    """What the amdgpu driver may use of an APU's memory, in bytes: set aside by the firmware, and mapped as needed."""

    vram: int
    gtt: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes in bytes. container_limit: the least memory.max of the cgroups; wired_limit: macOS, 0 is its default."""

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
    def kind(self) -> Kind:
        """The classes that share their traps. All but "gpu" have one memory for everything."""
        if any("GB10" in gpu.name for gpu in self.gpus):
            return "spark"
        if self.system == "Darwin":
            return "mac"
        if "ryzen ai max" in self.cpu.lower() and self.amd is not None:
            return "strix"
        return "gpu" if any(gpu.total for gpu in self.gpus) else "cpu"


def run(command: Sequence[str]) -> bytes | None:
    """What a program prints; None if it is not there, fails or takes longer than 10 s."""
    try:
        return subprocess.run(
            command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=10
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def probe(system: str | None = None, *, root: Path = Path("/"), run: Run = run) -> Machine:
    """This machine. `system` as platform.system() names it; others than Darwin are read like Linux."""
    system = system or platform.system()
    return _macos(run) if system == "Darwin" else _linux(system, root, run)


def _linux(system: str, root: Path, run: Run) -> Machine:
    cpuinfo, memory = _read(root / "proc/cpuinfo"), _meminfo(_read(root / "proc/meminfo"))
    threads = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or os.cpu_count() or 1
    return Machine(
        system=system,
        architecture=platform.machine(),
        cpu=_field(cpuinfo, "model name") or platform.machine(),
        cores=_cores(cpuinfo) or threads,
        threads=threads,
        features=frozenset((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split()),
        ram=memory.get("MemTotal", 0),
        ram_available=memory.get("MemAvailable", 0),
        swap=memory.get("SwapTotal", 0),
        container_limit=container_limit(root),
        gpus=nvidia_gpus(run),
        amd=amd_memory(root),
    )


def _macos(run: Run) -> Machine:
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
        ram_available=_vm_stat((run(("vm_stat",)) or b"").decode()),
        swap=int(float(swap[1]) * 2**20) if swap else 0,
        wired_limit=int(wired) * 2**20 if wired else None,
    )


def nvidia_gpus(run: Run) -> tuple[Gpu, ...]:
    """One per line; a GPU that shares the system's memory answers [N/A] for its own."""
    gpus = []
    for line in (run(_NVIDIA_SMI) or b"").decode(errors="replace").splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        total, free = (int(size) * 2**20 if size.isdigit() else None for size in sizes)
        gpus.append(Gpu(name, total, free))
    return tuple(gpus)


def amd_memory(root: Path) -> AmdMemory | None:
    """Of the card with the most; None without the amdgpu driver. ttm.pages_limit also bounds what can be mapped."""
    cards = sorted(
        (_number(path) or 0, _number(path.with_name("mem_info_vram_total")) or 0)
        for path in (root / "sys/class/drm").glob("card*/device/mem_info_gtt_total")
    )
    if not cards:
        return None
    gtt, vram = cards[-1]
    pages = _number(root / "sys/module/ttm/parameters/pages_limit")
    return AmdMemory(vram, gtt if pages is None else min(gtt, pages * _PAGE))


def container_limit(root: Path) -> int | None:
    """cgroup v2: every group from the process's own up to the root may set a limit; the least one holds."""
    own = re.search(r"^0::(/.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    if own is None:
        return None
    group = Path(own[1].lstrip("/"))
    limits = [_number(root / "sys/fs/cgroup" / g / "memory.max") for g in (group, *group.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def network_filesystem(path: Path, root: Path = Path("/")) -> str | None:
    """The type of the file system that holds the path, if it is one that is reached over a network."""
    mounts = [line.split()[1:3] for line in _read(root / "proc/mounts").splitlines()]
    target = path.resolve()
    holding = [(m, t) for m, t in mounts if target.is_relative_to(re.sub(r"\\040", " ", m))]
    kind = max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind if kind in _NETWORK else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _meminfo(text: str) -> dict[str, int]:
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _cores(cpuinfo: str) -> int:
    """x86 numbers the cores within a package; ARM does not, and has one thread per core."""
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", cpuinfo, re.MULTILINE)
    return len(set(zip(packages, re.findall(r"^core id\s*:\s*(\d+)$", cpuinfo, re.MULTILINE), strict=False)))


def _vm_stat(text: str) -> int:
    """What programs could get: free and inactive pages, as psutil counts them, or free ones and cached files, which a
    file that was just written or read makes many of; whichever is more."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = {name: int(n) for name, n in re.findall(r"^(.+?):\s+(\d+)\.$", text, re.MULTILINE)}
    files = pages.get("Pages purgeable", 0) + pages.get("File-backed pages", 0)  # read ahead ("speculative") included
    available = pages.get("Pages free", 0) + max(pages.get("Pages inactive", 0), files)
    return available * int(page[1]) if page else 0
