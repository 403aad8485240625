"""The CPU kernels under sanitizers, on random calls: nothing beyond a buffer, nothing undefined, no race."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity import fuzz_kernels
from twofold.kernels import native
from twofold.platforms import find_compiler

HERE = Path(__file__).parent
CALLS = 4
COMPILER = find_compiler()

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")


def runtime(name: str) -> str:
    """The path of a sanitizer's runtime, "" where the compiler has none."""
    if COMPILER is None:
        return ""
    asked = subprocess.run([COMPILER.path, f"-print-file-name={name}"], capture_output=True, text=True)
    found = asked.stdout.strip()
    return found if os.path.isabs(found) else ""


ASAN, TSAN = runtime("libasan.so"), runtime("libtsan.so")


def fuzz(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run of `fuzz_kernels`; what it printed and whether a sanitizer stopped it."""
    return subprocess.run(
        [sys.executable, "-m", "tests.parity.fuzz_kernels", str(CALLS), *options],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def sanitized(isa: str, *options: str) -> subprocess.CompletedProcess[str]:
    watch = {"LD_PRELOAD": ASAN, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return fuzz("--sanitized", *options, TWOFOLD_ISA=isa, **watch)


def test_every_op_with_a_cpu_kernel_is_fuzzed() -> None:
    assert not fuzz_kernels.uncovered(), "add them to a case of fuzz_kernels.py"


@pytest.mark.skipif(not ASAN, reason="the compiler has no address sanitizer")
@pytest.mark.parametrize("isa", sorted({native.best(), "portable"}))
def test_no_report_of_the_address_and_undefined_behaviour_sanitizers(isa: str) -> None:
    done = sanitized(isa)
    assert done.returncode == 0, done.stderr[-4000:]
    plain = fuzz(TWOFOLD_ISA=isa)
    assert plain.returncode == 0, plain.stderr[-4000:]
    assert done.stdout == plain.stdout, "another optimisation, other bits"
    assert done.stdout.endswith("stages not run: none\n"), "call them in a case of fuzz_kernels.py"


@pytest.mark.skipif(not ASAN, reason="the compiler has no address sanitizer")
def test_the_sanitizer_sees_a_read_beyond_the_end() -> None:
    done = sanitized(native.best(), "--past-the-end")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(not TSAN, reason="the compiler has no thread sanitizer")
def test_the_team_of_threads_has_no_race(tmp_path: Path) -> None:
    assert COMPILER is not None
    driver = tmp_path / "team"
    sources = [native.HERE / "team.cpp", native.HERE / "program.cpp", HERE / "team_driver.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{native.HERE}"]
    subprocess.run([COMPILER.path, *flags, *map(str, sources), "-o", str(driver)], check=True, timeout=300)

    def drive(*options: str) -> subprocess.CompletedProcess[str]:
        watch = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
        return subprocess.run([str(driver), *options], capture_output=True, text=True, timeout=300, env=watch)

    done = drive("100")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-4000:]
    race = drive("10", "race")
    assert race.returncode != 0 and "data race" in race.stderr
