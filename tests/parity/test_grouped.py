"""Experts and adapters by the CPU kernels: a token has the bits of going alone, whoever goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels import native
from twofold.kernels.activation import gated
from twofold.kernels.linear import linear
from twofold.kernels.lora import Adapter, lora
from twofold.kernels.moe import experts, open_gate, route
from twofold.kernels.quantized import quantized_experts
from twofold.quant.format import FORMATS

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")

T, D, E, F, C = 37, 70, 9, 50, 3  # tokens, hidden, experts, their width, chosen for a token
FLOATS = (torch.float32, torch.bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights(dtype: torch.dtype, count: int = E) -> tuple[Tensor, Tensor]:
    return (torch.randn(count, 2 * F, D) / 8).to(dtype), (torch.randn(count, D, F) / 8).to(dtype)


def alone(x_TD: Tensor, up: Tensor, down: Tensor, share_TC: Tensor, chosen_TC: Tensor, act: str) -> Tensor:
    """Each token by itself through each of its experts, added in the experts' order."""
    out = torch.zeros_like(x_TD)
    for t, (share_C, chosen_C) in enumerate(zip(share_TC, chosen_TC)):
        for expert, share in sorted(zip(chosen_C.tolist(), share_C)):
            out[t] += linear(gated(linear(x_TD[t : t + 1], up[expert]), act), down[expert])[0] * share
    return out


# --------------------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (8, 2), (16, 16), (65, 8)])
def test_routes_as_the_definition(count: int, top_k: int, renormalise: bool) -> None:
    logits = torch.randn(200, count) * 3
    logits[::3] = logits[::3].round()  # equal logits
    share, chosen = route(logits, top_k, renormalise)
    truth, choice = route.reference(logits, top_k, renormalise)
    assert torch.equal(chosen, choice)
    torch.testing.assert_close(share, truth, atol=1e-6, rtol=1e-5)
    for t in (0, 57, 199):
        assert torch.equal(route(logits[t : t + 1], top_k, renormalise)[0][0], share[t])
    with threads(3):
        assert torch.equal(route(logits, top_k, renormalise)[0], share)


def test_of_equal_logits_the_lower_expert_is_chosen_first() -> None:
    for way in (route, route.reference):
        assert way(torch.zeros(1, 20), 4, False)[1].tolist() == [[0, 1, 2, 3]]
        assert way(torch.tensor([[1.0, 5.0, 5.0, 1.0, 7.0]]), 4, False)[1].tolist() == [[4, 1, 2, 0]]


def test_logits_that_are_not_numbers_choose_experts_that_are_there() -> None:
    logits = torch.randn(6, 19)
    logits[0] = torch.nan
    logits[1, ::2], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    share, chosen = route(logits, 5, True)
    assert ((chosen >= 0) & (chosen < 19)).all()
    assert all(len(set(row)) == 5 for row in chosen.tolist())
    assert share[:4].isnan().all() and not share[4:].isnan().any()


def test_routing_has_the_gradient_of_the_definition() -> None:
    logits, up = torch.randn(11, 7, requires_grad=True), torch.randn(11, 3)
    for renormalise in (False, True):
        (ours,) = torch.autograd.grad(route(logits, 3, renormalise)[0], logits, up)
        wide = logits.detach().double().requires_grad_()
        share = wide.softmax(-1).gather(-1, route(logits, 3, False)[1])
        share = share / share.sum(-1, keepdim=True) if renormalise else share
        (truth,) = torch.autograd.grad(share, wide, up.double())
        torch.testing.assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)


def test_more_experts_than_there_are_cannot_be_chosen() -> None:
    for way in (route, route.reference):
        with pytest.raises(ConfigError, match="5 experts for each token, of 4: choose from 1 to 4"):
            way(torch.zeros(2, 4), 5, False)


