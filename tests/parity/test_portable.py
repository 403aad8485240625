"""The same bits on every instruction set and on any number of threads; and no compiler at all still serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny_checkpoint import make_checkpoint
from twofold.kernels import build, native

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


GENERATE = """
import sys
from pathlib import Path
from tests.e2e.tiny_checkpoint import make_checkpoint
from twofold.kernels import build, native
native.BUILT = Path("nowhere")
from twofold.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_a_compiler_a_model_is_served_on_the_references_and_one_line_says_what_that_costs(
    tmp_path: Path,
) -> None:
    model, empty = make_checkpoint(tmp_path / "tiny"), tmp_path / "bin"
    empty.mkdir()
    own = {"PATH": str(empty), "TWOFOLD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "TWOFOLD_ISA")}
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, "generate", "--model", str(model), "--prompt", "def add", "--max-tokens", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE.parents[1],
        env=kept | own,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if native.COST in line]
    assert len(lines) == 1 and "no C++ compiler was found" in lines[0]


def test_a_library_built_elsewhere_serves_where_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    try:
        built = build.build("one", [source], into=tmp_path)
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.build("one", [source], into=tmp_path) == built
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build("one", [source], ["-DOTHER"], into=tmp_path)
    source.write_text('extern "C" int one() { return 2; }')
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build("one", [source], into=tmp_path)
