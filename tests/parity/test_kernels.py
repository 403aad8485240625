"""Every kernel against its slow truth: equal bits where the contract asks for them, a stated bound elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels.activation import ACTIVATIONS, activate, gated
from twofold.kernels.attention import Attend, packed_attention
from twofold.kernels.linear import linear
from twofold.kernels.moe import experts, route
from twofold.kernels.norm import layer_norm, rms_norm
from twofold.kernels.op import all_ops
from twofold.kernels.rope import rotate

LENGTHS = (300, 17, 0, 1, 128, 129)
HOWS = {
    "plain": Attend(0.3),
    "window": Attend(0.3, window=37),
    "softcap": Attend(0.3, softcap=4.0),
    "alibi": Attend(0.3, slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01)),
    "all": Attend(0.3, window=150, softcap=4.0, slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01)),
}


def naive_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    how: Attend,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention as the textbook writes it, sequence by sequence; a sink is one more score, without a value."""
    group = q_THD.shape[1] // k_TKD.shape[1]
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (q_THD, k_TKD, v_TKD)), strict=True):
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        s = q @ k.mT * how.scale
        if how.softcap:
            s = how.softcap * torch.tanh(s / how.softcap)
        place = torch.arange(q.shape[1])
        gap = place[None] - place[:, None]
        if how.slopes:
            s = s + torch.tensor(how.slopes, dtype=q.dtype)[:, None, None] * gap
        hidden = gap > 0
        if how.window:
            hidden = hidden | (gap <= -how.window)
        s = s.masked_fill(hidden, -torch.inf)
        if sinks_H is not None:
            s = torch.cat((s, sinks_H[:, None, None].expand(-1, s.shape[1], 1)), -1)
        out.append((s.softmax(-1)[..., : len(place)] @ v).transpose(0, 1))
    return torch.cat(out)


