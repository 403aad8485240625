"""The vector instructions of this processor, the ones that decide which kernels can be fast here."""

from __future__ import annotations

import platform
from pathlib import Path

from . import cgroup

# As /proc/cpuinfo spells them, widest matter first.
_WANTED = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


def instruction_sets(proc: Path = cgroup.PROC) -> tuple[str, ...]:
    """Those of the wanted sets that the processor says it has, () where the system does not tell."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return tuple(name for name in _WANTED if name in flags)
    return ()


def processor_name(proc: Path = cgroup.PROC) -> str:
    """What the processor calls itself, or the machine's architecture where the system does not tell."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name" and value.strip():
            return value.strip()
    return platform.machine()
