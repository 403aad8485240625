"""The processors this process may use: fewer than the machine has, under an affinity mask or a container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

from . import cgroup


def usable_cores(proc: Path = cgroup.PROC, cgroups: Path = cgroup.CGROUPS) -> int:
    """How many threads can truly run at once here, at least 1: the affinity mask cut by every cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for place, version in cgroup.directories("cpu", proc, cgroups):
        quota = _quota(place, version)
        if quota is not None:
            cores = min(cores, math.ceil(quota))
    return max(1, cores)


def _quota(place: Path, version: int) -> float | None:
    if version == 1:
        quota, period = cgroup.number(place / "cpu.cfs_quota_us"), cgroup.number(place / "cpu.cfs_period_us")
        return quota / period if quota and period else None
    try:
        quota_text, period_text = (place / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota_text == "max" else int(quota_text) / int(period_text)
