"""Entropy from hidden states: against fp64 with gradients, each row's bits its own, and few logits held."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import SPECS, decoder, rounded
from torch import Tensor
from torch.distributions import Categorical

from twofold.kernels import entropy as kernel
from twofold.kernels.entropy import entropy_of, token_entropy

SHAPES = [(1, 1, 1), (0, 8, 40), (3, 5, 2), (7, 33, 17), (33, 48, 1025), (65, 24, 4099)]
HEADS = [(1.0, None, False), (0.4, None, True), (1.3, 5.0, True)]
WARM = 0.7


def given(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=generator)
    w = (torch.randn(vocab, width, generator=generator) * 0.4).to(dtype)
    return [hidden, w, torch.randn(vocab, generator=generator).to(dtype)][: 3 if bias else 2]


def truth(
    hidden: Tensor, w: Tensor, b: Tensor | None, multiplier: float, softcap: float | None, temperature: float
) -> Tensor:
    x = F.linear(hidden, w, b) * multiplier
    x = softcap * torch.tanh(x / softcap) if softcap else x
    found: Tensor = Categorical(logits=x / temperature, validate_args=False).entropy()
    return found


@pytest.mark.parametrize("temperature", [1.0, WARM])
@pytest.mark.parametrize(("multiplier", "softcap", "bias"), HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_fp64(shape, multiplier, softcap, bias, temperature, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "NUMBERS", 1)  # 16 rows at once
    leaves = [x.requires_grad_() for x in given(*shape, bias=bias)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours = token_entropy(*(leaves if bias else [*leaves, None]), multiplier, softcap, temperature)
    theirs = truth(*(wide if bias else [*wide, None]), multiplier, softcap, temperature)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)
    upstream = torch.randn(len(ours))
    found = torch.autograd.grad(ours, leaves, upstream)
    for mine, right in zip(found, torch.autograd.grad(theirs, wide, upstream.double()), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("multiplier", "softcap", "bias"), HEADS)
def test_a_row_has_its_own_bits(multiplier, softcap, bias, monkeypatch) -> None:
    tensors = given(65, 24, 4099, bias=bias)
    hidden, rest = tensors[0], [*tensors[1:], *([] if bias else [None]), multiplier, softcap, WARM]
    whole = token_entropy(hidden, *rest)
    assert torch.equal(whole, token_entropy.reference(hidden, *rest))
    assert torch.equal(torch.cat([token_entropy(row[None], *rest) for row in hidden]), whole)
    monkeypatch.setattr(kernel, "NUMBERS", 1)
    assert torch.equal(token_entropy(hidden, *rest), whole)


def test_what_is_known_beforehand() -> None:
    even, sure = torch.zeros(1, 300), torch.zeros(1, 300)
    sure[0, 7] = 1e4
    assert entropy_of(even).item() == pytest.approx(math.log(300), abs=1e-6)
    assert entropy_of(sure).item() == 0.0
    assert entropy_of(even[:, :1]).item() == 0.0


def test_bf16_weights_are_widened_exactly() -> None:
    hidden, w, b = given(21, 40, 1500, torch.bfloat16)
    assert torch.equal(token_entropy(hidden, w, b), token_entropy(hidden, w.float(), b.float()))
    w.requires_grad_()
    token_entropy(hidden, w, b).sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.bfloat16 and w.grad.any()


def test_no_more_logits_than_a_few_rows_are_held(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "NUMBERS", 1)
    widest = 0
    real = kernel.entropy_of.reference

    def watching(logits_RV: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, len(logits_RV))
        return real(logits_RV)

    monkeypatch.setattr(kernel, "entropy_of", watching)
    hidden, w, b = given(65, 24, 4099)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_entropy(hidden.requires_grad_(), w, b).sum().backward()
    assert widest == kernel.ROWS
    assert sum(kept) == hidden.numel() + w.numel() + b.numel() + len(hidden)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_decoders_entropy_is_that_of_its_logits(name) -> None:
    model = decoder(replace(SPECS[name], score=1))
    hidden = torch.randn(40, model.spec.hidden)
    for temperature in (1.0, WARM):
        right = Categorical(logits=model.logits(hidden) / temperature).entropy()
        torch.testing.assert_close(model.entropy(hidden, temperature=temperature), right)
    narrow = rounded(model, "int8")
    assert torch.equal(narrow.entropy(hidden), entropy_of(narrow.logits(hidden)))
    assert narrow.scores(hidden).shape == (40, 1) and narrow.score.weight.dtype == torch.float32
