"""Keep a team of threads from burning the processor while it waits.

OpenMP's threads spin at the end of every operation before they sleep. When another process takes one of the cores, the
others spin for it through whole time slices: an operation of 0.2 ms was measured at 16 ms, with torch on four busy
cores. A short spin costs nothing on an idle machine and keeps a busy one usable.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = "200"
"""Turns of the waiting loop, about 20 microseconds: the time between two operations, not that of a time slice."""


def bound_spin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spin of OpenMP teams, unless the user chose. It is read once: call this before torch loads."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
