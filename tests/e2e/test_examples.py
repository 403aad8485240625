"""Every example is at most 60 lines, runs, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# What each must print, where a C++ compiler is there and where it is not, and what it is told where it is not.
SORTED = (
    r"twofold: train_batch_size 16 = 8 a rank x 2 micro-batches x 1 ranks\n"
    r"twofold: step 50, .*\ntwofold: step 100, skipped 0, loss 0\.\d+, .*\n\{'read': 1600\}\n"
)
REWARDED = (
    r"(.*\n)*" + "".join(rf"step {n}: reward 0\.\d+, kl 0\.0, 1\d tokens\n" for n in range(1, 5)) + r"def greet\(.*\n"
)
TOLD = r"  \d+ tokens of the model \(\d\.\d\d nats each\), [1-9]\d* of the tool, (stop|length)\n"
TALKED = rf"((join|gcd|dedent)\n({TOLD}){{2}}){{3}}"
PRINTS = {
    "custom_kernel.py": (
        r"swish_gate, 'cpp': 180 cases agree .*\nstep 0: .* 'cpp'\nstep 29: .* 'cpp'\n",
        r"swish_gate, 'cpp': not checked, no C\+\+ compiler .*\nstep 0: .* 'reference'\nstep 29: .* 'reference'\n",
        "The reference in torch serves instead",
    ),
    "align_reward.py": (REWARDED, REWARDED, None),
    "rollout_tool.py": (TALKED, TALKED, None),
    "deepspeed_port.py": (SORTED, SORTED, None),  # needs no kernel of its own; ours may be built already
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES} == set(PRINTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path, compiler: bool, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TWOFOLD_KERNELS", None)
    if path.name == "custom_kernel.py" or not compiler:  # the package's own kernels take a minute to build
        env |= {"TWOFOLD_CACHE": str(tmp_path / "cache")}
    if not compiler:
        env |= {"PATH": str(tmp_path), "CXX": ""}
    done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with_one, without, why = PRINTS[path.name]
    assert re.fullmatch(with_one if compiler else without, done.stdout), done.stdout + done.stderr
    if not compiler and why:
        assert done.stderr.count(why) == 1


def test_the_kernel_of_the_docs_is_right(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    place = tmp_path / "kernel.py"
    place.write_text(program, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "TWOFOLD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(place)], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("scaled_relu, 'cpp': 180 cases agree"), done.stdout + done.stderr
