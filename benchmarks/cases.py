"""Arguments for every op at the sizes of the reference model, and the least work that they ask for.

An op without a case here is measured with its own sample, when it has one.

Shapes: T tokens, D hidden, F feed-forward, H query heads, K key-value heads, V vocabulary, E experts, C chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nn
from case import Args, Case, Sizes, cases, few, stages
from torch import Tensor

D, F, H, K, HEAD, V = 1024, 3072, 16, 8, 128, 151_936
QKV = (H + 2 * K) * HEAD
E, C, EF = 16, 4, 768
TABLE = 32_768  # a smaller vocabulary, where the size is not the point


@functools.cache
def dense(*shape: int) -> Tensor:
    """Numbers that stand for quantized or cached ones where torch is to do the same work on fp32."""
    return torch.randn(shape)


# ------------------------------------------------------------------------------------------------ products
@cases("linear")
def linear(sizes: Sizes) -> Iterator[Case]:
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for stage, tokens in stages(sizes):
            yield Case(
                label=f"{stage}, gate and up, {name}",
                make=lambda t=tokens, d=dtype: (torch.randn(t, D), torch.randn(2 * F, D).to(d)),
                moved=2 * F * D * dtype.itemsize + 4 * tokens * (D + 2 * F),
                done=2 * tokens * 2 * F * D,
                plain=product,
            )
    yield Case(
        label="decode 1, head, bf16",
        make=lambda: (torch.randn(1, D), torch.empty(V, D, dtype=torch.bfloat16).uniform_(-1, 1)),
        moved=V * D * 2,
        done=2 * V * D,
        plain=product,
    )


def product(x: Tensor, w: Tensor) -> Tensor:
    """torch's product in the weights' own type."""
    return nn.linear(x.to(w.dtype), w)


def packed(name: str, *shape: int) -> Any:
    """A quantized weight of random codes; what numbers they are does not matter to speed."""
    from twofold.quant.format import named

    weight = named(name).empty(*shape)
    low, high = (-127, 128) if weight.codes.dtype == torch.int8 else (0, 256)
    weight.codes.random_(low, high)
    weight.scales.fill_(0.01)
    if weight.zeros is not None:
        weight.zeros.fill_(8 if weight.bits == 4 else 0)
    return weight


def packed_bytes(name: str, *shape: int) -> int:
    from twofold.quant.format import named

    return int(named(name).empty(*shape, device="meta").nbytes)


@cases("quantized_linear")
def quantized_linear(sizes: Sizes) -> Iterator[Case]:
    for name in ("int8", "int4", "int4-g128", "int8-weight-only", "int4-weight-only"):
        for stage, tokens in stages(sizes):
            yield Case(
                label=f"{stage}, gate and up, {name}",
                make=lambda t=tokens, n=name: (torch.randn(t, D), packed(n, 2 * F, D)),
                moved=packed_bytes(name, 2 * F, D) + 4 * tokens * (D + 2 * F),
                done=2 * tokens * 2 * F * D,
                unit="fp32" if "weight-only" in name else "int8",
                plain=lambda x, w: nn.linear(x, dense(2 * F, D)),
            )


@cases("quantize_rows")
def quantize_rows(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        for group in (0, 32):
            yield Case(
                label=f"{stage}, {f'groups of {group}' if group else 'whole rows'}",
                make=lambda t=tokens, g=group: (torch.randn(t, F), g),
                moved=tokens * (F * 5 + 4 * (F // group if group else 1)),
            )


@cases("quantized_rows")
def quantized_rows(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=f"{stage}, int8 table",
            make=lambda t=tokens: (torch.randint(0, TABLE, (t,)), packed("int8", TABLE, D)),
            moved=tokens * D * 5,
        )


# ------------------------------------------------------------------------------------------------ by element
@cases("rms_norm")
def rms_norm(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=stage,
            make=lambda t=tokens: (torch.randn(t, D), torch.ones(D), 1e-6),
            moved=8 * tokens * D,
            plain=lambda x, w, eps: nn.rms_norm(x, (D,), w, eps),
        )


@cases("layer_norm")
def layer_norm(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=stage,
            make=lambda t=tokens: (torch.randn(t, D), torch.ones(D), torch.zeros(D), 1e-5),
            moved=8 * tokens * D,
            plain=lambda x, w, b, eps: nn.layer_norm(x, (D,), w, b, eps),
        )


@cases("activate")
def activate(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        for act in ("silu", "gelu_tanh"):
            yield Case(
                label=f"{stage}, {act}",
                make=lambda t=tokens, a=act: (torch.randn(t, F), a),
                moved=8 * tokens * F,
                plain=lambda x, act: nn.silu(x) if act == "silu" else nn.gelu(x, approximate="tanh"),
            )


@cases("gated")
def gated(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=f"{stage}, silu",
            make=lambda t=tokens: (torch.randn(t, 2 * F), "silu"),
            moved=12 * tokens * F,
            plain=lambda x, act: nn.silu(x[:, :F]) * x[:, F:],
        )


@cases("rotate")
def rotate(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=stage,
            make=lambda t=tokens: (torch.randn(t, H, HEAD), torch.randn(t, HEAD // 2), torch.randn(t, HEAD // 2)),
            moved=4 * tokens * HEAD * (2 * H + 1),
        )


# ------------------------------------------------------------------------------------------------ attention
def seen(starts: list[int], counts: list[int]) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(count * start + count * (count + 1) // 2 for start, count in zip(starts, counts))


def attention(sizes: Sizes) -> list[tuple[str, int, int, int]]:
    """Label, sequences, where each starts, and how many tokens each brings."""
    return [
        (f"decode 1 at {sizes.context}", 1, sizes.context, 1),
        (f"decode {sizes.batch} at {sizes.context}", sizes.batch, sizes.context, 1),
        (f"prefill {sizes.prompt}", 1, 0, sizes.prompt),
    ]


def how() -> Any:
    from twofold.kernels.walk import Attend

    return Attend(scale=HEAD**-0.5)


def cache(sequences: int, start: int, count: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """A cache in blocks of 16 that holds `start` tokens of each sequence, and the spans of the tokens that come."""
    from twofold.kernels.paged import Panels, Spans

    size = 16
    each = -(-(start + count) // size)
    panels = Panels.zeros(sequences * each, K, size, HEAD, dtype)
    for table in (panels.keys, panels.values):
        _ = table.random_(-127, 128) if dtype == torch.int8 else table.normal_()
    for scales in (panels.key_scales, panels.value_scales):
        if scales is not None:
            scales.fill_(0.01)
    blocks = torch.randperm(sequences * each).view(sequences, each).tolist()
    return panels, Spans([(start, count, row) for row in blocks], size)


@cases("paged_attention")
def paged_attention(sizes: Sizes) -> Iterator[Case]:
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.int8, "int8")):
        for label, sequences, start, count in attention(sizes):
            tokens, keys = sequences * count, sequences * (start + count)
            yield Case(
                label=f"{label}, {name} cache",
                make=lambda s=sequences, a=start, c=count, d=dtype: (
                    torch.randn(s * c, H, HEAD),
                    *cache(s, a, c, d),
                    how(),
                ),
                moved=2 * keys * K * HEAD * dtype.itemsize + 8 * tokens * H * HEAD,
                done=4 * seen([start] * sequences, [count] * sequences) * H * HEAD,
                plain=functools.partial(attend, sequences, start + count),
            )


def attend(sequences: int, keys: int, q_THD: Tensor, *_: Any) -> Tensor:
    """torch's attention of the same queries on contiguous fp32 keys and values; several queries are a whole prompt."""
    q = q_THD.view(sequences, -1, H, HEAD).transpose(1, 2)
    k, v = dense(sequences, K, keys, HEAD), dense(sequences, K, keys, HEAD)
    return nn.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