WAYS = [name for name, way in linear.implementations.items() if not way.missing()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 7), (64, 192), (100, 33), (256, 1000), (515, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_rows_have_one_bit_pattern(way: str, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(2100, inputs), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    run = linear.implementations[way].run
    truth = run(x, w, b)
    for rows in (0, 1, 2, 3, 5, 15, 16, 17, 40, 100, 1000, 2100):
        assert torch.equal(run(x[:rows], w, b), truth[:rows]), rows
    assert torch.equal(run(x[7:13], w, b), truth[7:13])
    assert torch.equal(run(x[:40], w.float(), b.float()), truth[:40]), "bf16 weights are widened exactly"
    if way == "rows":
        assert torch.equal(linear.reference(x, w, b), truth)
    exact = F.linear(x.double(), w.double(), b.double())
    torch.testing.assert_close(truth.double(), exact, atol=2e-6 * inputs, rtol=1e-5)


def test_linear_gradients_are_those_of_torch() -> None:
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((23, 19), (11, 19), (11,)))
    up = torch.randn(23, 11)
    ours = torch.autograd.grad(linear(x, w, b), (x, w, b), up)
    theirs = torch.autograd.grad(F.linear(x, w, b), (x, w, b), up)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_attention_and_its_gradients_match_the_textbook_in_fp64(how: Attend) -> None:
    total = sum(LENGTHS)
    q, k, v = (torch.randn(total, heads, 20, requires_grad=True) for heads in (6, 2, 2))
    up = torch.randn(total, 6, 20)
    out = packed_attention(q, k, v, LENGTHS, how)
    grads = torch.autograd.grad(out, (q, k, v), up)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = naive_attention(wide[0], wide[1], wide[2], LENGTHS, how)
    truths = torch.autograd.grad(truth, wide, up.double())
    torch.testing.assert_close(out.double(), truth, atol=5e-6, rtol=0)
    for ours, theirs in zip(grads, truths, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_attention_together_has_the_bits_of_one_at_a_time(how: Attend) -> None:
    q, k, v = (torch.randn(sum(LENGTHS), heads, 20) for heads in (6, 2, 2))
    together = packed_attention.implementations["together"].run
    assert torch.equal(together(q, k, v, LENGTHS, how), packed_attention.reference(q, k, v, LENGTHS, how))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_bits_do_not_depend_on_the_place_in_memory(act: str) -> None:
    x = torch.randn(301, 74) * 3
    whole, product = activate(x, act), gated(x, act)
    for first, last in ((0, 1), (3, 10), (5, 260), (300, 301)):
        assert torch.equal(activate(x[first:last].clone(), act), whole[first:last])
        assert torch.equal(gated(x[first:last].clone(), act), product[first:last])


def test_activations_match_torch() -> None:
    x = torch.randn(50, 31) * 3
    torch.testing.assert_close(activate(x, "silu"), F.silu(x))
    torch.testing.assert_close(activate(x, "gelu"), F.gelu(x))
    torch.testing.assert_close(activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(activate(x, "relu2"), F.relu(x) ** 2)
    torch.testing.assert_close(activate(x, "gelu_quick"), x * torch.sigmoid(1.702 * x))


def test_gated_gradient_is_that_of_the_formula() -> None:
    x, up = torch.randn(9, 14, dtype=torch.float64).float().requires_grad_(), torch.randn(9, 7)
    (ours,) = torch.autograd.grad(gated(x, "silu"), x, up)
    gate, other = x.chunk(2, -1)
    (theirs,) = torch.autograd.grad(F.silu(gate) * other, x, up)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_norms_match_torch() -> None:
    x, w, b = torch.randn(40, 33), torch.randn(33), torch.randn(33)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (33,), w, 1e-5))
    torch.testing.assert_close(rms_norm(x, w, 1e-5, offset=True), F.rms_norm(x, (33,), 1 + w, 1e-5))
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5), F.layer_norm(x, (33,), w, b, 1e-5))
    torch.testing.assert_close(layer_norm(x, None, None, 1e-5), F.layer_norm(x, (33,)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_lengths_and_turns_by_the_distance_only(interleaved: bool) -> None:
    x, y = torch.randn(1, 1, 12), torch.randn(1, 1, 12)
    frequency = 1.0 / (100.0 ** (torch.arange(0, 8, 2) / 8))

    def turn(z: Tensor, position: float) -> Tensor:
        angle = position * frequency[None]
        return rotate(z, torch.cos(angle), torch.sin(angle), interleaved)

    assert torch.equal(turn(x, 3.0)[..., 8:], x[..., 8:])
    torch.testing.assert_close(turn(x, 5.0).norm(), x.norm())
    near, far = (turn(x, 3.0) * turn(y, 1.0)).sum(), (turn(x, 13.0) * turn(y, 11.0)).sum()
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_experts_are_the_weighted_sum_and_do_not_depend_on_the_batch() -> None:
    x, up, down = torch.randn(33, 12), torch.randn(5, 2 * 9, 12), torch.randn(5, 12, 9)
    weights, chosen = route(torch.randn(33, 5), 2, True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(33))
    out = experts(x, up, down, weights, chosen, "silu")
    for t in range(33):
        truth = torch.zeros(12)
        for weight, e in zip(weights[t], chosen[t], strict=True):
            gate, other = (up[e] @ x[t]).chunk(2)
            truth += weight * (down[e] @ (F.silu(gate) * other))
        torch.testing.assert_close(out[t], truth, atol=1e-4, rtol=1e-4)
        alone = experts(x[t : t + 1], up, down, weights[t : t + 1], chosen[t : t + 1], "silu")
        assert torch.equal(alone[0], out[t])


def test_an_op_says_who_serves_it_and_refuses_unknown_names() -> None:
    assert {"linear", "packed_attention", "rms_norm"} <= {item.name for item in all_ops()}
    assert linear.serving()[0] == WAYS[0]
    linear.use("reference")
    try:
        assert linear.serving()[0] == "reference"
        x, w = torch.randn(5, 8), torch.randn(3, 8)
        forced = linear(x, w)
    finally:
        linear.use(None)
    assert torch.equal(forced, linear(x, w))
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        linear.use("row")
