"""What this host has: cores by place, EFA devices, GPUs. Read from /sys and /dev."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")


@dataclass(frozen=True)
class Core:
    """A physical core: the CPUs (hardware threads) of it that we may use, and its NUMA node."""

    cpus: tuple[int, ...]
    numa: int


@dataclass(frozen=True)
class Efa:
    """An EFA device, by libfabric's name for it, and its NUMA node."""

    domain: str
    numa: int


def cores(allowed: set[int] | None = None, root: Path = SYS) -> list[Core]:
    """Cores this process may run on, neighbours beside each other."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    found: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(allowed):
        folder = root / f"devices/system/cpu/cpu{cpu}"
        package, core = (_number(folder / "topology" / name) for name in ("physical_package_id", "core_id"))
        # Without a topology every CPU is a core of its own.
        key = (_numa_of_cpu(folder), max(package, 0), core if core >= 0 else -1 - cpu)
        found.setdefault(key, []).append(cpu)
    return [Core(tuple(cpus), key[0]) for key, cpus in sorted(found.items())]


def share_of(all_cores: list[Core], rank: int, ranks: int) -> list[Core]:
    """The `rank`-th of `ranks` shares; all of them where there are fewer cores than ranks."""
    if len(all_cores) < ranks:
        return all_cores
    return all_cores[len(all_cores) * rank // ranks : len(all_cores) * (rank + 1) // ranks]


def efa_devices(root: Path = SYS) -> list[Efa]:
    """Elastic Fabric Adapters."""
    folder = root / "class/infiniband"
    found = []
    for device in sorted(folder.iterdir()) if folder.is_dir() else []:
        driver = device / "device/driver"
        if driver.exists() and driver.resolve().name == "efa":
            found.append(Efa(f"{device.name}-rdm", _number(device / "device/numa_node")))
    return found


def near(devices: list[Efa], share: list[Core]) -> list[Efa]:
    """The devices of the NUMA node `share` lies in, where every node with devices has equally many; else all."""
    by_node: dict[int, list[Efa]] = {}
    for device in devices:
        by_node.setdefault(device.numa, []).append(device)
    nodes = {core.numa for core in share}
    even = len({len(group) for group in by_node.values()}) == 1
    if len(by_node) < 2 or not even or len(nodes) != 1:
        return devices
    return by_node.get(nodes.pop(), devices)


def gpus(environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that programs see here: those of CUDA_VISIBLE_DEVICES where it is set, else all this host shows."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in dev.iterdir())
    count = 0
    for word in visible.split(","):
        # CUDA too stops at what names no device, such as -1.
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", word.strip()):
            break
        count += 1
    return count


def _numa_of_cpu(folder: Path) -> int:
    nodes = [int(e.name[4:]) for e in folder.glob("node[0-9]*")] if folder.is_dir() else []
    return min(nodes, default=0)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1
