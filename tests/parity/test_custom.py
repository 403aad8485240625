"""Kernels from outside: declared, built at first use, joined to autograd, and never a crash."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels import build
from twofold.kernels.compiled import Compiled
from twofold.kernels.custom import Entry, Float, In, Int, Out, check, cpp, cuda, function, triton
from twofold.kernels.op import Needs, Op

SIZE = Int("T"), Int("D")
X, Y, W = In("x_TD"), Out("y_TD"), In("w_D")
SCALE = Entry("scale", X, W, Float("by"), Y, *SIZE)
SOURCE = """
void scale(const float* x, const float* w, double by, float* y, int64_t T, int64_t D) {
    for (int64_t t = 0; t < T; ++t)
        for (int64_t d = 0; d < D; ++d) y[t * D + d] = x[t * D + d] * w[d] * float(by);
}
void scale_back(const float* x, const float* w, const float* grad, double by, float* grad_x, float* grad_w,
                int64_t T, int64_t D) {
    for (int64_t d = 0; d < D; ++d) grad_w[d] = 0;
    for (int64_t t = 0; t < T; ++t)
        for (int64_t d = 0; d < D; ++d) {
            grad_x[t * D + d] = grad[t * D + d] * w[d] * float(by);
            grad_w[d] += grad[t * D + d] * x[t * D + d] * float(by);
        }
}
"""
BACK = Entry(
    "scale_back", X, W, In("grad_y_TD"), Float("by"), Out("grad_x_TD"), Out("grad_w_D"), *SIZE
)  # the order is that of the C parameters


def scaled(x_TD: Tensor, w_D: Tensor, by: float = 2.0) -> Tensor:
    return x_TD * w_D * by


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all tests here, so that each source is compiled once."""
    folder = tmp_path_factory.getbasetemp() / "kernel-cache"
    monkeypatch.setenv("TWOFOLD_CACHE", str(folder))
    monkeypatch.delenv("TWOFOLD_KERNELS", raising=False)
    return folder / "kernels"


@pytest.fixture
def op() -> Op[..., Any]:
    return Op(scaled)


def add(op: Op[..., Any], source: str = SOURCE, **given: Any) -> Any:
    return cpp(op, **{"source": source, "forward": SCALE, "why": "one pass"} | given)


def operands(count: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width, requires_grad=True), torch.randn(width, requires_grad=True)


# ------------------------------------------------------------------------------------------------ what works
def test_a_kernel_is_its_reference_forward_and_backward(op) -> None:
    add(op, backward=BACK, bits="reference")
    report = check(op, rows="T")
    assert report.ok, report
    assert report.cases == 6 * 6 * 5
    assert 0 < report.backward < 1e-6
    assert str(report).startswith("scaled, 'cpp': 180 cases agree with the reference; largest error 0.0e+00")


def test_its_own_backward_is_the_one_that_runs(op, monkeypatch: pytest.MonkeyPatch) -> None:
    add(op, backward=BACK)
    x, w = operands()
    out = op(x, w, by=3.0)
    monkeypatch.setattr(op, "reference", None)  # whoever calls it now fails
    out.backward(torch.ones_like(out))
    assert torch.allclose(x.grad, (3 * w).expand_as(x))
    assert torch.allclose(w.grad, 3 * x.sum(0))


@pytest.mark.parametrize(
    "backward", [None, Entry("scale_back_x", W, In("grad_y_TD"), Float("by"), Out("grad_x_TD"), *SIZE)]
)
def test_gradients_without_a_backward_of_their_own_are_the_references(op, backward: Entry | None) -> None:
    more = """
    void scale_back_x(const float* w, const float* grad, double by, float* grad_x, int64_t T, int64_t D) {
        for (int64_t i = 0; i < T * D; ++i) grad_x[i] = grad[i] * w[i % D] * float(by);
    }"""
    add(op, SOURCE + more, backward=backward)
    assert check(op, shapes={"T": (0, 3), "D": (1, 9)}).ok
    x, w = operands()
    frozen = w.detach()
    op(x, frozen).sum().backward()
    assert torch.allclose(x.grad, (2 * w).expand_as(x))


