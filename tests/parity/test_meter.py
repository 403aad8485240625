"""The share of the peak: the model's work from its spec is what the ops count; the peak is measured once."""

from __future__ import annotations

import pytest
import torch
from test_recompute import LENGTHS, fresh, gradients, spec_of

from twofold.kernels.flops import FORMULAS, PASSES, UNCOUNTED, count, pairs
from twofold.kernels.op import ops
from twofold.train import meter
from twofold.train.meter import Meter, forward_flops, matmul_peak

FAMILIES = ("llama", "mistral-window", "gemma2-caps", "phi", "qwen2-moe", "opt-350m", "gpt2", "gptj")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_of_a_spec_is_what_its_ops_count(family: str) -> None:
    spec = spec_of(family)
    with count() as found:
        gradients(fresh(spec))
    assert forward_flops(spec, LENGTHS, sum(LENGTHS)) == found.forward


def test_pairs() -> None:
    for length, window in ((1, None), (9, None), (9, 4), (9, 9), (9, 20), (5, 1)):
        seen = [(i, j) for i in range(length) for j in range(i + 1) if window is None or j > i - window]
        assert pairs([length, length], window) == 2 * len(seen)


def test_every_op_is_counted_or_said_not_to_be() -> None:
    kinds = (set(FORMULAS), PASSES, UNCOUNTED)
    for name in ops:
        assert sum(name in kind for kind in kinds) == 1, f"{name}: give kernels/flops.py its formula, or its place"


def test_the_peak_is_measured_once_a_machine_and_thread_count(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(meter, "measure", lambda device, dtype: calls.append(dtype) or 5e9)
    device = torch.device("cpu")
    assert [matmul_peak(device, torch.float32) for _ in range(2)] == [5e9, 5e9]
    assert matmul_peak(device, torch.bfloat16) == 5e9
    assert calls == [torch.float32, torch.bfloat16]
    (tmp_path / "kernels" / "matmul.json").write_text("torn")
    assert matmul_peak(device, torch.float32) == 5e9 and len(calls) == 3
    known = Meter(spec_of("llama"), device, 5e9)
    figures = known.figures(2e9)
    assert figures["peak_share"] == 0.4 and figures["memory"] > 1 << 20


def test_a_measured_peak_is_a_speed() -> None:
    assert 1e8 < meter.measure(torch.device("cpu"), torch.float32, seconds=0.02) < 1e14
