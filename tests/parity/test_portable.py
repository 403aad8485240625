"""The same bits on every instruction set and on any number of threads; and no compiler at all still serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.kernels import native

HERE = Path(__file__).parent
CALLS = 12


def digests(**environment: str) -> list[str]:
    """What `fuzz_kernels` prints of every op's results."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.fuzz_kernels", str(CALLS)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")
def test_every_instruction_set_and_number_of_threads_has_the_same_bits() -> None:
    here = digests()
    portable = digests(TWOFOLD_ISA="portable", FUZZ_THREADS="2")
    assert here[0] == f"kernels {native.best()}" and portable[0] == "kernels portable"
    assert here[1:] == portable[1:]
    assert here[1:] == digests(FUZZ_THREADS="1")[1:]
