"""Every op can be measured, and the machine's own limits are what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import limits
import pytest
import torch
from case import CASES, QUICK, held
from kernels import measured, registered, serving

from twofold.kernels import Op
from twofold.platforms import find_compiler

OPS = registered()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_a_case_or_a_sample(op: Op[..., Any]) -> None:
    found = measured(op, QUICK)
    assert found, f"{op.name} has neither a case in benchmarks/cases.py nor a sample"
    assert all(case.moved > 0 for case in found)


@pytest.mark.parametrize("op", [op for op in OPS if op.name in CASES], ids=lambda op: op.name)
@torch.inference_mode()
def test_a_case_fits_its_op_and_what_torch_does_instead(op: Op[..., Any]) -> None:
    case = measured(op, QUICK)[0]
    args = case.make()
    ours = op(*args, **case.keywords)
    assert serving(op, args, case.keywords)[0] in ("reference", *op.implementations)
    if case.plain is not None:
        theirs = case.plain(*args, **case.keywords)
        assert numel(ours) == numel(theirs) or op.name == "square_sums"  # one for each piece; torch's is one for all


def numel(result: Any) -> int:
    return result.numel() if isinstance(result, torch.Tensor) else int(result is not None)


def test_held_counts_nested_tensors_once() -> None:
    x = torch.zeros(3, 4)
    assert held((x, (x.half(), [x.to(torch.int8)]), 5, "silu")) == 48 + 24 + 12
    assert held(([Holder(x, None)], Holder(x.half(), x))) == 48 + 24 + 48


@dataclass(slots=True)
class Holder:
    one: torch.Tensor
    other: torch.Tensor | None


def test_limits_with_a_compiler() -> None:
    lib = limits.library()
    if lib is None:
        assert find_compiler() is None, "there is a compiler, and it could not build benchmarks/limits.cpp"
        return
    fp32 = limits.arithmetic(lib.multiply_add, 1, 2, lib, 2.0)
    int8 = limits.arithmetic(lib.dot, 1, 8, lib, 2.0)
    assert 1 < fp32 < 2000 and 1 < int8 < 8000
    assert 0.5 < limits.read_bandwidth(1, lib, 16) < 2000
    assert lib.dot_name()


def test_limits_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "library", lambda: None)
    monkeypatch.setattr(limits, "torch_read", lambda threads, mebibytes: 10.0)
    monkeypatch.setattr(limits, "torch_matmul", lambda threads, size, dtype=torch.float32: 50.0)
    found = limits.measure(1, quick=True)
    assert (found["read_gb_s"], found["fma_gflop_s"], found["int8_gop_s"]) == (10.0, 50.0, 50.0)
    assert "torch" in limits.line(found)


def test_torchs_own_figures_are_positive() -> None:
    assert limits.torch_read(1, 1) > 0
    assert limits.torch_matmul(1, 64) > 0 and limits.torch_matmul(1, 64, torch.int8) > 0