# --------------------------------------------------------------------------------------------------------- experts
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_has_the_bits_of_going_alone(dtype: torch.dtype, act: str) -> None:
    x, (up, down) = torch.randn(T, D), weights(dtype)
    share, chosen = route(torch.randn(T, E), C, True)
    out = experts(x, up, down, share, chosen, act)
    assert torch.equal(out, alone(x, up, down, share, chosen, act))
    for count in (1, 2, 4):
        with threads(count):
            assert torch.equal(experts(x, up, down, share, chosen, act), out)
            assert torch.equal(experts(x[5:9], up, down, share[5:9], chosen[5:9], act), out[5:9])


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 190, 450])
def test_crowded_and_empty_experts(tokens: int) -> None:
    """All go to expert 4, and one choice in seven elsewhere, so that one group has several pieces of rows."""
    x, (up, down) = torch.randn(tokens, D), weights(torch.float32)
    chosen = torch.stack((torch.full((tokens,), 4), torch.arange(tokens) % 7), -1)
    share = torch.rand(tokens, 2)
    out = experts(x, up, down, share, chosen, "silu")
    assert out.shape == x.shape and torch.equal(out, experts.reference(x, up, down, share, chosen, "silu"))
    with threads(4):
        assert torch.equal(out, experts(x, up, down, share, chosen, "silu"))


def test_an_expert_chosen_twice_counts_twice() -> None:
    x, (up, down) = torch.randn(3, D), weights(torch.float32)
    twice = experts(x, up, down, torch.full((3, 2), 0.5), torch.full((3, 2), 2), "silu")
    once = experts(x, up, down, torch.ones(3, 1), torch.full((3, 1), 2), "silu")
    torch.testing.assert_close(twice, once)


def test_weights_and_tokens_may_lie_apart() -> None:
    x, (up, down) = torch.randn(T, D), weights(torch.float32)
    share, chosen = route(torch.randn(T, E), C, True)
    out = experts(x, up, down, share, chosen, "silu")
    far = torch.randn(T, D + 5)[:, 5:].copy_(x)
    assert torch.equal(experts(far, up, down, share, chosen, "silu"), out)
    turned = up.mT.contiguous().mT
    assert not turned.is_contiguous() and torch.equal(experts(x, turned, down, share, chosen, "silu"), out)


