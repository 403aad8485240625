"""The GPU's benchmark without a GPU: one clear line, and the sums that its shares are made of."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_without_a_device_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick"],
        env={"PYTHONPATH": str(BENCHMARKS.parent), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "no" in done.stderr and "CUDA device" in done.stderr


def test_a_7b_llama_has_the_weights_and_the_work_that_it_has(gpu):
    cost = gpu.Cost.of(gpu.llama(32))
    assert cost.linear + 2 * cost.head == pytest.approx(6.74e9, rel=0.01)
    assert cost.kv_bytes == 2 * 32 * 4096 * 2
    whole = cost.prompt_flops(2600) + cost.decode_flops(2600, 59)
    assert whole == pytest.approx(2 * 6.476e9 * 2659 + 32 * 4 * 4096 * 2659**2 / 2, rel=0.002)
    assert 14.5 * whole / 989e12 == pytest.approx(0.55, abs=0.02)


def test_pairs_of_tokens_are_counted_once(gpu):
    cost = gpu.Cost(linear=0, head=0, attention=1, kv_bytes=1)
    assert cost.prompt_flops(10) + cost.decode_flops(10, 7) == cost.prompt_flops(17)
    assert cost.decode_bytes(10, 2, 3) == 3 * (11 + 12)


def test_the_floor_is_the_slower_of_reading_and_multiplying(gpu):
    cost = gpu.Cost.of(gpu.llama(32))
    reading = gpu.Limits(flops=1e18, bytes=3e12)
    few, many = (gpu.floor(cost, reading, 500, 150, rows) for rows in (1, 64))
    assert few == pytest.approx(149 * 2 * 6.6e9 / 3e12, rel=0.05)
    assert few < many < 3 * few
    slow = gpu.Limits(flops=1e12, bytes=3e12)
    assert gpu.floor(cost, slow, 500, 150, 64) > 64 * cost.prompt_flops(500) / 1e12
