"""Attention that looks ahead as well: against the textbook, forward and backward, and a text's bits in any company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.core.sparse import Local
from twofold.kernels import flops
from twofold.kernels.attention import Attend, packed_attention
from twofold.kernels.blocksparse import Sparse

LENGTHS = (260, 1, 130, 128, 17, 260)
WINDOWS = (None, 1, 9, 65, 200)
WAYS = ("reference", "native", "together")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(lengths: Sequence[int] = LENGTHS, heads: int = 6, kv_heads: int = 3, dim: int = 20) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    total = sum(lengths)
    return tuple(torch.randn(total, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads))


def textbook(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], how: Attend) -> Tensor:
    out, groups = [], q.shape[1] // k.shape[1]
    for one_q, one_k, one_v in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        one_k, one_v = (x.repeat_interleave(groups, 1) for x in (one_k, one_v))
        place = torch.arange(len(one_q))
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) * how.scale
        if how.softcap is not None:
            scores = how.softcap * torch.tanh(scores / how.softcap)
        if how.window is not None:
            scores = scores.masked_fill((place[:, None] - place).abs() >= how.window, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(out)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("way", WAYS)
def test_the_textbook(way: str, window: int | None) -> None:
    q, k, v = draw()
    how = Attend(0.3, window=window, softcap=20.0 if window == 9 else None, causal=False)
    out = packed_attention.implementation(way).run(q, k, v, LENGTHS, how)
    torch.testing.assert_close(out, textbook(q, k, v, LENGTHS, how), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("way", ["native", "together"])
def test_gradients_are_the_textbooks(way: str, window: int | None) -> None:
    leaves = [x.requires_grad_() for x in draw()]
    how = Attend(0.3, window=window, causal=False)
    up = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(packed_attention.implementation(way).run(*leaves, LENGTHS, how), leaves, up)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(textbook(*wide, LENGTHS, how), wide, up.double())
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 65])
@pytest.mark.parametrize("way", WAYS)
def test_a_texts_bits_are_its_own(way: str, window: int | None) -> None:
    """Alone, among others, in another order, and on other numbers of threads."""
    q, k, v = draw()
    how = Attend(0.3, window=window, causal=False)
    run = packed_attention.implementation(way).run
    together = run(q, k, v, LENGTHS, how).split(LENGTHS)
    pieces = list(zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True))
    for number, piece in enumerate(pieces):
        assert torch.equal(run(*piece, (LENGTHS[number],), how), together[number])
    turned = [torch.cat(part) for part in zip(*reversed(pieces), strict=True)]
    back = run(*turned, LENGTHS[::-1], how).split(LENGTHS[::-1])
    assert all(torch.equal(a, b) for a, b in zip(reversed(back), together, strict=True))
    if way == "native":
        torch.set_num_threads(3)
        assert torch.equal(run(q, k, v, LENGTHS, how), torch.cat(together))


def test_long_texts_in_parts_have_the_same_bits() -> None:
    """Few heads and many keys: the work is cut along the keys too, on more than one thread."""
    q, k, v = draw((2000,), heads=1, kv_heads=1)
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(packed_attention.implementation("native").run(q, k, v, (2000,), Attend(0.3, causal=False)))
    assert torch.equal(*found)


def test_a_broken_text_breaks_no_other() -> None:
    q, k, v = draw()
    k[5] = torch.nan
    out = packed_attention.implementation("native").run(q, k, v, LENGTHS, Attend(0.3, causal=False))
    assert out[: LENGTHS[0]].isnan().all() and out[LENGTHS[0] :].isfinite().all()


def test_pairs_are_counted() -> None:
    place = torch.arange(20)
    for window in (None, 1, 4, 50):
        seen = (place[:, None] - place).abs() < (window or 99)
        assert flops.pairs([20], window, causal=False) == int(seen.sum())


def test_a_sparse_layout_does_not_look_ahead() -> None:
    q, k, v = draw((40,))
    how = Attend(0.3, sparse=Sparse(Local(), 6, 64), causal=False)
    with pytest.raises(ConfigError, match="causal"):
        packed_attention(q, k, v, (40,), how)
