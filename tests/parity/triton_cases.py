"""What every Triton kernel must show, on any device: its reference's numbers within a stated bound, and equal
bits where the contract asks for them. `test_triton*.py` run these in Triton's interpreter, `tests/gpu/` on a device.

References run on the CPU in the activations' own type; a result may differ by the rounding of that type.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from twofold.core.sparse import BigBird, Fixed, Local
from twofold.kernels import activation as ref_activation
from twofold.kernels import moe, quantized, sample
from twofold.kernels import norm as ref_norm
from twofold.kernels import rope as ref_rope
from twofold.kernels.attention import Attend
from twofold.kernels.blocksparse import Sparse
from twofold.kernels.triton import activation, attention, experts, linear, norm, quantize, rope, sampling
from twofold.quant import named

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
SLOPES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
HOWS = {
    "plain": Attend(0.3),
    "window": Attend(0.3, window=70),
    "all": Attend(0.3, window=150, softcap=4.0, slopes=SLOPES),
    "sparse": Attend(0.3, sparse=Sparse(BigBird(block=16, different_layout_per_head=True), 6, 2048)),
    "blocks": Attend(0.3, softcap=4.0, sparse=Sparse(Fixed(block=64, num_local_blocks=2), 6, 2048)),
}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def near(got: Tensor, truth: Tensor, scale: float = 1.0) -> None:
    """Equal type and shape, and numbers within the type's bound."""
    assert got.dtype == truth.dtype and got.shape == truth.shape
    bound = BOUND.get(truth.dtype, 1e-6) * scale
    torch.testing.assert_close(got.cpu().float(), truth.float(), atol=bound, rtol=bound)


def same(got: Tensor, truth: Tensor) -> None:
    assert torch.equal(got.cpu(), truth.cpu())


# ---------------------------------------------------------------------------------------------- elementwise and norms
def norms(device: str, dtype: torch.dtype) -> None:
    for rows, width in ((0, 8), (1, 1), (37, 100)):
        x, w, b = noise(rows, width, dtype=dtype), noise(width, dtype=dtype), noise(width, dtype=dtype, seed=1)
        dx, dw, db = (t.to(device) for t in (x, w, b))
        near(norm.rms_norm(dx, dw, 1e-5), ref_norm.rms_norm.reference(x, w, 1e-5))
        near(norm.rms_norm(dx, dw, 1e-5, True), ref_norm.rms_norm.reference(x, w, 1e-5, True))
        near(norm.layer_norm(dx, dw, db, 1e-5), ref_norm.layer_norm.reference(x, w, b, 1e-5))
    heads, w = noise(6, 5 * 20, dtype=dtype)[:, 10:90].view(6, 4, 20), noise(4, 20, dtype=dtype)
    near(norm.rms_norm(heads.to(device), w.to(device), 1e-5), ref_norm.rms_norm.reference(heads, w, 1e-5))
    near(norm.layer_norm(heads.to(device), None, None, 1e-5), ref_norm.layer_norm.reference(heads, None, None, 1e-5))