def test_other_dtypes_and_devices_are_served_by_the_reference(op) -> None:
    add(op)
    x, w = (operand.detach().double() for operand in operands())
    assert torch.equal(op(x, w), scaled(x, w))
    assert op(x.to("meta", torch.float32), w.to("meta", torch.float32)).device.type == "meta"


def test_optional_tensors_whole_numbers_other_dtypes_and_fixed_words() -> None:
    def gather(x_ND: Tensor, rows_T: Tensor, b_D: Tensor | None, shift: int, how: str) -> tuple[Tensor, Tensor]:
        index = rows_T.long() + shift
        y_TD = x_ND[index] if b_D is None else x_ND[index] + b_D
        return (y_TD if how == "plain" else -y_TD), index

    source = """
    void gather(const float* x, const int32_t* rows, const float* b, int64_t shift, float* y, int64_t* index,
                int64_t T, int64_t D) {
        for (int64_t t = 0; t < T; ++t) {
            index[t] = rows[t] + shift;
            for (int64_t d = 0; d < D; ++d) y[t * D + d] = x[index[t] * D + d] + (b ? b[d] : 0.0f);
        }
    }"""
    op = Op(gather)
    rows, bias = In("rows_T", torch.int32), In("b_D", optional=True)
    outs = Out("y_TD"), Out("index_T", torch.int64)
    entry = Entry("gather", In("x_ND"), rows, bias, Int("shift"), *outs, *SIZE)
    cpp(op, source=source, forward=entry, why="one pass", fixed={"how": "plain"})

    def inputs(sizes, dtype, generator):
        rows_T = torch.randint(0, 4, (sizes["T"],), generator=generator, dtype=torch.int32)
        b_D = torch.randn(sizes["D"], generator=generator) if sizes["T"] % 2 else None
        return torch.randn(6, sizes["D"], generator=generator), rows_T, b_D, 2, "plain"

    report = check(op, inputs=inputs, shapes={"N": (6,)})
    assert report.ok, report
    x = torch.randn(6, 3)
    assert torch.equal(op(x, torch.tensor([1], dtype=torch.int32), None, 0, "other")[0], -x[1:2])


