"""Attention over keys in blocks at fixed absolute positions, with one order of additions for decode, chunk and trainer.

    keys     |0 .............. 511|512 ............ 1023|1024 ...
    steps    |64|64|64|64|64|64|64|64|64| ...                        online softmax from zero inside a span of 512
    query i  |==== span ==========|==== span ===========|== i        spans are folded from the first to the last

A chunk's queries walk over all their spans in one program. A decode's query has a program for each span, and a second
kernel folds what they leave, in the same order and with the same function: the bits are those of the walk (after
Flash-Decoding, Dao et al. 2023, with the split fixed by position). Rows of a tile are queries x the heads that share
their keys, ROWS always: a row's sums then run through the same instructions whoever stands beside it. A step of keys of
which a row sees nothing leaves the row as it was, so a step that a sparse layout (`blocksparse.py`) takes from all rows
of a tile is passed over.

Shapes: T tokens, S sequences, H query heads = K key-value heads x G, D head size, N keys of a step, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import packed_attention as whole
from ..walk import Attend, fits
from .activation import tanh
from .available import SPAN

STEP = 64
ROWS = 64


@triton.jit
def fold(m, mass, o, m2, mass2, o2):
    """Two neighbouring results as one: largest score, sum of exponentials, weighted values."""
    top = tl.maximum(m, m2)
    old = tl.exp(m - top)
    new = tl.exp(m2 - top)
    return top, mass * old + mass2 * new, o * old[:, None] + o2 * new[:, None]


@triton.jit
def _finish(m, mass, o, sinks, heads, live):
    """The attention's output: sinks join as a key without value, and a row that saw nothing is zero."""
    if sinks is not None:
        sink = tl.load(sinks + heads, live, 0.0).to(tl.float32)
        m, mass, o = fold(m, mass, o, sink, tl.full(mass.shape, 1.0, tl.float32), tl.zeros(o.shape, tl.float32))
    return m, mass, o / tl.where(mass > 0.0, mass, 1.0)[:, None]