def norms_with_residual(device: str, dtype: torch.dtype) -> None:
    x, residual, w, b = (
        noise(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(((9, 70), (9, 70), (70,), (70,)))
    )
    for scale in (1.0, 0.22):
        total = residual + (x if scale == 1.0 else x * scale)
        y, added = norm.add_rms_norm(x, residual, w, 1e-5, True, scale)
        same(added, total)
        same(y, norm.rms_norm(total, w, 1e-5, True))
        y, added = norm.add_layer_norm(x, residual, w, b, 1e-5, scale)
        same(added, total)
        same(y, norm.layer_norm(total, w, b, 1e-5))


def a_norms_row_is_alone(device: str) -> None:
    x, w = noise(40, 100).to(device), noise(100).to(device)
    whole = norm.rms_norm(x, w, 1e-5)
    for first, last in ((0, 1), (7, 20), (39, 40)):
        same(norm.rms_norm(x[first:last], w, 1e-5), whole[first:last])


def activations(device: str, act: str) -> None:
    for shape in ((0, 6), (1, 2), (7, 74)):
        x = noise(*shape) * 3
        near(activation.activate(x.to(device), act), ref_activation.activate.reference(x, act))
        near(activation.gated(x.to(device), act), ref_activation.gated.reference(x, act))
    x = (noise(5, 148, dtype=torch.bfloat16) * 3)[:, :74]
    near(activation.gated(x.to(device), act), ref_activation.gated.reference(x, act))


# ---------------------------------------------------------------------------------------------- rotary and the cache
def rotations(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    for tokens, pairs in ((0, 6), (1, 10), (9, 6)):
        x, cos, sin = (
            noise(tokens, 5 * 20, dtype=dtype)[:, 20:80].view(tokens, 3, 20),
            noise(tokens, pairs),
            noise(tokens, pairs, seed=1),
        )
        near(
            rope.rotate(x.to(device), cos.to(device), sin.to(device), interleaved),
            ref_rope.rotate.reference(x, cos, sin, interleaved),
            0.1 if dtype == torch.float32 else 1.0,
        )


def written_keys(device: str, dtype: torch.dtype) -> None:
    x, cos, sin = (
        noise(*s, dtype=t).to(device)
        for s, t in (((5, 3, 20), dtype), ((5, 6), torch.float32), ((5, 6), torch.float32))
    )
    slots = torch.tensor([33, 0, -1, 47, 16], device=device)
    part = torch.zeros(4, 3, 16, 20, dtype=dtype, device=device)
    rope.keep(x, part, slots, None, (cos, sin), True)
    expected = torch.zeros_like(part)
    turned = rope.rotate(x, cos, sin, True)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, :, slot % 16] = turned[token]
    same(part, expected)
    codes, scales = torch.zeros(4, 3, 16, 20, dtype=torch.int8, device=device), torch.zeros(4, 3, 16, device=device)
    rope.keep(x, codes, slots, scales)
    back = codes.float() * scales[..., None]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            top = x[token].float().abs().amax(-1, keepdim=True)
            assert bool(((back[slot // 16, :, slot % 16] - x[token].float()).abs() <= top / 127 * 0.501).all())
    assert int((codes != 0).any(-1).sum()) == 4 * 3


# ---------------------------------------------------------------------------------------------- products
def linears(device: str, dtype: torch.dtype, rows: tuple[int, ...] = (0, 1, 5, 70)) -> None:
    for inner, outputs in ((33, 7), (100, 70)):
        wide = noise(outputs, inner + 5, dtype=dtype)
        w, b = wide[:, :inner], noise(outputs, dtype=dtype)
        for count in rows:
            x = noise(count, inner, dtype=dtype)
            truth = (x.double() @ w.double().T + b.double()).to(dtype)
            near(linear.linear(x.to(device), w.to(device), b.to(device)), truth, 5.0)


def a_linears_row_is_alone(device: str, dtype: torch.dtype, inner: int = 100, outputs: int = 40) -> None:
    """One bit pattern for 1 row, for few and for many, wherever a row stands, and in whichever tile."""
    x, w = noise(140, inner, dtype=dtype).to(device), noise(outputs, inner, dtype=dtype).to(device)
    whole = linear.linear(x, w)
    for first, last in ((0, 1), (77, 78), (3, 20), (5, 70), (130, 140)):
        same(linear.linear(x[first:last], w), whole[first:last])


def quantized_products(device: str, name: str, dtype: torch.dtype) -> None:
    format = named(name)
    w, x, b = noise(37, 170), noise(70, 170, dtype=dtype), noise(37, dtype=dtype)
    packed = format.quantize(w).pack()
    there = type(packed)(*(t.to(device) if isinstance(t, Tensor) else t for t in packed))
    whole = linear.quantized_linear(x.to(device), there, b.to(device))
    truth = quantized.multiply(x.float(), quantized.unpack(packed), packed.group, packed.dynamic, b.float()).to(dtype)
    near(whole, truth, 5.0)
    if packed.dynamic and packed.group and dtype == torch.float32:
        same(linear.quantized_linear(x.to(device), there), quantized.quantized_linear.reference(x, packed))
    for first, last in ((0, 1), (13, 40)):
        same(linear.quantized_linear(x[first:last].to(device), there, b.to(device)), whole[first:last])
    ids = torch.tensor([0, 36, 5])
    same(quantize.quantized_rows(ids.to(device), there), quantized.quantized_rows.reference(ids, packed))
    assert linear.quantized_linear(x[:0].to(device), there).shape == (0, 37)


def rounded_rows(device: str) -> None:
    x = noise(6, 100)
    x[1], x[2, 40], x[3, 70], x[4] = 0.0, torch.inf, torch.nan, 1e-38
    for group in (0, 32, 64):
        codes, scale = quantize.quantize_rows(x.to(device), group)
        truth_codes, truth_scale = quantized.quantize_rows.reference(x, group)
        same(codes, truth_codes)
        same(scale.isnan(), truth_scale.isnan())
        same(scale.nan_to_num(), truth_scale.nan_to_num())


# ---------------------------------------------------------------------------------------------- experts
def routes(device: str) -> None:
    logits = noise(33, 6)
    logits[3] = 1.0  # of equals the first
    for renormalise in (False, True):
        weights, chosen = experts.route(logits.to(device), 2, renormalise)
        truth, _ = moe.route.reference(logits, 2, renormalise)
        near(weights, truth)
        assert chosen[3].tolist() == [0, 1]
        plain = torch.softmax(logits, -1).gather(-1, chosen.cpu())
        near(weights, plain / plain.sum(-1, keepdim=True) if renormalise else plain)
    assert experts.route(logits[:0].to(device), 2, True)[0].shape == (0, 2)
    bias = torch.tensor([0.0, -2.0, 0.5, 0.0, -0.3, 0.1])
    weights, chosen = experts.route(logits.to(device), 3, True, bias.to(device))
    truth, choice = moe.route.reference(logits, 3, True, bias)
    assert torch.equal(chosen.cpu(), choice) and 1 not in choice
    near(weights, truth)


def mixtures(device: str, name: str | None) -> None:
    x, up, down = noise(33, 70), noise(6, 2 * 20, 70), noise(6, 70, 20)
    weights, chosen = moe.route.reference(noise(33, 5), 2, True)  # the sixth expert has nothing to do
    if name is None:
        truth = moe.experts.reference(x, up, down, weights, chosen, "silu")
        one, two, run = up.to(device), down.to(device), experts.experts
    else:
        packs = [named(name).quantize(w).pack() for w in (up, down)]
        truth = quantized.quantized_experts.reference(x, packs[0], packs[1], weights, chosen, "silu")
        one, two = (type(p)(*(t.to(device) if isinstance(t, Tensor) else t for t in p)) for p in packs)
        run = experts.quantized_experts
    args = (weights.to(device), chosen.to(device))
    whole = run(x.to(device), one, two, *args, "silu")
    near(whole, truth, 200.0)  # of values up to 200
    for first, last in ((0, 1), (7, 12)):
        some = run(x[first:last].to(device), one, two, *(t[first:last] for t in args), "silu")
        same(some, whole[first:last])
    dropped = torch.where(args[1] == 2, -1, args[1])
    part = run(x.to(device), one, two, args[0], dropped, "silu")
    less = run(x.to(device), one, two, torch.where(dropped < 0, 0.0, args[0]), args[1], "silu")
    near(part, less, 200.0)
    same(part[(dropped >= 0).all(1)], whole[(dropped >= 0).all(1)])


# ---------------------------------------------------------------------------------------------- attention
def textbook(q: Tensor, k: Tensor, v: Tensor, how: Attend, sinks: Tensor | None = None) -> Tensor:
    """Attention of one whole sequence in fp64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    s = q @ k.mT * how.scale
    s = how.softcap * torch.tanh(s / how.softcap) if how.softcap else s
    place = torch.arange(q.shape[1])
    gap = place - place[:, None]
    if how.slopes:
        s = s + torch.tensor(how.slopes).double()[:, None, None] * gap
    s = s.masked_fill((gap > 0) | (gap <= -(how.window or 2**30)), -torch.inf)
    if how.sparse is not None:
        s = s.masked_fill(how.sparse.table().absent(place[None], place, len(s))[0, :, :, 0], -torch.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)), -1)
    return (s.softmax(-1)[..., : len(place)] @ v).transpose(0, 1)


def whole_sequences(device: str, how: Attend, dtype: torch.dtype, lengths: tuple[int, ...] = (130, 17, 0, 1)) -> None:
    q, k, v = (noise(sum(lengths), heads, 20, dtype=dtype) for heads in (6, 2, 2))
    got = attention.packed_attention(q.to(device), k.to(device), v.to(device), lengths, how)
    truth = torch.cat([textbook(*part, how) for part in zip(*(x.split(lengths) for x in (q, k, v)))])
    near(got, truth.to(dtype), 2.0)
    assert attention.packed_attention(q[:0].to(device), k[:0].to(device), v[:0].to(device), (0,), how).numel() == 0


class Paged:
    """One sequence in a cache, after another that is nobody's business, its blocks out of order."""

    def __init__(self, k: Tensor, v: Tensor, size: int, dtype: torch.dtype, device: str) -> None:
        length, heads, width = k.shape
        blocks = random.Random(1).sample(range(1, 3 * -(-length // size) + 1), -(-length // size))
        shape = (3 * -(-length // size) + 1, heads, size, width)
        self.parts = [torch.full(shape, 77, dtype=dtype, device=device) for _ in range(2)]
        self.scales = [torch.ones(shape[:3], device=device) if dtype == torch.int8 else None for _ in range(2)]
        place = torch.arange(length)
        slots = (torch.tensor(blocks)[place // size] * size + place % size).to(device)
        for x, part, scale in zip((k, v), self.parts, self.scales):
            rope.keep(x.to(device), part, slots, scale)
        self.table = torch.tensor([blocks], dtype=torch.int32, device=device)

    def attend(
        self, q: Tensor, start: int, count: int, how: Attend, reach: int = 0, sinks: Tensor | None = None
    ) -> Tensor:
        """The attention of queries start .. start + count - 1, in one launch; `reach` splits a decode."""
        out = torch.zeros_like(q[start : start + count])
        keys = attention.Keys(*self.parts, self.table, *self.scales)
        group = q.shape[1] // keys.heads
        queries = attention.Queries.of([(0, start, count)], group, q.device, reach)
        attention.attend(q[start : start + count].contiguous(), keys, queries, how, out, sinks)
        return out


def cached_chunks(device: str, how: Attend, dtype: torch.dtype, size: int, length: int = 150, chunk: int = 40) -> None:
    """Chunks and single tokens over a cache have the bits of the whole sequence."""
    q, k, v = (noise(length, heads, 20, dtype=dtype).to(device) for heads in (6, 2, 2))
    truth = attention.packed_attention(q, k, v, (length,), how)
    paged = Paged(k, v, size, dtype, device)
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        same(paged.attend(q, start, count, how), truth[start : start + count])
    for position in (0, 1, 63, 64, length - 1):
        same(paged.attend(q, position, 1, how), truth[position : position + 1])


def split_decodes(
    device: str, how: Attend, dtype: torch.dtype, heads: tuple[int, int] = (6, 2), length: int = 1100
) -> None:
    """A decode whose keys many programs read has the bits of the walk of the whole sequence's last tile."""
    q, k, v = (noise(length, h, 20, dtype=dtype).to(device) for h in (heads[0], heads[1], heads[1]))
    sinks = noise(heads[0]).to(device)
    paged = Paged(k, v, 32, dtype, device)
    chunk = paged.attend(q, length - 5, 5, how, 0, sinks)
    for position in (length - 5, length - 1):
        at = position - (length - 5)
        for reach in (2048, 8192):
            same(paged.attend(q, position, 1, how, reach, sinks), chunk[at : at + 1])
    last = textbook(q.cpu(), k.cpu(), v.cpu(), how, sinks.cpu())[-5:]
    near(chunk, last.to(dtype), 2.0)


def absent_blocks(device: str) -> None:
    """Steps of keys that no row of a tile sees are not multiplied: they may hold what is not a number."""
    how = Attend(0.3, sparse=Sparse(Local(block=128, num_sliding_window_blocks=1), 6, 400))
    q, k, v = (noise(400, heads, 20) for heads in (6, 2, 2))
    truth = textbook(q, k, v, how).float()
    k[:128], v[128:256] = torch.nan, torch.nan
    got = attention.packed_attention(q.to(device), k.to(device), v.to(device), (400,), how)
    near(got[256:], truth[256:], 2.0)
    assert not got[:256].isfinite().any()


def int8_cache(device: str, how: Attend) -> None:
    q, k, v = (noise(90, heads, 20).to(device) for heads in (6, 2, 2))
    paged = Paged(k, v, 16, torch.int8, device)
    truth = textbook(q.cpu(), k.cpu(), v.cpu(), how)
    whole = paged.attend(q, 0, 90, how)
    torch.testing.assert_close(whole.cpu().double(), truth, atol=4e-2, rtol=0)
    same(paged.attend(q, 89, 1, how, 2048), whole[89:])


# ---------------------------------------------------------------------------------------------- sampling
def draws(device: str, vocab: int, rows: int) -> None:
    """The definition and the kernel choose the same tokens."""
    rng = random.Random(vocab)
    logits = noise(rows, vocab) * 4
    logits[0, ::2] = -torch.inf
    logits[1] = logits[1].round()  # ties
    choices = [
        sample.Choice(
            temperature=rng.choice([0.5, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 50]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            min_p=rng.choice([0.0, 0.05]),
            u=rng.random(),
        )
        for _ in range(rows)
    ]
    truth = sample.draw.reference(logits.clone(), choices).tolist()
    assert sampling.draw(logits.to(device), choices).tolist() == truth
    assert sampling.draw(logits[3:4].to(device), choices[3:4]).tolist() == truth[3:4]
    greedy = sampling.draw(logits[:2].to(device), [sample.Choice(temperature=0.0)] * 2)
    assert greedy.tolist() == logits[:2].argmax(-1).tolist()
    assert sampling.draw(logits[:0].to(device), []).tolist() == []
