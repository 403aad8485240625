"""Log-probabilities of given tokens: against fp64 with gradients, in pieces or at once, and the sampler's own bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.kernels import loss as kernel
from twofold.kernels import native
from twofold.kernels.linear import linear
from twofold.kernels.loss import logprobs_of, token_logprobs
from twofold.kernels.sample import score

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
SHAPES = [(1, 1, 1), (0, 8, 40), (3, 5, 2), (7, 33, 17), (19, 16, 1024), (33, 48, 1025), (65, 24, 4099), (5, 300, 33)]


def given(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, bias: bool = True):
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=generator)
    w = (torch.randn(vocab, width, generator=generator) * 0.4).to(dtype)
    b = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    return hidden, w, b, torch.randint(0, vocab, (rows,), generator=generator)


def truth(
    hidden: Tensor, w: Tensor, b: Tensor | None, ids: Tensor, multiplier: float, softcap: float | None, heat: float
) -> Tensor:
    x = F.linear(hidden, w, b) * multiplier
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return torch.log_softmax(x / heat, -1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("multiplier", "softcap", "heat", "bias"),
    [
        (1.0, None, 1.0, False),
        (0.4, None, 1.0, True),
        (1.3, 5.0, 1.0, True),
        (1.0, None, 0.7, True),
        (1.3, 5.0, 1.3, True),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_fp64(shape, multiplier, softcap, heat, bias, keep, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "PIECE_NUMBERS", 1)  # pieces of 1,024 columns
    hidden, w, b, ids = given(*shape, bias=bias)
    tensors = [x for x in (hidden, w, b) if x is not None]
    wide = [x.double().requires_grad_() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    ours = token_logprobs(hidden, w, b, ids, multiplier, softcap, keep, heat)
    theirs = truth(wide[0], wide[1], wide[2] if bias else None, ids, multiplier, softcap, heat)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)
    upstream = torch.randn(len(ids))
    found = torch.autograd.grad(ours, leaves, upstream)
    for mine, right in zip(found, torch.autograd.grad(theirs, wide, upstream.double()), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-4)


def test_bf16_weights_are_widened_exactly() -> None:
    hidden, w, b, ids = given(21, 40, 1500, torch.bfloat16)
    assert torch.equal(token_logprobs(hidden, w, b, ids), token_logprobs(hidden, w.float(), b.float(), ids))
    w.requires_grad_()
    token_logprobs(hidden, w, b, ids).sum().backward()
    assert w.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_row_has_the_bits_of_the_engines_score_in_any_company(threads: int, monkeypatch) -> None:
    hidden, w, b, ids = given(70, 24, 5003)
    before = torch.get_num_threads()
    served = [found.logprob for found in score(linear(hidden, w, b), ids.tolist(), 0)]
    torch.set_num_threads(threads)
    try:
        for pieces in (1, 1 << 21):
            monkeypatch.setattr(kernel, "PIECE_NUMBERS", pieces)
            for keep in (False, True):
                w.requires_grad_(keep)
                assert token_logprobs(hidden, w, b, ids, keep=keep).tolist() == served
                some = [5, 69, 0, 31]
                alone = token_logprobs(hidden[some], w, b, ids[some], keep=keep)
                assert alone.tolist() == [served[row] for row in some]
            w.requires_grad_(False)
        assert logprobs_of(linear(hidden, w, b), ids).tolist() == served
    finally:
        torch.set_num_threads(before)


def test_the_gradient_is_the_same_on_every_run() -> None:
    hidden, w, b, ids = given(40, 24, 3000)
    hidden.requires_grad_()
    w.requires_grad_()
    runs = [torch.autograd.grad(token_logprobs(hidden, w, b, ids).sum(), (hidden, w)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    logits = torch.randn(3, 2500)
    logits[1, 1700] = value
    out = logprobs_of(logits, torch.tensor([3, 4, 5]))
    assert torch.isnan(out[1]) and torch.isfinite(out[[0, 2]]).all()
    hidden, w, _, ids = given(4, 8, 30)
    hidden[2, 1] = value
    hidden.requires_grad_()
    out = token_logprobs(hidden, w, None, ids)
    out.sum().backward()
    assert torch.isnan(out[2]) and torch.isnan(hidden.grad[2]).all() and torch.isfinite(hidden.grad[[0, 1, 3]]).all()


def test_impossible_tokens_and_unknown_ids() -> None:
    logits = torch.full((1, 3000), -math.inf)
    logits[0, 2999] = 2.0
    assert logprobs_of(logits, torch.tensor([2999])).item() == 0.0
    assert logprobs_of(logits, torch.tensor([1])).item() == -math.inf
    for wrong in (-1, 30):
        with pytest.raises(IndexError, match="0 to 29"):
            token_logprobs(*given(1, 8, 30, bias=False)[:3], torch.tensor([wrong]))


def test_logprobs_of_logits_have_their_gradient() -> None:
    logits, ids = torch.randn(9, 77, requires_grad=True), torch.arange(9)
    upstream = torch.randn(9)
    (ours,) = torch.autograd.grad(logprobs_of(logits, ids), logits, upstream)
    right = torch.autograd.grad(torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0], logits, upstream)[0]
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_weight_has_is_added_to_in_place_with_the_bits_of_sums(threads: int) -> None:
    hidden, w, _, ids = given(300, 64, 5000, bias=False)
    w.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    places, summed = [], torch.zeros_like(w)
    for rows in (slice(0, 110), slice(110, 250), slice(250, 300)):
        alone = w.detach().clone().requires_grad_()
        for weight in (w, alone):
            token_logprobs(hidden[rows], weight, None, ids[rows], keep=True).sum().backward()
        summed += alone.grad
        places.append(w.grad.data_ptr())
    torch.set_num_threads(before)
    assert len(set(places)) == 1
    assert torch.equal(w.grad, summed)


def test_a_watched_gradient_is_handed_over() -> None:
    hidden, w, _, ids = given(8, 24, 3000, bias=False)
    w.requires_grad_()
    seen: list[Tensor] = []
    w.register_hook(lambda grad: seen.append(grad.clone()))
    for _ in range(2):
        token_logprobs(hidden, w, None, ids, keep=True).sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    torch.testing.assert_close(w.grad, 2 * seen[0])
