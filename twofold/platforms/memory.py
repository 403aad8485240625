"""The memory this process may use: the machine's, cut by every control group above it.

Asking before loading is what turns the kernel's out-of-memory killer into one line that names the fix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import cgroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes in `total`, and `available` of them now; `limit` says who set the total ("machine" or a cgroup's path)."""

    total: int
    available: int
    limit: str = "machine"


def read_memory(proc: Path = cgroup.PROC, cgroups: Path = cgroup.CGROUPS) -> Memory:
    """Read the limits as they stand. Page cache counts as available: the kernel gives it back when asked."""
    total, available, limit = *_machine(proc), "machine"
    for place, version in cgroup.directories("memory", proc, cgroups):
        most, used = _group(place, version)
        if most is None:
            continue
        if most < total:
            total, limit = most, str(place)
        available = min(available, max(0, most - used))
    return Memory(total=total, available=min(available, total), limit=limit)


def free_on(device: str) -> int:
    """Bytes that are free where tensors of a device lie: this process's share of the machine, or the device's own."""
    if not device.startswith("cuda"):
        return read_memory().available
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def shortage(error: BaseException) -> str | None:
    """What could not be had when an allocation failed, in plain words; None when the error is another."""
    text = str(error)
    if not isinstance(error, MemoryError) and "can't allocate memory" not in text and "out of memory" not in text:
        return None
    asked = re.search(r"allocate (\d+) bytes", text) or re.search(r"allocate ([\d.]+ [KMGT]i?B)", text)
    if asked is None:
        return "an allocation failed"
    return (
        f"{int(asked[1]) / 2**20:,.1f} MiB more could not be had"
        if asked[1].isdigit()
        else f"{asked[1]} more could not be had"
    )


def _machine(proc: Path) -> tuple[int, int]:
    info = proc / "meminfo"
    if info.exists():
        total = cgroup.field(info, "MemTotal") * 1024
        return total, cgroup.field(info, "MemAvailable") * 1024 or total
    import psutil

    seen = psutil.virtual_memory()
    return int(seen.total), int(seen.available)


def _group(place: Path, version: int) -> tuple[int | None, int]:
    """One group's limit in bytes (None: no limit), and what is used of it less the page cache it could drop."""
    if version == 2:
        most, used = cgroup.number(place / "memory.max"), cgroup.number(place / "memory.current")
        cache = cgroup.field(place / "memory.stat", "inactive_file")
    else:
        most, used = cgroup.number(place / "memory.limit_in_bytes"), cgroup.number(place / "memory.usage_in_bytes")
        cache = cgroup.field(place / "memory.stat", "total_inactive_file")
    return most, max(0, (used or 0) - cache)
