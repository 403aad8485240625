"""The check finds what is wrong with a kernel, and names the call that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels.check import STRIDES, check, lay
from twofold.kernels.custom import Entry, In, Int, Out, cpp
from twofold.kernels.op import Needs, Op

SIZE = Int("T"), Int("D")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "kernel-cache"
    monkeypatch.setenv("TWOFOLD_CACHE", str(folder))
    return folder


def square(x_TD: Tensor) -> Tensor:
    return x_TD * x_TD


def served_by(run: Any, **given: Any) -> Op[..., Any]:
    op = Op(square)
    op.on("mine", **{"why": "mine", "bits": "own"} | given)(run)
    return op


def compiled(body: str, **given: Any) -> Op[..., Any]:
    op = Op(square)
    source = f"void square(const float* x, float* y, int64_t T, int64_t D) {{ {body} }}"
    source += """
    void back(const float* x, const float* grad, float* grad_x, int64_t T, int64_t D) {
        for (int64_t i = 0; i < T * D; ++i) grad_x[i] = grad[i] * x[i];
    }"""
    cpp(op, source=source, forward=Entry("square", In("x_TD"), Out("y_TD"), *SIZE), why="one pass", **given)
    return op


BACK = Entry("back", In("x_TD"), In("grad_y_TD"), Out("grad_x_TD"), *SIZE)
WHOLE = "for (int64_t i = 0; i < T * D; ++i) y[i] = x[i] * x[i];"


@pytest.mark.parametrize(
    ("body", "given", "message"),
    [
        ("for (int64_t i = 0; i <= T * D; ++i) y[i] = x[i] * x[i];", {}, "past the end of an output"),
        ("for (int64_t i = -1; i < T * D; ++i) y[i] = x[i] * x[i];", {}, "before the beginning or past"),
        ("for (int64_t i = 0; i < T * D / 8 * 8; ++i) y[i] = x[i] * x[i];", {}, "output 0"),
        ("for (int64_t i = 0; i < T * D; ++i) y[i] = i % 8 == 7 ? x[i] : x[i] * x[i];", {}, "error .*, bound 1.0e-05"),
        (WHOLE + "for (int64_t i = 0; i < T * D; ++i) ((float*)x)[i] = 0;", {}, "changes its input x_TD"),
        (WHOLE, {"backward": BACK}, r"the gradient of x_TD is .* from the one in fp64, bound 1.0e-04"),
        ("for (int64_t i = 0; i < T * D; ++i) y[i] = x[i] * x[i] * (1 + 1e-7f);", {"bits": "reference"}, "last bit"),
        (WHOLE + "if (T > 2) y[0] += 1e-7f;", {}, "rows 0:1 of T have other bits without the others"),
    ],
)
def test_what_is_wrong_with_a_compiled_kernel(body: str, given: dict[str, Any], message: str) -> None:
    report = check(compiled(body, **given), rows="T")
    assert not report.ok
    text = str(report)
    assert "cases fail. The first: D=" in text
    assert "square(x_TD=(" in text
    assert re.search(message, text), text


def test_the_first_failing_call_can_be_made_again() -> None:
    report = check(compiled("for (int64_t i = 0; i < T * D; ++i) y[i] = x[i] * x[i] + (T == 5 && D == 16);"))
    (first, *_) = report.failures
    assert first.startswith("D=16 T=5 contiguous, square(x_TD=(5, 16) float32 strides (16, 1)): output 0 at [")
    assert len([line for line in report.failures if "D=16 T=5 " in line]) == len(STRIDES)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x.double() ** 2, "is (1, 1) float64, the reference's is (1, 1) float32"),
        (lambda x: (x * x)[:1], "output 0 is (1, 1) float32, the reference's is (2, 1)"),
        (lambda x: (x * x, x), "2 outputs, the reference has 1"),
        (lambda x: x * x + torch.rand(()), "other bits when run again"),
        (lambda x: (x * x).detach(), "there is no gradient of x_TD"),
        (lambda x: x.view(-1).pow(2).view_as(x), "view size is not compatible"),
        (lambda x: x.square() if x.is_contiguous() else x, "transposed"),
        (lambda x: torch.full_like(x, torch.nan), "error inf"),
    ],
)
def test_what_is_wrong_with_any_implementation(run: Any, message: str) -> None:
    report = check(served_by(run), shapes={"T": (1, 2, 5), "D": (1, 3)})
    assert not report.ok
    assert message in "\n".join(report.failures)


def test_dtypes_have_bounds_of_their_own_and_are_skipped_where_they_are_not_taken() -> None:
    def rough(x: Tensor) -> Tensor:
        return x * x * (1 + 2e-3)

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    report = check(served_by(rough), dtypes=dtypes, shapes={"T": (4,), "D": (64,)})
    assert len(report.failures) == len(STRIDES)
    assert all(" float32 " in line for line in report.failures)
    narrow = served_by(lambda x: x * x, needs=Needs(dtypes=(torch.bfloat16,)))
    assert check(narrow, dtypes=dtypes, shapes={"T": (3,), "D": (5,)}).cases == len(STRIDES)
    assert "not checked, it is for none of the cases" in str(check(narrow))
    assert not check(narrow).ok


def test_layouts_hold_the_same_numbers() -> None:
    x = torch.randn(4, 6)
    for how in STRIDES[:-1]:
        assert torch.equal(lay(x, how), x)
    assert torch.equal(lay(x, "expanded"), x[:1].expand(4, 6))
    laid = {how: lay(x, how) for how in STRIDES}
    assert [laid[how].is_contiguous() for how in STRIDES] == [True, False, False, True, False]
    assert laid["offset"].storage_offset() == 1
    assert lay(torch.ones(()), "sliced").shape == ()


def test_what_cannot_be_checked() -> None:
    def scaled(x_TD: Tensor, by: float) -> Tensor:
        return x_TD * by

    op = Op(scaled)
    with pytest.raises(ConfigError, match="nothing to check"):
        check(op)
    op.on("twice", why="twice")(lambda x, by: x * by)
    with pytest.raises(ConfigError, match=r"what is by\? Give values=\{'by': \.\.\.\}"):
        check(op)
    with pytest.raises(ConfigError, match="did you mean 'twice'"):
        check(op, "twic")
    with pytest.raises(ConfigError, match="strides are contiguous"):
        check(op, strides=("diagonal",), values={"by": 2.0})
    with pytest.raises(ConfigError, match="no tensor whose name says that its first dimension is D"):
        check(op, rows="D", values={"by": 2.0})
    assert check(op, values={"by": 2.0}, shapes={"T": range(40), "D": range(40)}).cases == 300


def test_inputs_may_leave_out_what_has_a_default() -> None:
    def scaled(x: Tensor, by: float = 3.0) -> Tensor:
        return x * by

    op = Op(scaled)
    op.on("mine", why="mine")(lambda x, by: x * by)
    report = check(
        op, inputs=lambda sizes, dtype, generator: (torch.randn(3, sizes["K"]).to(dtype),), shapes={"K": (0, 4)}
    )
    assert report.ok, report
