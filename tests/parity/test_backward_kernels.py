"""Gradients of products, norms and activations by their kernels, against fp64, and bit for bit again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twofold.kernels import native
from twofold.kernels.activation import ACTIVATIONS, activate, gated
from twofold.kernels.norm import layer_norm, rms_norm
from twofold.kernels.slopes import FEW_THREADS, input_slopes, weight_slopes

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
SHAPES = [(0, 5), (1, 1), (3, 2), (31, 16), (33, 17), (100, 40), (70, 300)]


def rms(x: Tensor, w: Tensor | None, eps: float, offset: bool) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y if w is None else y * (1 + w if offset else w)


def layer(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor], wide: list[Tensor], atol: float = 2e-5) -> None:
    upstream = torch.randn(ours.shape)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(ours, leaves, upstream)
    for mine, right in zip(found, torch.autograd.grad(theirs, wide, upstream.double()), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=atol, rtol=1e-4)


def leaf(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape)
    return x.clone().requires_grad_(), x.double().requires_grad_()


@pytest.mark.parametrize("weighted", ["plain", "offset", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], weighted: str) -> None:
    x, x64 = leaf(*shape)
    w, w64 = leaf(shape[1])
    offset = weighted == "offset"
    if weighted == "none":
        compare(rms_norm(x, None, 1e-3), rms(x64, None, 1e-3, False), [x], [x64])
    else:
        compare(rms_norm(x, w, 1e-3, offset), rms(x64, w64, 1e-3, offset), [x, w], [x64, w64])


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int]) -> None:
    x, x64 = leaf(*shape)
    (w, w64), (b, b64) = leaf(shape[1]), leaf(shape[1])
    compare(layer_norm(x, w, b, 1e-2), layer(x64, w64, b64, 1e-2), [x, w, b], [x64, w64, b64], atol=5e-5)
    compare(layer_norm(x, None, None, 1e-2), layer(x64, None, None, 1e-2), [x], [x64], atol=5e-5)


@pytest.mark.parametrize("own", [False, True])
def test_norms_of_heads(own: bool) -> None:
    x, x64 = leaf(37, 3, 20)
    w, w64 = leaf(3, 20) if own else leaf(20)
    compare(rms_norm(x, w, 1e-4), rms(x64, w64, 1e-4, False), [x, w], [x64, w64], atol=5e-5)
    strided = x.transpose(0, 1)
    if not own:
        compare(rms_norm(strided, w, 1e-4), rms(x64.transpose(0, 1), w64, 1e-4, False), [x, w], [x64, w64], atol=5e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 2), (5, 34), (40, 300), (2, 9000)])
def test_activations(shape: tuple[int, int], act: str) -> None:
    x, x64 = leaf(*shape)
    slow = ACTIVATIONS[act]
    compare(activate(x, act), slow(x64), [x], [x64])
    gate, up = x64.chunk(2, -1)
    compare(gated(x, act), slow(gate) * up, [x], [x64])
    inner, inner64 = leaf(4, 60)
    compare(gated(inner[:, 5:25], act), slow(inner64[:, 5:15]) * inner64[:, 15:25], [inner], [inner64])


def test_far_from_zero_nothing_breaks() -> None:
    x = torch.tensor([[-1e4, -90.0, 90.0, 1e4]], requires_grad=True)
    for act in ACTIVATIONS:
        (slope,) = torch.autograd.grad(activate(x, act).sum(), x)
        assert torch.isfinite(slope).all(), act
        assert act == "relu2" or torch.allclose(slope, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), atol=1e-5), act


@pytest.fixture(params=["own", "torch"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads that the products are our own, or so few that they are torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(FEW_THREADS + 1 if request.param == "own" else 1)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "k", "n"), [(0, 5, 4), (1, 1, 1), (3, 17, 40), (6, 600, 7), (33, 16, 65), (200, 530, 19), (391, 48, 700)]
)
def test_products_of_gradients(t: int, k: int, n: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(t)
    grad, w, x = torch.randn(t, n), torch.randn(n, k).to(dtype), torch.randn(t, k).to(dtype)
    right_x, right_w = grad.double() @ w.double(), grad.double().t() @ x.double()
    bound = {"atol": 3e-6 * max(1, t, n), "rtol": 1e-5}
    torch.testing.assert_close(input_slopes(grad, w).double(), right_x, **bound)
    torch.testing.assert_close(weight_slopes(grad, x).double(), right_w, **bound)
    wide = torch.randn(n, 2 * k)  # rows with something between them
    before = wide.clone()
    assert weight_slopes(grad, x, wide[:, :k], add=True).data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[:, :k].double(), before[:, :k].double() + right_w, **bound)
    assert torch.equal(wide[:, k:], before[:, k:])
    assert torch.equal(input_slopes(grad, w, wide[:, :k].new_empty(t, k)), input_slopes(grad, w))
    turned = torch.randn(n, t).t()  # a gradient that lies the other way round
    torch.testing.assert_close(input_slopes(turned, w).double(), turned.double() @ w.double(), **bound)


def test_products_of_gradients_have_the_same_bits_on_any_threads() -> None:
    torch.manual_seed(3)
    grad, w, x = torch.randn(410, 300), torch.randn(300, 530), torch.randn(410, 530)
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (FEW_THREADS + 1, FEW_THREADS + 2, 2 * FEW_THREADS + 3):
            torch.set_num_threads(count)
            runs.append((input_slopes(grad, w), weight_slopes(grad, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, first) for run in runs[1:] for mine, first in zip(run, runs[0], strict=True))


def test_bf16_weights_get_bf16_gradients() -> None:
    x, w = torch.randn(50, 24, requires_grad=True), torch.randn(24).bfloat16().requires_grad_()
    rms_norm(x, w, 1e-5).sum().backward()
    right = (x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).sum(0)
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad.float(), right.detach(), atol=0.1, rtol=1e-2)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_change_no_bit(threads: int) -> None:
    torch.manual_seed(4)
    x, w, b, up = torch.randn(200, 48, requires_grad=True), torch.randn(48), torch.randn(48), torch.randn(200, 48)
    w.requires_grad_()
    b.requires_grad_()
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            wide = torch.cat([layer_norm(x, w, b, 1e-5), rms_norm(x, w, 1e-5)], -1)
            runs.append(torch.autograd.grad(gated(wide, "gelu"), (x, w, b), up))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))
