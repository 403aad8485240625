"""Block-sparse attention: dense attention under the same mask, one bit pattern for a row, no look at what is absent."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.core.sparse import PANEL, BigBird, Fixed, Layout, Local, Longformer, Strided, Variable
from twofold.kernels import native
from twofold.kernels.attention import packed_attention
from twofold.kernels.blocksparse import BYTE, Sparse
from twofold.kernels.paged import Panels, Spans, keep, paged_attention
from twofold.kernels.walk import KEYS, Attend
from twofold.models.ring import Places, _tiles

LENGTHS = (300, 17, 0, 1, 128, 129, 650)
LAYOUTS: dict[str, Layout] = {
    "local-16": Local(block=16),
    "local-128": Local(block=128, num_sliding_window_blocks=1),
    "strided-32": Strided(block=32, stride_blocks=3),
    "fixed-16": Fixed(block=16, num_different_global_patterns=4, different_layout_per_head=True),
    "fixed-64": Fixed(block=64, num_local_blocks=2, horizontal_global_attention=True),
    "variable-48": Variable(block=48, local_window_blocks=(1, 3), num_random_blocks=1, global_block_indices=(1,)),
    "bigbird-16": BigBird(block=16, num_random_blocks=2, different_layout_per_head=True, seed=7),
    "longformer-32": Longformer(block=32, global_block_indices=(0, 5), global_block_end_indices=(1, 7)),
    "local-256": Local(block=256),
}
here = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def how_of(layout: Layout, heads: int = 6, length: int = 700, **more: object) -> Attend:
    return Attend(0.3, sparse=Sparse(layout, heads, length), **more)  # type: ignore[arg-type]


def visible(layout: Layout, heads: int, length: int) -> Tensor:
    """Which keys each query sees, from the layout's rows and nothing else: [H, L, L]."""
    out = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        for i in range(-(-length // layout.block)):
            row = layout.row(layout.pattern(head), i)
            blocks = [j for j in range(i + 1) if row >> j & 1]
            for j in blocks:
                span = slice(j * layout.block, (j + 1) * layout.block)
                out[head, i * layout.block : (i + 1) * layout.block, span] = True
    return out.tril()


def dense(q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, how: Attend) -> Tensor:
    """Dense attention of one sequence under the layout's mask."""
    assert how.sparse is not None
    group = q_LHD.shape[1] // k_LKD.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q_LHD, k_LKD, v_LKD))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    s = q @ k.mT * how.scale
    s = how.softcap * torch.tanh(s / how.softcap) if how.softcap else s
    place = torch.arange(len(q_LHD))
    gap = place - place[:, None]
    if how.slopes:
        s = s + torch.tensor(how.slopes, dtype=s.dtype)[:, None, None] * gap
    seen = visible(how.sparse.layout, q.shape[0], len(place)) & (gap > -(how.window or 2**30))
    return (s.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def packed_truth(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], how: Attend) -> Tensor:
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([dense(*piece, how) for piece in pieces if len(piece[0])])


def draw(heads: int = 6, kv_heads: int = 2, dim: int = 20, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(sum(lengths), h, dim) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_table_says_what_the_rows_say(layout: Layout) -> None:
    assert BYTE == KEYS
    table = Sparse(layout, 5, 700).table()
    place = torch.arange(700)
    seen = ~table.absent(place[None], place, 5)[0, :, :, 0]  # [H, L, N], not yet causal
    assert torch.equal(seen.tril(), visible(layout, 5, 700))
    part = Sparse(layout, 6, 700).part(1, 3).table()
    assert torch.equal(
        part.absent(place[None], place, 2)[0], Sparse(layout, 6, 700).table().absent(place[None], place, 6)[0, 2:4]
    )
    for first, last, oldest in ((0, 1, 0), (0, 128, 0), (130, 400, 0), (690, 700, 0), (600, 640, 300)):
        some = visible(layout, 5, 700)[:, first:last, oldest - oldest % KEYS :].any(0).any(0)
        found = {int(key) // KEYS * KEYS for key in some.nonzero().flatten()}
        assert {start - oldest + oldest % KEYS for start in table.starts(first, last, oldest)} >= found
    assert layout.block % PANEL == 0


@pytest.mark.parametrize("way", ["native", "together", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forward_and_gradients_are_those_of_dense_attention_under_the_mask_in_fp64(layout: Layout, way: str) -> None:
    if way == "native" and native.missing():
        pytest.skip(native.missing())
    lengths = LENGTHS if way == "native" else (300, 17, 0, 129)
    how = how_of(layout, softcap=4.0 if layout.block == 32 else None, window=200 if layout.block == 64 else None)
    q, k, v = (x.requires_grad_() for x in draw(lengths=lengths))
    up = torch.randn_like(q)
    out = packed_attention.implementation(way).run(q, k, v, lengths, how)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = packed_truth(wide[0], wide[1], wide[2], lengths, how)
    torch.testing.assert_close(out.double(), truth, atol=5e-6, rtol=1e-5)
    if way == "reference":
        return  # written in place, not for autograd
    grads = torch.autograd.grad(out, (q, k, v), up)
    for ours, theirs in zip(grads, torch.autograd.grad(truth, wide, up.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["fixed-16", "variable-48", "local-128"])
def test_together_has_the_bits_of_one_at_a_time(layout: str) -> None:
    how, qkv = how_of(LAYOUTS[layout]), draw()
    together = packed_attention.implementations["together"].run
    assert torch.equal(together(*qkv, LENGTHS, how), packed_attention.reference(*qkv, LENGTHS, how))


class Cached:
    """Whole sequences of LENGTHS in a cache of scattered blocks."""

    def __init__(self, how: Attend, kept: torch.dtype, size: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 20):
        self.how, self.size = how, size
        self.q, k, v = draw(heads, kv_heads, dim)
        numbers = list(range(sum(-(-n // size) for n in LENGTHS) + 3))
        random.Random(size).shuffle(numbers)
        self.blocks = [[numbers.pop() for _ in range(-(-n // size))] for n in LENGTHS]
        self.panels = Panels.zeros(max(map(max, filter(None, self.blocks))) + 1, kv_heads, size, dim, kept)
        self.whole = Spans([(0, n, own) for n, own in zip(LENGTHS, self.blocks, strict=True)], size)
        keep(k, v, self.panels, self.whole)

    def some(self, start: int, count: int, number: int = 6) -> tuple[Tensor, Spans]:
        """Queries of some tokens of one sequence."""
        at = sum(LENGTHS[:number]) + start
        return self.q[at : at + count], Spans([(start, count, self.blocks[number])], self.size)


@here
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_rows_bits_are_its_own(layout: Layout, kept: torch.dtype) -> None:
    """Whole, in chunks, decoded, on any number of threads, in cache blocks of any size."""
    cached = Cached(how_of(layout), kept, 32)
    truth = paged_attention(cached.q, cached.panels, cached.whole, cached.how)
    near = paged_attention.reference(cached.q, cached.panels, cached.whole, cached.how)
    torch.testing.assert_close(truth, near, atol=5e-6, rtol=1e-5)
    at = sum(LENGTHS[:6])
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for chunk in (1, 7, 64, 250):
            for start in (0, 127, 128, 650 - chunk):
                queries, spans = cached.some(start, chunk)
                found = paged_attention(queries, cached.panels, spans, cached.how)
                assert torch.equal(found, truth[at + start : at + start + chunk]), (threads, chunk, start)
    other = Cached(how_of(layout), kept, 128)
    assert torch.equal(paged_attention(other.q, other.panels, other.whole, other.how), truth)


@here
@pytest.mark.parametrize("kept", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["fixed-16", "bigbird-16", "strided-32"])
def test_a_trainers_forward_is_the_engines(layout: str, kept: torch.dtype | None) -> None:
    cached = Cached(how_of(LAYOUTS[layout]), kept or torch.float32, 32)
    packed = packed_attention(*draw(), LENGTHS, replace(cached.how, kept=kept))
    queries, spans = cached.some(649, 1)
    assert torch.equal(paged_attention(queries, cached.panels, spans, cached.how), packed[-1:])


@here
@pytest.mark.parametrize("layout", ["local-16", "bigbird-16", "fixed-64"])
def test_a_long_context_in_parts_is_as_the_walk_in_one(layout: str) -> None:
    how = how_of(LAYOUTS[layout], 4, 3000)
    panels, own = Panels.zeros(47, 2, 64, 128), random.Random(0).sample(range(47), 47)
    keep(*torch.randn(2, 3000, 2, 128), panels, Spans([(0, 3000, own)], 64))
    for count in (1, 5, 40):
        q, spans = torch.randn(count, 4, 128), Spans([(3000 - count, count, own)], 64)
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(paged_attention(q, panels, spans, how))
        assert torch.equal(*found), count


@here
@pytest.mark.parametrize("layout", ["local-128", "bigbird-16", "longformer-32"])
def test_sharing_a_prefix_changes_no_bit(layout: str) -> None:
    dice, how = random.Random(2), how_of(LAYOUTS[layout], 4, 1500)
    numbers = list(range(400))
    dice.shuffle(numbers)
    root = [numbers.pop() for _ in range(20)]  # 640 tokens in blocks of 32
    spans = []
    for _ in range(6):
        start, count = 640 + dice.randrange(200), dice.choice((1, 1, 5, 40))
        spans.append((start, count, root + [numbers.pop() for _ in range(-(-(start + count) // 32) - 20)]))
    panels = Panels.zeros(400, 2, 32, 64)
    for start, count, own in spans:
        keep(*torch.randn(2, start + count, 2, 64), panels, Spans([(0, start + count, own)], 32))
    q = torch.randn(sum(count for _, count, _ in spans), 4, 64)
    pieces = zip(q.split([count for _, count, _ in spans]), spans, strict=True)
    alone = torch.cat([paged_attention(rows, panels, Spans([span], 32), how) for rows, span in pieces])
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert torch.equal(paged_attention(q, panels, Spans(spans, 32), how), alone), threads


@here
@pytest.mark.parametrize("heads", [(6, 2), (8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_absent_is_never_looked_at(layout: Layout, heads: tuple[int, int]) -> None:
    """Keys and values that a decoded token does not see may be anything: not a number of them is multiplied."""
    layout = replace(layout, different_layout_per_head=False) if not isinstance(layout, Fixed) else layout
    if isinstance(layout, Fixed):
        layout = replace(layout, num_different_global_patterns=1)
    q, k, v = draw(heads[0], heads[1], 32, (650,))
    how, seen = how_of(layout, heads[0]), visible(layout, heads[0], 650)[0, 649]
    hidden = ~seen[: 650 // PANEL * PANEL]
    assert hidden.any() or layout.block == 256
    panels, spans = Panels.zeros(6, heads[1], 128, 32), Spans([(0, 650, range(6))], 128)
    keep(k, v, panels, spans)
    last = Spans([(649, 1, range(6))], 128)
    truth = paged_attention(q[-1:], panels, last, how)
    for part in (k, v):
        part[: len(hidden)][hidden] = torch.nan
    keep(k, v, panels, spans)
    assert truth.isfinite().all() and torch.equal(paged_attention(q[-1:], panels, last, how), truth)


@here
def test_backward_passes_over_what_is_absent() -> None:
    """Gradients of the blocks that see only themselves are finite though their neighbours are not."""
    how = how_of(Local(block=128, num_sliding_window_blocks=1))
    q, k, v = draw(lengths=(384,))
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    up = torch.randn_like(q)
    truth = torch.autograd.grad(packed_attention(*clean, (384,), how), clean, up)
    for x in (q, k, v, up):
        x[128:256] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(packed_attention(*leaves, (384,), how), leaves, up)
    for ours, theirs in zip(found, truth, strict=True):
        for part in (slice(0, 128), slice(256, 384)):
            assert torch.equal(ours[part], theirs[part])


def test_a_rings_tiles_hide_what_the_layout_has_not() -> None:
    layout, place = LAYOUTS["fixed-16"], torch.arange(300)
    mine, theirs = (Places(torch.zeros(300, dtype=torch.int64), order) for order in (place, place.flip(0)))
    tiles = _tiles(torch.zeros(2, 300, 3, 4), torch.zeros(300, 2, 4), mine, theirs, how_of(layout))
    seen = torch.zeros(6, 300, 300, dtype=torch.bool)
    for rows, keys, scores in tiles:
        seen[:, rows, keys] = scores.isfinite().permute(0, 2, 1, 3).flatten(0, 1)
    assert torch.equal(seen.flip(2), visible(layout, 6, 300))


def test_a_sequence_longer_than_the_layout_was_made_for_is_refused() -> None:
    q, k, v = draw(lengths=(40,))
    with pytest.raises(ConfigError, match="made for 32"):
        packed_attention(q, k, v, (40,), how_of(Local(), 6, 32))
    panels = Panels.zeros(3, 2, 16, 20)
    with pytest.raises(ConfigError, match="made for 32"):
        paged_attention(q, panels, Spans([(0, 40, range(3))], 16), how_of(Local(), 6, 32))
