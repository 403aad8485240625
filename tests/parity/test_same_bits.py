"""The sampler's and the trainer's kernels have one bit pattern, whatever instructions they are built for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_portable_code_has_the_bits_of_this_machines() -> None:
    digests = []
    for isa in (native.best(), "portable"):
        environment = {**os.environ, "TWOFOLD_ISA": isa, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "kernel_bits.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        ran, digest = done.stdout.split()
        assert ran == isa
        digests.append(digest)
    assert digests[0] == digests[1]
