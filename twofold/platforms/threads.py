"""Keep a team of threads from burning the processor while it waits, and no larger than what this process may use.

OpenMP's threads spin at the end of every operation before they sleep. When another process takes one of the cores, the
others spin for it through whole time slices: an operation of 0.2 ms was measured at 16 ms, with torch on four busy
cores. A short spin costs nothing on an idle machine and keeps a busy one usable.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from .cores import usable_cores

SPINS = "200"
"""Turns of the waiting loop, about 20 microseconds: the time between two operations, not that of a time slice."""


def bound_spin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spin of OpenMP teams, unless the user chose. It is read once: call this before torch loads."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def bound_team(environment: MutableMapping[str, str] = os.environ) -> None:
    """Cut OpenMP's teams to a container's quota, unless the user chose; like `bound_spin`, before torch loads.

    OpenMP sees the affinity mask but not a quota: sixty-four threads that share two processors mostly wait.
    """
    if "OMP_NUM_THREADS" not in environment and usable_cores() < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(usable_cores())