def test_the_same_source_is_compiled_once(op, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(op, SOURCE + "// once\n")
    before = set(cache.glob("*"))
    assert op(*operands()).shape == (5, 7)
    made = set(cache.glob("*")) - before
    assert {path.suffix for path in made} == {".so", ".cpp"}
    monkeypatch.setattr(build, "_compile", None)
    again = Op(scaled)
    add(again, SOURCE + "// once\n")
    assert again(*operands()).shape == (5, 7)
    assert again.serving()[0] == "cpp"
    other = Op(scaled)
    add(other, SOURCE + "// another\n")
    with pytest.raises(TypeError):  # this one would have to be compiled
        other(*operands())


def test_nothing_happens_before_the_first_use(op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    add(op, backward=BACK)
    op.use("cpp")
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------ what cannot be built
def lost(op: Op[..., Any], caplog: pytest.LogCaptureFixture) -> str:
    """The one line that tells of a kernel that is not used; the reference serves, as often as it is called."""
    x, w = operands()
    with caplog.at_level(logging.WARNING, "twofold.kernels"):
        for _ in range(2):
            assert torch.equal(op(x, w), scaled(x, w))
    (line,) = caplog.messages
    assert line.startswith("scaled: kernel 'cpp' is not used: ")
    assert line.endswith(". The reference in torch serves instead; lost: one pass")
    assert len(line) < 500
    assert op.serving()[0] == "reference"
    assert not check(op).ok
    return line


def test_no_compiler(op, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    add(op)
    assert "no C++ compiler was found" in lost(op, caplog)


def test_source_that_is_refused(op, caplog: pytest.LogCaptureFixture) -> None:
    add(op, SOURCE + "int other() { return 1 }\n" * 50)
    line = lost(op, caplog)
    assert "refused: scaled.cpp:15:" in line
    assert "error: expected ';'" in line


def test_an_instruction_that_is_not_here(op, caplog: pytest.LogCaptureFixture) -> None:
    add(op, instructions=("avx2048", "fma_of_tomorrow"))
    assert "this processor has no avx2048, fma_of_tomorrow" in lost(op, caplog)


def test_a_cache_that_others_may_write_to(
    op, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    add(op)
    assert "others may write to" in lost(op, caplog)
    assert not list((tmp_path / "kernels").iterdir())


def test_the_cache_is_the_users_alone(op, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "new"))
    add(op)
    op(*operands())
    assert (tmp_path / "new" / "kernels").stat().st_mode & 0o777 == 0o700
    assert {path.suffix for path in (tmp_path / "new" / "kernels").iterdir()} == {".so", ".cpp"}


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            Entry("scale", X, W, Float("by"), Y, Int("D")),
            r"declare void scale\(const float\* x_TD, const float",
        ),
        (Entry("scale", X, W, Y, Float("by"), *SIZE), "the source and the declaration differ"),
        (Entry("scale", X, In("w_D", torch.float64), Float("by"), Y, *SIZE), "const double. w_D"),
    ],
)
def test_a_declaration_that_the_source_does_not_have(op, forward: Entry, message: str) -> None:
    add(op, forward=forward)
    with pytest.raises(ConfigError, match=message):
        op(*operands())
    with pytest.raises(ConfigError, match="the source and the declaration differ"):
        check(op)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entry("scale", X, In("w"), Y), "'w' does not say its shape"),
        (lambda: Entry("scale", X, X, Y), "'x_TD' is declared twice"),
        (lambda: Entry("scale", X, Out("y_TK")), "no input that is always given tells the shape of 'y_TK'"),
        (lambda: Entry("scale()", X, Y), "is no name of a C function"),
    ],
)
def test_an_entry_that_cannot_be(make: Callable[[], Entry], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forward": Entry("scale", In("z_TD"), W, Float("by"), Y, *SIZE)}, "unknown tensor of scaled 'z_TD'"),
        ({"forward": Entry("scale", X, W, Float("bye"), Y, *SIZE)}, "'bye': did you mean 'by'"),
        ({"forward": Entry("scale", X, W, Y, *SIZE)}, "'by' of scaled would have no effect: declare it, or fix"),
        ({"forward": Entry("scale", X, W, Float("by"), *SIZE)}, "reads a tensor and writes one"),
        ({"forward": Entry("scalar", X, W, Float("by"), Y, *SIZE)}, "the source has no function 'scalar'"),
        ({"backward": Entry("scale_back", X, Out("grad_z_TD"))}, "unknown input's gradient 'grad_z_TD'"),
        ({"backward": Entry("scale_back", In("grad_z_TD"), Out("grad_x_TD"))}, "'grad_z_TD': did you mean 'grad_y_TD'"),
        ({"fixed": {"bye": 1.0}}, "scaled has no parameter 'bye'"),
    ],
)
def test_a_declaration_that_the_reference_does_not_have(op, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add(op, **given)


def test_an_optional_tensor_must_be_declared_so() -> None:
    def shifted(x_TD: Tensor, w_D: Tensor | None, by: float) -> Tensor:
        return x_TD

    with pytest.raises(ConfigError, match=r"w_D may be None in shifted: In\('w_D', optional=True\)"):
        add(Op(shifted))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4)), r"w_D has the shape \(4,\); its name says \[D\] and D is 3"),
        ((torch.ones(3), torch.ones(3)), r"x_TD has the shape \(3,\), 1 dimensions"),
        (
            (torch.ones(2, 3), torch.ones(3, dtype=torch.float64)),
            "w_D is torch.float64 on cpu; the kernel takes",
        ),
        ((torch.ones(2, 3), torch.ones(3, device="meta")), "w_D is torch.float32 on meta"),
        ((torch.ones(2, 3), None), "w_D is a NoneType, not a tensor"),
        ((torch.ones(2, 3), torch.ones(3).to_sparse()), "w_D is torch.float32 on cpu"),
        ((torch.ones(2, 3), torch.ones(3), "much"), "by is 'much', not a number"),
    ],
)
def test_arguments_are_checked_before_a_pointer_is_passed(op, args: tuple[Any, ...], message: str) -> None:
    add(op)
    with pytest.raises(ConfigError, match=message):
        op(*args)