@cases("keep")
def keep(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        for dtype, name in ((torch.float32, "fp32"), (torch.int8, "int8")):
            yield Case(
                label=f"{stage}, {name} cache",
                make=lambda t=tokens, d=dtype: (
                    torch.randn(t, K, HEAD),
                    torch.randn(t, K, HEAD),
                    *cache(1, 0, t, d),
                ),
                moved=2 * tokens * K * HEAD * (4 + dtype.itemsize),
            )


# ------------------------------------------------------------------------------------------------ experts
@cases("route")
def route(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=f"{stage}, {C} of 128", make=lambda t=tokens: (torch.randn(t, 128), C, True), moved=4 * tokens * 128
        )


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, every expert equally often."""
    order = torch.arange(tokens * C).view(tokens, C) % E
    return torch.full((tokens, C), 1 / C), order


@cases("experts")
def experts(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in stages(sizes):
        yield Case(
            label=f"{stage}, {C} of {E}, fp32",
            make=lambda t=tokens: (
                torch.randn(t, D),
                torch.randn(E, 2 * EF, D),
                torch.randn(E, D, EF),
                *routed(t),
                "silu",
            ),
            moved=min(E, C * tokens) * 3 * EF * D * 4,
            done=2 * tokens * C * 3 * EF * D,
        )


@cases("quantized_experts")
def quantized_experts(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in stages(sizes):
        yield Case(
            label=f"{stage}, {C} of {E}, int8",
            make=lambda t=tokens: (
                torch.randn(t, D),
                packed("int8", E, 2 * EF, D),
                packed("int8", E, D, EF),
                *routed(t),
                "silu",
            ),
            moved=min(E, C * tokens) * 3 * EF * D,
            done=2 * tokens * C * 3 * EF * D,
            unit="int8",
        )


@cases("open_gate")
def open_gate(sizes: Sizes) -> Iterator[Case]:
    for stage, tokens in few(sizes):
        yield Case(
            label=stage,
            make=lambda t=tokens: (torch.randn(t, D), torch.randn(t, D), torch.randn(t, 1)),
            moved=12 * tokens * D,
        )


@cases("lora")
def lora(sizes: Sizes) -> Iterator[Case]:
    rank, adapters = 16, 4

    def make(tokens: int) -> Args:
        from twofold.kernels.lora import Adapter

        pairs = [Adapter(torch.randn(rank, D), torch.randn(QKV, rank)) for _ in range(adapters)]
        return torch.randn(tokens, D), torch.randn(tokens, QKV), pairs, torch.arange(tokens) % adapters

    for stage, tokens in stages(sizes):
        yield Case(
            label=f"{stage}, {adapters} of rank {rank}",
            make=lambda t=tokens: make(t),
            moved=min(adapters, tokens) * rank * (D + QKV) * 4 + 8 * tokens * QKV,
            done=2 * tokens * rank * (D + QKV),
        )


# ------------------------------------------------------------------------------------------------ the vocabulary
@cases("choose")
def choose(sizes: Sizes) -> Iterator[Case]:
    def make(rows: int, **how: Any) -> Args:
        from twofold.kernels.sample import Choice

        return torch.randn(rows, V), [Choice(u=0.5, **how) for _ in range(rows)]

    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "top-p": {"top_p": 0.9},
        "top-k": {"top_k": 50},
    }
    for rows in (1, sizes.batch):
        for name, way in ways.items():
            yield Case(label=f"{rows} rows, {name}", make=lambda r=rows, w=way: make(r, **w), moved=4 * rows * V)


@cases("soft_cap")
def soft_cap(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        label=f"{sizes.batch} rows of logits",
        make=lambda: (torch.randn(sizes.batch, V), 30.0),
        moved=8 * sizes.batch * V,
        plain=lambda x, cap: torch.tanh(x / cap) * cap,
    )


@cases("score")
def score(sizes: Sizes) -> Iterator[Case]:
    rows = sizes.batch
    yield Case(label=f"{rows} rows, 5 best", make=lambda: (torch.randn(rows, V), [0] * rows, 5), moved=4 * rows * V)


@cases("draw")
def draw(sizes: Sizes) -> Iterator[Case]:
    def make() -> Args:
        from twofold.kernels.sample import Choice

        return torch.randn(sizes.batch, V), [Choice(u=0.5, top_p=0.9)] * sizes.batch

    yield Case(label=f"{sizes.batch} rows, top-p", make=make, moved=4 * sizes.batch * V)