@pytest.mark.parametrize("wrong", [-2, E])
def test_an_expert_that_is_not_there_is_refused(wrong: int) -> None:
    chosen = torch.zeros(T, C, dtype=torch.int64)
    chosen[3, 1] = wrong
    with pytest.raises(ConfigError, match=f"experts .*{wrong}.* were chosen; there are {E}: choose from -1 to {E - 1}"):
        experts(torch.randn(T, D), *weights(torch.float32), torch.rand(T, C), chosen, "silu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_have_the_gradients_of_fp64(dtype: torch.dtype) -> None:
    x, (up, down) = torch.randn(T, D), weights(dtype)
    share, chosen = route(torch.randn(T, E - 1), C, True)  # the last expert is nobody's
    inputs = [leaf.detach().requires_grad_() for leaf in (x, up, down, share)]
    grad = torch.randn(T, D)
    ours = torch.autograd.grad(experts(*inputs, chosen, "silu"), inputs, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    out = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for c, expert in enumerate(chosen[t].tolist()):
            gate, other = (wide[1][expert] @ wide[0][t]).chunk(2)
            out[t] = out[t] + wide[2][expert] @ (torch.nn.functional.silu(gate) * other) * wide[3][t, c]
    truth = torch.autograd.grad(out, wide, grad.double())
    for our, leaf, true in zip(ours, inputs, truth, strict=True):
        assert our.dtype == leaf.dtype
        torch.testing.assert_close(our.double(), true, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=1e-2)


@pytest.mark.parametrize("width", [48, 50])
@pytest.mark.parametrize("name", list(FORMATS))
def test_quantized_experts_are_the_definition(name: str, width: int) -> None:
    format = FORMATS[name]
    up, down = (format.pack(format.quantize(torch.randn(*shape))) for shape in ((E, 2 * width, D), (E, D, width)))
    x, (share, chosen) = torch.randn(210, D), route(torch.randn(210, E) * 4, C, True)
    out = quantized_experts(x, up, down, share, chosen, "silu")
    assert torch.equal(out, quantized_experts.reference(x, up, down, share, chosen, "silu"))
    for t in (0, 41):
        one = slice(t, t + 1)
        assert torch.equal(quantized_experts(x[one], up, down, share[one], chosen[one], "silu"), out[one])


def test_the_gate_of_a_shared_expert() -> None:
    x, y, gate = (torch.randn(T, width, requires_grad=True) for width in (D, D, 1))
    out, truth = open_gate(x, y, gate), x + y * gate.sigmoid()
    torch.testing.assert_close(out, truth)
    assert torch.equal(open_gate(x[3:4], y[3:4], gate[3:4])[0], out[3])
    up = torch.randn(T, D)
    for ours, theirs in zip(*(torch.autograd.grad(made, (x, y, gate), up) for made in (out, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- adapters
N = 33


def adapters(*ranks: int, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    return [
        Adapter((torch.randn(rank, D) / 8).to(dtype), torch.randn(N, rank) / 8, 0.5 + i) for i, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_token_has_its_own_adapter_and_its_own_bits(dtype: torch.dtype) -> None:
    made, index = adapters(1, 4, 40, 7, 300, dtype=dtype), torch.randint(-1, 5, (T,))
    x, y = torch.randn(T, D), torch.randn(T, N)
    before = y.clone()
    out = lora(x, y, made, index)
    assert torch.equal(y, before), "the input is not touched"
    assert torch.equal(out, lora.reference(x, y, made, index))
    assert torch.equal(out[index < 0], y[index < 0])
    for count in (1, 3):
        with threads(count):
            assert torch.equal(lora(x, y, made, index), out)
            for t in range(0, T, 5):
                one = slice(t, t + 1)
                assert torch.equal(lora(x[one], y[one], made, index[one])[0], out[t])
    wide = torch.randn(T, N + 20)[:, 11:-9].copy_(y)  # as a part of a fused product's output
    assert torch.equal(lora(x, wide, made, index), out)


def test_a_batch_without_adapters_costs_nothing() -> None:
    x, y = torch.randn(T, D), torch.randn(T, N)
    assert lora(x, y, adapters(4), torch.full((T,), -1)) is y
    assert lora(x[:0], y[:0], adapters(4), torch.zeros(0, dtype=torch.int64)).shape == (0, N)


@pytest.mark.parametrize("dtype", FLOATS)
def test_adapters_have_the_gradients_of_fp64(dtype: torch.dtype) -> None:
    made, index = adapters(3, 17, 5, dtype=dtype), torch.randint(-1, 2, (T,))  # the last adapter is nobody's
    leaves = [torch.randn(T, D), torch.randn(T, N), *(w for adapter in made for w in adapter[:2])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scales = [adapter.scale for adapter in made]

    def with_weights(w: list[Tensor]) -> list[Adapter]:
        return [Adapter(*three) for three in zip(w[2::2], w[3::2], scales)]

    up = torch.randn(T, N)
    ours = torch.autograd.grad(lora(*leaves[:2], with_weights(leaves), index), leaves, up)
    truth = wide[1]
    for t, number in enumerate(index.tolist()):
        if number >= 0:
            a, b, scale = with_weights(wide)[number]
            row = torch.zeros_like(truth).index_put((torch.tensor(t),), scale * (b @ (a @ wide[0][t])))
            truth = truth + row
    theirs = torch.autograd.grad(truth, wide, up.double(), materialize_grads=True)
    for our, leaf, true in zip(ours, leaves, theirs, strict=True):
        assert our.dtype == leaf.dtype
        torch.testing.assert_close(our.double(), true, atol=2e-2 if our.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_adapters_that_do_not_fit_are_refused() -> None:
    x, y, index = torch.randn(T, D), torch.randn(T, N), torch.zeros(T, dtype=torch.int64)
    with pytest.raises(ConfigError, match="alike in K and N"):
        lora(x, y, [*adapters(4), Adapter(torch.randn(4, D + 1), torch.randn(N, 4))], index)
    with pytest.raises(ConfigError, match="alike in K and N"):
        lora(x, y, [Adapter(torch.randn(4, D), torch.randn(N, 5))], index)
    with pytest.raises(ConfigError, match="adapters 0 to 2 were chosen; there are 2: choose from -1 to 1"):
        lora(x, y, adapters(4, 8), torch.arange(T) % 3)
