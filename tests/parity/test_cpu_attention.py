"""The CPU kernels of attention: near the references in torch, and one bit pattern for a row whatever stands beside it.

The same calls are fuzzed on every instruction set and under sanitizers by `fuzz_kernels.py`.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.parity.test_kernels import naive_attention
from twofold.core import ConfigError
from twofold.kernels import native, stages
from twofold.kernels.attention import packed_attention
from twofold.kernels.norm import layer_norm, rms_norm
from twofold.kernels.paged import Panels, Spans, cache_shapes, keep, paged_attention, run, to_bytes
from twofold.kernels.rope import rotate
from twofold.kernels.walk import Attend

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")

LENGTHS = (300, 17, 0, 1, 128, 129, 650)
KEPT = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Heads:
    """A kind of attention: heads, kv heads, head size, block size, how it looks, and whether it has sinks."""

    heads: int
    kv_heads: int
    dim: int
    size: int
    how: Attend
    sinks: bool = False


KINDS = {
    "tiny": Heads(8, 8, 8, 16, Attend(0.3, softcap=4.0)),
    "odd": Heads(4, 4, 10, 48, Attend(0.3), sinks=True),
    "window": Heads(6, 2, 20, 32, Attend(0.3, window=37)),
    "alibi": Heads(7, 1, 40, 16, Attend(0.2, slopes=tuple(0.1 * i for i in range(7)))),
    "eight": Heads(8, 1, 64, 128, Attend(0.125, window=1)),
    "eighty": Heads(6, 3, 80, 64, Attend(0.1), sinks=True),
    "usual": Heads(4, 2, 128, 16, Attend(0.09)),
    "large": Heads(4, 2, 256, 112, Attend(0.06, window=200, softcap=20.0), sinks=True),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def blocks_for(counts: list[int], size: int, seed: int = 0) -> list[list[int]]:
    """Scattered blocks that hold so many tokens each, no block in two lists."""
    numbers = list(range(sum(-(-n // size) for n in counts) + 3))
    random.Random(seed).shuffle(numbers)
    return [[numbers.pop() for _ in range(-(-n // size))] for n in counts]


class Case:
    """Whole sequences of LENGTHS in a cache, and the queries of all their tokens."""

    def __init__(self, kind: Heads, kept: torch.dtype, *, size: int | None = None) -> None:
        torch.manual_seed(1)
        self.kind, self.size = kind, size or kind.size
        total = sum(LENGTHS)
        self.q, self.k, self.v = (torch.randn(total, h, kind.dim) for h in (kind.heads, kind.kv_heads, kind.kv_heads))
        self.sinks = torch.randn(kind.heads) if kind.sinks else None
        self.blocks = blocks_for(list(LENGTHS), self.size)
        highest = max(block for own in self.blocks for block in own)
        self.panels = Panels.zeros(highest + 1, kind.kv_heads, self.size, kind.dim, kept)
        self.whole = Spans([(0, n, own) for n, own in zip(LENGTHS, self.blocks, strict=True)], self.size)
        keep(self.k, self.v, self.panels, self.whole)

    def look(self, q: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        lse = torch.empty(q.shape[:2])
        return paged_attention(q, self.panels, spans, self.kind.how, self.sinks, lse), lse

    def last(self, count: int) -> tuple[Spans, list[int]]:
        """The last tokens of every sequence, at most `count`, and their places."""
        spans, places, at = [], [], 0
        for n, own in zip(LENGTHS, self.blocks, strict=True):
            few = min(n, count)
            spans.append((n - few, few, own))
            places += range(at + n - few, at + n)
            at += n
        return Spans(spans, self.size), places


def textbook(case: Case) -> Tensor:
    """What the kernel should give, in fp64 and from what the cache holds."""
    how, out, at = case.kind.how, [], 0
    q = case.q * how.scale
    if case.panels.values.dtype == torch.int8:
        codes, scale = to_bytes(q)
        q = codes * scale[..., None]
    for n, own in zip(LENGTHS, case.blocks, strict=True):
        k, v = (x[:, :n].transpose(0, 1).double() for x in case.panels.read(torch.tensor(own, dtype=torch.int64)))
        sinks = None if case.sinks is None else case.sinks.double()
        out.append(naive_attention(q[at : at + n].double(), k, v, (n,), replace(how, scale=1.0), sinks))
        at += n
    return torch.cat(out)


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_near_the_textbook_in_fp64(kind: Heads, kept: torch.dtype) -> None:
    case = Case(kind, kept)
    out, _ = case.look(case.q, case.whole)
    torch.testing.assert_close(out.double(), textbook(case), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_near_the_reference_in_torch(kept: torch.dtype) -> None:
    case = Case(KINDS["eighty"], kept)
    spans, places = case.last(40)
    out, lse = case.look(case.q[places], spans)
    truth_lse = torch.empty_like(lse)
    truth = paged_attention.reference(case.q[places], case.panels, spans, case.kind.how, case.sinks, truth_lse)
    torch.testing.assert_close(out, truth, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(lse, truth_lse, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_keys_and_values_are_kept_as_the_reference_keeps_them(kind: Heads, kept: torch.dtype) -> None:
    case = Case(kind, kept)
    by_torch = Panels.zeros(*case.panels.values.shape[:4], kept)
    keep.reference(case.k, case.v, by_torch, case.whole)
    for name in cache_shapes(1, 1, 16, 1, kept):
        assert torch.equal(getattr(case.panels, name), getattr(by_torch, name)), name


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("kind", ["window", "usual", "large"])
def test_a_rows_bits_are_its_own(kind: str, kept: torch.dtype) -> None:
    case = Case(KINDS[kind], kept)
    truth, truth_lse = case.look(case.q, case.whole)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for count in (1, 7, 64):
            spans, places = case.last(count)
            out, lse = case.look(case.q[places], spans)
            assert torch.equal(out, truth[places]) and torch.equal(lse, truth_lse[places]), (threads, count)
            for start, few, own in (spans.spans[0], spans.spans[-1]):
                at = sum(LENGTHS) - few if own is spans.spans[-1][2] else LENGTHS[0] - few
                alone, _ = case.look(case.q[at : at + few], Spans([(start, few, own)], case.size))
                assert torch.equal(alone, truth[at : at + few]), (threads, count, "alone")
    for size in (16, 48, 128):
        other = Case(KINDS[kind], kept, size=size)
        assert torch.equal(other.look(other.q, other.whole)[0], truth), size


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_long_context_in_parts_is_as_the_walk_in_one(kept: torch.dtype) -> None:
    kind = KINDS["usual"]
    panels = Panels.zeros(50, kind.kv_heads, 64, kind.dim, kept)
    (own,) = blocks_for([3000], 64)
    keep(*torch.randn(2, 3000, kind.kv_heads, kind.dim), panels, Spans([(0, 3000, own)], 64))
    for how in (kind.how, replace(kind.how, window=1500)):
        for count in (1, 5, 40):
            q, spans = torch.randn(count, kind.heads, kind.dim), Spans([(3000 - count, count, own)], 64)
            found = []
            for threads in (1, 4):
                torch.set_num_threads(threads)
                found.append(paged_attention(q, panels, spans, how))
            assert torch.equal(*found), (how, count)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("size", [16, 48, 128])
def test_sharing_a_prefix_changes_no_bit(size: int, window: int | None, kept: torch.dtype) -> None:
    draw, kind = random.Random(size), KINDS["usual"]
    numbers = list(range(-(-12_000 // size)))
    draw.shuffle(numbers)

    def take(tokens: int) -> list[int]:
        return [numbers.pop() for _ in range(-(-tokens // size))]

    root = take(640)
    branches = [root, root + take(256), root + take(256)]
    spans = [(0, 100, take(100))]
    for i in range(9):
        shared = branches[i % 3]
        start, count = len(shared) * size + draw.randrange(200), draw.choice((1, 1, 1, 5, 40))
        spans.append((start, count, shared + take(start + count - len(shared) * size)))
    draw.shuffle(spans)
    panels = Panels.zeros(-(-12_000 // size), kind.kv_heads, size, kind.dim, kept)
    for start, count, own in spans:
        past = Spans([(0, start + count, own)], size)
        keep(*torch.randn(2, past.tokens, kind.kv_heads, kind.dim), panels, past)
    step, how = Spans(spans, size), replace(kind.how, window=window)
    q = torch.randn(step.tokens, kind.heads, kind.dim)
    alone = [
        paged_attention(rows, panels, Spans([span], size), how)
        for rows, span in zip(q.split([count for _, count, _ in spans]), spans, strict=True)
    ]
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert torch.equal(paged_attention(q, panels, step, how), torch.cat(alone)), threads


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_what_a_block_held_before_reaches_nobody(kept: torch.dtype) -> None:
    case = Case(KINDS["usual"], kept)
    truth, _ = case.look(case.q, case.whole)
    for part in (case.panels.keys, case.panels.values, case.panels.key_scales, case.panels.value_scales):
        if part is not None:
            part.fill_(100 if part.dtype == torch.int8 else torch.nan)
    keep(case.k, case.v, case.panels, case.whole)
    assert torch.equal(case.look(case.q, case.whole)[0], truth)


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_numbers_that_are_not_finite_are_seen(which: str, kept: torch.dtype) -> None:
    case = Case(KINDS["usual"], kept)
    getattr(case, which)[LENGTHS[0] + 3, 0, 5] = torch.nan
    keep(case.k, case.v, case.panels, case.whole)
    out, _ = case.look(case.q, case.whole)
    assert not out[LENGTHS[0] + 3, 0].isfinite().all()
    assert out[: LENGTHS[0]].isfinite().all() and out[LENGTHS[0] + LENGTHS[1] :].isfinite().all()


@pytest.mark.parametrize("kept", [None, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["window", "usual"])
def test_a_trainers_forward_is_the_engines(kind: str, kept: torch.dtype | None) -> None:
    case = Case(KINDS[kind], kept or torch.float32)
    packed = packed_attention(case.q, case.k, case.v, LENGTHS, replace(case.kind.how, kept=kept))
    spans, places = case.last(1)
    assert torch.equal(packed[places], case.look(case.q[places], spans)[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.sinks], ids=str)
def test_gradients_are_those_of_the_textbook_in_fp64(kind: Heads) -> None:
    total = sum(LENGTHS)
    q, k, v = (torch.randn(total, h, kind.dim, requires_grad=True) for h in (kind.heads, kind.kv_heads, kind.kv_heads))
    up, found = torch.randn(total, kind.heads, kind.dim), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(packed_attention(q, k, v, LENGTHS, kind.how), (q, k, v), up))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "threads change no bit"
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(naive_attention(*wide, LENGTHS, kind.how), wide, up.double())
    for ours, theirs in zip(found[0], truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_heads_made_ready_at_once_have_the_bits_of_one_op_at_a_time(norm: str, interleaved: bool) -> None:
    kind, tokens, pairs = KINDS["eighty"], 37, 20
    qkv = torch.randn(tokens, kind.heads + 2 * kind.kv_heads, kind.dim) * 2
    weights, biases = torch.randn(2, kind.dim), torch.randn(2, kind.dim)
    cos, sin = torch.randn(2, tokens, pairs)
    spans = Spans([(0, 30, [2]), (0, 7, [0])], 32)
    at = spans.positions_T.long()

    def ready(x: Tensor, which: int) -> Tensor:
        w, b = weights[which], biases[which]
        x = rms_norm(x, w, 1e-5) if norm == "rms" else layer_norm(x, w, b, 1e-5)
        return rotate(x, cos[at], sin[at], interleaved)

    q, k, v = qkv.clamp(-1.5, 1.5).split((kind.heads, kind.kv_heads, kind.kv_heads), 1)
    apart, at_once = (Panels.zeros(3, kind.kv_heads, 32, kind.dim) for _ in range(2))
    q = ready(q, 0)
    keep(ready(k, 1), v, apart, spans)
    whole = qkv.flatten(1).clone()
    stage = stages.Heads(
        cache=at_once.struct(),
        qkv=whole.data_ptr(),
        qkv_stride=whole.shape[1],
        heads=kind.heads,
        pairs=pairs,
        interleaved=interleaved,
        norm=("rms", "layer").index(norm) + 1,
        eps=1e-5,
        clip=1.5,
        q_weight=stages.numbers(weights[0]),
        k_weight=stages.numbers(weights[1]),
        q_bias=stages.numbers(biases[0] if norm == "layer" else None),
        k_bias=stages.numbers(biases[1] if norm == "layer" else None),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
    )
    stage.step = ctypes.pointer(spans.struct)
    run(stage)
    assert torch.equal(whole.view_as(qkv)[:, : kind.heads], q)
    assert torch.equal(at_once.keys, apart.keys) and torch.equal(at_once.values, apart.values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (20, 5), (10, 5), (80, 20), (128, 64)])
def test_turning_has_the_references_bits(dim: int, pairs: int, interleaved: bool) -> None:
    for tokens in (0, 1, 37):
        x, up = torch.randn(tokens, 3, dim, requires_grad=True), torch.randn(tokens, 3, dim)
        cos, sin = torch.randn(2, tokens, pairs)
        out = rotate(x, cos, sin, interleaved)
        assert torch.equal(out, rotate.reference(x, cos, sin, interleaved))
        (grad,) = torch.autograd.grad(out, x, up)
        assert torch.equal(grad, rotate.reference(up, cos, -sin, interleaved))


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        cache_shapes(4, 2, 24, 64, torch.float32)
    with pytest.raises(ConfigError, match="bfloat16"):
        cache_shapes(4, 2, 16, 64, torch.float16)
    with pytest.raises(ConfigError, match="do not hold 17"):
        Spans([(0, 17, [3])], 16)
