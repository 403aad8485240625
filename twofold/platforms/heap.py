"""Memory that was freed stays with the process, for work that asks for the same again a moment later.

A training step frees what the next one allocates. glibc hands large pieces back to the system at once, which then
clears every page of them again at its first touch.
"""

from __future__ import annotations

import ctypes

TRIM, MAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
LARGEST = 32 << 20
"""The most that glibc takes from its heap; larger pieces are mapped, and unmapped when freed."""


def keep_freed() -> bool:
    """Tell the C library's allocator so; False where it is another one, which is left as it is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(MAP, LARGEST) and mallopt(TRIM, (1 << 31) - 1))