@triton.jit
def _step(
    m, mass, o, n, high, panels,
    q, k, v, k_scale, v_scale, table, first, position, slope, d, D, size, block_stride, row_stride,
    scale, softcap, window,
    PAGED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The walk after the keys n too; `panels` are the rows' bits of the layout, from the 128 keys' first on."""
    there = n < high
    if PAGED:
        block = tl.load(table + n // size, there, 0).to(tl.int64)
        at = block * block_stride + (n % size) * row_stride
    else:
        at = (first + n).to(tl.int64) * row_stride
    inside = there[:, None] & (d < D)[None, :]
    keys = tl.load(k + at[:, None] + d[None, :], inside, 0.0)
    s = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * scale
    if k_scale is not None:
        s = s * tl.load(k_scale + at // D, there, 0.0)[None, :]
    if CAPPED:
        s = softcap * tanh(s / softcap)
    gap = n[None, :] - position[:, None]
    if slope is not None:
        s += slope[:, None] * gap.to(tl.float32)
    s = tl.where((gap > 0) | (gap <= -window), float("-inf"), s)
    if panels is not None:
        s = tl.where(((panels[:, None] >> (n % 128 // 16)[None, :]) & 1) == 0, float("-inf"), s)
    top = tl.maximum(m, tl.max(s, 1))
    old = tl.exp(m - top)
    p = tl.exp(s - top[:, None])
    mass = mass * old + tl.sum(p, 1)
    o = o * old[:, None]
    values = tl.load(v + at[:, None] + d[None, :], inside, 0.0)
    if v_scale is not None:
        p = p * tl.load(v_scale + at // D, there, 0.0)[None, :]
    return top, mass, tl.dot(p.to(q.dtype), values.to(q.dtype), o, input_precision="ieee")


@triton.jit
def _span(
    q, k, v, k_scale, v_scale, table, first, low, high, position, live, layout, slope, d, D, size, block_stride,
    row_stride, scale, softcap, window,
    PAGED: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Largest score, sum and values of the queries over keys low..high-1 of one span; low is a multiple of STEP."""
    m = tl.full(position.shape, -1e30, tl.float32)  # finite, so that it never makes a NaN
    mass = tl.zeros(position.shape, tl.float32)
    o = tl.zeros(q.shape, tl.float32)
    for start in range(low, high, STEP):
        n = start + tl.arange(0, STEP)
        if layout is None:
            m, mass, o = _step(
                m, mass, o, n, high, None, q, k, v, k_scale, v_scale, table, first, position, slope, d, D, size,
                block_stride, row_stride, scale, softcap, window, PAGED, CAPPED,
            )  # fmt: skip
        else:
            panels = tl.load(layout + start // 128, live, 0).to(tl.int32)
            if tl.max(panels >> (start % 128 // 16) & ((1 << STEP // 16) - 1), 0) > 0:
                m, mass, o = _step(
                    m, mass, o, n, high, panels, q, k, v, k_scale, v_scale, table, first, position, slope, d, D, size,
                    block_stride, row_stride, scale, softcap, window, PAGED, CAPPED,
                )  # fmt: skip
    return m, mass, o


@triton.jit
def _layout(bits, pattern, block, rows, stride, heads, position, live):
    """Where the bytes of each row's query block begin."""
    row = tl.load(pattern + heads, live, 0) * rows + tl.where(live, position, 0) // block
    return bits + row.to(tl.int64) * stride


@triton.jit
def _walk(
    q, k, v, k_scale, v_scale, out, part_m, part_mass, part_o, sinks, slopes, bits, pattern, bits_block, bits_rows,
    bits_stride, tile_sequence, tile_row, sequences, table, G, D, size, pages, spans, q_token, q_head, out_token,
    out_head, block_stride, kv_head, row_stride, scale, softcap, window,
    PAGED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of rows over all its spans, or (SPLIT) over span program_id(2) alone, left in part_*."""
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    begin_row = tl.load(tile_row + tile)
    row = begin_row + tl.arange(0, ROWS)
    first = tl.load(sequences + 3 * sequence)
    begin = tl.load(sequences + 3 * sequence + 1)
    count = tl.load(sequences + 3 * sequence + 2)
    live = row < count * G
    heads = head * G + row % G
    position = begin + row // G
    d = tl.arange(0, BLOCK)
    tokens = (first + row // G).to(tl.int64)
    inside = live[:, None] & (d < D)[None, :]
    queries = tl.load(q + tokens[:, None] * q_token + heads[:, None] * q_head + d[None, :], inside, 0.0)
    slope = None if slopes is None else tl.load(slopes + heads, live, 0.0)
    layout = None if bits is None else _layout(bits, pattern, bits_block, bits_rows, bits_stride, heads, position, live)
    low = tl.maximum(begin + begin_row // G - window + 1, 0) // STEP * STEP
    high = tl.where(count > 0, begin + tl.minimum(count, (begin_row + ROWS - 1) // G + 1), 0)
    k += head.to(tl.int64) * kv_head
    v += head.to(tl.int64) * kv_head
    if k_scale is not None:
        k_scale += head * size
        v_scale += head * size
    table += sequence.to(tl.int64) * pages
    first_span = low // SPAN
    end_span = tl.cdiv(high, SPAN)
    if SPLIT:
        first_span = tl.maximum(first_span, tl.program_id(2))
        end_span = tl.minimum(end_span, tl.program_id(2) + 1)
    m = tl.full((ROWS,), -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, BLOCK), tl.float32)
    for span in range(first_span, end_span):
        m2, mass2, o2 = _span(
            queries, k, v, k_scale, v_scale, table, first - begin, tl.maximum(low, span * SPAN),
            tl.minimum(high, (span + 1) * SPAN), position, live, layout, slope, d, D, size, block_stride, row_stride,
            scale, softcap, window, PAGED, CAPPED, STEP,
        )  # fmt: skip
        if SPLIT:
            at = ((sequence * tl.num_programs(1) + head).to(tl.int64) * spans + span) * G + row
            tl.store(part_m + at, m2, live)
            tl.store(part_mass + at, mass2, live)
            tl.store(part_o + at[:, None] * D + d[None, :], o2, inside)
        else:
            m, mass, o = fold(m, mass, o, m2, mass2, o2)
    if not SPLIT:
        m, mass, o = _finish(m, mass, o, sinks, heads, live)
        place = tokens[:, None] * out_token + heads[:, None] * out_head + d[None, :]
        tl.store(out + place, o.to(out.dtype.element_ty), inside)


@triton.jit
def _join(
    part_m, part_mass, part_o, out, sinks, sequences, G, D, spans, out_token, out_head, window,
    SPAN: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold the spans of one decoded query, first to last."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(sequences + 3 * sequence).to(tl.int64)
    begin = tl.load(sequences + 3 * sequence + 1)
    count = tl.load(sequences + 3 * sequence + 2)
    row = tl.arange(0, ROWS)
    live = row < count * G
    d = tl.arange(0, BLOCK)
    inside = live[:, None] & (d < D)[None, :]
    low = tl.maximum(begin - window + 1, 0) // STEP * STEP
    high = tl.where(count > 0, begin + 1, 0)
    m = tl.full((ROWS,), -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, BLOCK), tl.float32)
    for span in range(low // SPAN, tl.cdiv(high, SPAN)):
        at = ((sequence * tl.num_programs(1) + head).to(tl.int64) * spans + span) * G + row
        m2 = tl.load(part_m + at, live, -1e30)
        mass2 = tl.load(part_mass + at, live, 0.0)
        o2 = tl.load(part_o + at[:, None] * D + d[None, :], inside, 0.0)
        m, mass, o = fold(m, mass, o, m2, mass2, o2)
    heads = head * G + row
    m, mass, o = _finish(m, mass, o, sinks, heads, live)
    tl.store(out + token * out_token + heads[:, None] * out_head + d[None, :], o.to(out.dtype.element_ty), inside)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which rows each program takes: [tiles] sequence numbers and first rows (row = query · G + head of the group)."""

    sequence: Tensor
    row: Tensor

    @classmethod
    def of(cls, counts: list[tuple[int, int]], group: int, device: torch.device | str) -> Tiles:
        """Tiles for (sequence, queries) pairs whose key-value heads have `group` query heads each."""
        both = [(number, row) for number, count in counts for row in range(0, count * group, ROWS)]
        table = torch.tensor(both, dtype=torch.int32).reshape(-1, 2).t().contiguous().to(device)
        return cls(table[0], table[1])


@dataclass(frozen=True, slots=True)
class Keys:
    """Where keys and values are: parts of a cache [blocks, K, size, D] with a table [S, P], or tokens [T, K, D].

    int8 parts have scales [blocks, K, size] fp32.
    """

    k: Tensor
    v: Tensor
    table_SP: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True, slots=True)
class Queries:
    """Sequences [S, 3] int32: each one's first token on T, that token's position, and how many tokens; and their tiles.

    With `reach` every sequence is one decoded token (or none), and its spans of up to `reach` keys are computed side
    by side.
    """

    sequences_S3: Tensor
    tiles: Tiles
    reach: int = 0

    @classmethod
    def of(
        cls, triples: Sequence[tuple[int, int, int]], group: int, device: torch.device | str, reach: int = 0
    ) -> Queries:
        table = torch.tensor(triples, dtype=torch.int32).reshape(-1, 3).to(device)
        tiles = Tiles.of([(number, count) for number, (_, _, count) in enumerate(triples)], group, device)
        return cls(table, tiles, reach)


def attend(
    q_THD: Tensor, keys: Keys, queries: Queries, how: Attend, out_THD: Tensor, sinks_H: Tensor | None = None
) -> None:
    """Attention of the sequences' queries over their own past, written to their rows of `out`.

    `sinks` are one score a head that takes part in the softmax and has no value (gpt-oss).
    """
    table, tiles, spans = keys.table_SP, queries.tiles, -(-queries.reach // SPAN)
    K, S, D = keys.heads, len(queries.sequences_S3), q_THD.shape[-1]
    G, block = q_THD.shape[1] // K, max(16, triton.next_power_of_2(D))
    if not len(tiles.sequence):
        return
    left = S * K * spans * G
    part = torch.empty(left * (D + 2), dtype=torch.float32, device=q_THD.device)
    part_m, part_mass, part_o = part.split([left, left, left * D])
    window = how.window or 2**30
    sparse = None if how.sparse is None else how.sparse.table(q_THD.device)
    layout = (None, None, 1, 0, 0) if sparse is None else sparse.parts()
    wide = q_THD.dtype == torch.float32  # no tensor cores: a tile's numbers would not fit the registers
    step, warps = (STEP // 2, 8) if wide else (STEP, 4)
    _walk[(len(tiles.sequence), K, max(1, spans))](
        q_THD, keys.k, keys.v, keys.k_scale, keys.v_scale, out_THD, part_m, part_mass, part_o,
        sinks_H, _slopes(how.slopes, q_THD.device), *layout, tiles.sequence, tiles.row, queries.sequences_S3,
        tiles.sequence if table is None else table,
        G, D, 1 if table is None else keys.k.shape[2], 0 if table is None else table.shape[1], spans,
        q_THD.stride(0), q_THD.stride(1), out_THD.stride(0), out_THD.stride(1),
        keys.k.stride(0), keys.k.stride(1), keys.k.stride(0 if table is None else 2),
        how.scale, how.softcap or 1.0, window,
        PAGED=table is not None, CAPPED=how.softcap is not None, SPLIT=spans > 0,
        SPAN=SPAN, STEP=step, ROWS=ROWS, BLOCK=block, num_warps=warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    if spans:
        _join[(S, K)](
            part_m, part_mass, part_o, out_THD, sinks_H, queries.sequences_S3, G, D, spans,
            out_THD.stride(0), out_THD.stride(1), window,
            SPAN=SPAN, STEP=step, ROWS=triton.next_power_of_2(G), BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def packed_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], how: Attend) -> Tensor:
    """`kernels.attention.packed_attention` on CUDA, with the bits of the same tokens in a cache.

    Queries that look ahead are no engine's, and go the walk in torch.
    """
    if not how.causal:
        return whole.implementations["together"].run(q_THD, k_TKD, v_TKD, lengths, how)
    fits(how, lengths)
    q_THD, k_TKD, v_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD, v_TKD))
    if k_TKD.stride() != v_TKD.stride():
        k_TKD, v_TKD = k_TKD.contiguous(), v_TKD.contiguous()
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    queries = _whole(tuple(lengths), q_THD.shape[1] // k_TKD.shape[1], str(q_THD.device))
    attend(q_THD, Keys(k_TKD, v_TKD), queries, how, out_THD)
    return out_THD


@lru_cache(maxsize=64)
def _whole(lengths: tuple[int, ...], group: int, device: str) -> Queries:
    """Whole sequences end to end; the same for every layer of a step."""
    firsts = accumulate(lengths, initial=0)
    return Queries.of([(first, 0, length) for first, length in zip(firsts, lengths)], group, device)


@lru_cache(maxsize=64)
def _slopes(slopes: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    return None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device)
