"""Memory that was freed and is asked for again is not cleared by the system a second time."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
import ctypes, resource
from twofold.platforms import keep_freed

kept = keep_freed()
libc, size = ctypes.CDLL(None), 8 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
for turn in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc(size)
    ctypes.memset(piece, 1, size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    libc.free(piece)
print(int(kept), faults)
"""


def test_a_second_piece_of_the_same_size_faults_no_page() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    if not kept:
        pytest.skip("another allocator than glibc's")
    assert faults < 200  # of 2,048 pages
