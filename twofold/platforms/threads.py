"""Keep a team of threads from burning the processor while it waits, and leave a core to everybody else.

OpenMP's threads spin at the end of every operation before they sleep. When another process takes one of the cores, the
others spin for it through whole time slices: an operation of 0.2 ms was measured at 16 ms, with torch on four busy
cores, and a workload of 6 seconds at 90. Threads that sleep at once pay for being woken: the same workload on an idle
machine took twice its time. So a team is one smaller than the machine, and spins for longer than the time between two
operations but not for a time slice.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from .cores import usable_cores

SPINS = "20000"
"""Turns of the waiting loop: 0.3 to 2 milliseconds, as long as a pause of the processor takes."""


def bound_spin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spin of OpenMP teams, unless the user chose. It is read once: call this before torch loads."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def team_size(cores: int | None = None) -> int:
    """How many threads compute: of three cores or more one is left to the server's front and to everybody else.

    `cores` is what this process may use, by affinity and quota; OpenMP by itself sees no quota.
    """
    cores = usable_cores() if cores is None else cores
    return cores - 1 if cores > 2 else cores


def bound_team(environment: MutableMapping[str, str] = os.environ, cores: int | None = None) -> None:
    """Make OpenMP's teams of `team_size`, unless the user chose; before torch loads, like the spin."""
    environment.setdefault("OMP_NUM_THREADS", str(team_size(cores)))