# ------------------------------------------------------------------------------------------------ functions
@pytest.fixture
def seen() -> Iterator[list[str]]:
    yield []


def test_a_function_with_and_without_a_backward(seen: list[str]) -> None:
    def forward(x_TD: Tensor, w_D: Tensor, by: float) -> Tensor:
        seen.append("forward")
        return (x_TD * w_D).mul_(by)

    def backward(args, outs, grads):
        seen.append("backward")
        x_TD, w_D, by = args
        return grads[0] * w_D * by, (grads[0] * x_TD * by).sum(0)

    for gradients, steps in ((None, ["forward"]), (backward, ["forward", "backward"])):
        op = Op(scaled)
        function(op, forward, name="mine", why="quick", backward=gradients, needs=Needs(dtypes=(torch.float32,)))
        seen.clear()
        op(*operands()).sum().backward()
        assert seen == steps
        assert check(op, "mine", shapes={"T": (0, 3), "D": (1, 8)}).ok


def test_triton_that_is_not_here_or_refuses(
    op, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    def refuses(*args: Any) -> Tensor:
        raise CompilationError("at 3:5:\n    y = tl.dot(x)\nunsupported\n")

    def broken(*args: Any) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w = operands()
    triton(op, refuses, why="fast", name="absent", dtypes=(torch.float32,))
    monkeypatch.setattr("twofold.kernels.custom.importlib.util.find_spec", lambda name: None)
    assert torch.equal(op(x, w), scaled(x, w))
    monkeypatch.setattr("twofold.kernels.custom.importlib.util.find_spec", lambda name: "here")
    triton(op, refuses, why="fast", name="refused")
    for _ in range(2):
        assert torch.equal(op(x, w), scaled(x, w))
    assert not check(op, "refused").ok
    reasons = [line.split(": ", 2)[2].split(". The")[0] for line in caplog.messages]
    assert reasons == ["Triton: pip install triton", "Triton refused: unsupported"]
    mine = Op(scaled)
    triton(mine, broken, why="fast")
    with pytest.raises(ZeroDivisionError):  # not Triton's, but the user's own mistake
        mine(x, w)


# ---------------------------------------------------------------------------------------------- CUDA, without a device
CUDA = """
__global__ void scale_kernel(const float* x, const float* w, float by, float* y, int64_t count, int64_t D) {
    const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i < count) y[i] = x[i] * w[i % D] * by;
}
void scale(const float* x, const float* w, double by, float* y, int64_t T, int64_t D, void* stream) {
    if (T * D) scale_kernel<<<(T * D + 255) / 256, 256, 0, (cudaStream_t)stream>>>(x, w, float(by), y, T * D, D);
}
"""


def test_cuda_without_a_device_leaves_the_reference(op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel = cuda(op, source=CUDA, forward=SCALE, why="on the device")
    x, w = operands()
    assert torch.equal(op(x, w), scaled(x, w))
    assert str(check(op)) == "scaled, 'cuda': not checked, a cuda device"
    assert kernel.missing() == "no CUDA device"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles with nvcc")
def test_nvcc_takes_the_source_and_the_glue(op) -> None:
    kernel = cuda(op, source=CUDA, forward=SCALE, why="on the device")
    assert isinstance(kernel.body, Compiled)
    assert b"twofold_scale" in kernel.body.compile_cuda("sm_90").read_bytes()
