"""Attention over keys and values kept in blocks, in the panels that the CPU kernels read (the picture: `cpu/cache.h`).

    spans     │ 5 tokens of one sequence │ 1 │ 1 │ 300 of another │     end to end on the token axis
    table     each span's blocks, from its sequence's position 0 on: position p is in block table[p // size]

After PagedAttention (Kwon et al. 2023). A query's bits are the same whether its sequence comes whole or in chunks, in
whatever company, in blocks of whatever size.

Shapes: T tokens, S spans, H query heads = K key-value heads x G, D head size, N keys of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError
from . import native, stages
from .op import op
from .walk import KEYS, Attend, Fold, blocks_of, fits, look, mask, scores

LANES = 16  # tokens of a panel of keys
KV_TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
SCALED = (torch.int8, torch.float8_e4m3fn)
"""Those with a scale for each token and head."""


def cache_shapes(
    blocks: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of one layer's keys and values as the CPU kernels read them: sixteen tokens of a key lie side by
    side, so that one query's scores of sixteen keys are one vector.

    Args:
        size: tokens of a block, a multiple of 16.
        dtype: fp32, bf16, or int8 or e4m3 with a scale for each token and head.

    Returns:
        "keys" and "values", and where there are scales "key_scales" and "value_scales"; all are to begin as zeros.
    """
    if size <= 0 or size % LANES:
        raise ConfigError(f"a block of {size} tokens: the CPU kernels need a multiple of {LANES}, e.g. 16, 32 or 128")
    if dtype not in KV_TYPES:
        raise ConfigError(f"keys and values in {dtype}: choose one of {', '.join(map(str, KV_TYPES))}")
    values = ((blocks, kv_heads, size, dim), dtype)
    keys: tuple[tuple[int, ...], torch.dtype] = ((blocks, kv_heads, size // LANES, dim, LANES), dtype)
    if dtype not in SCALED:
        return {"keys": keys, "values": values}
    scales = ((blocks, kv_heads, size), torch.float32)
    if dtype == torch.int8:
        keys = ((blocks, kv_heads, size // LANES, -(-dim // 4), LANES, 4), dtype)
    return {"keys": keys, "values": values, "key_scales": scales, "value_scales": scales}


@dataclass(frozen=True, slots=True)
class Panels:
    """One layer's keys and values; shapes as `cache_shapes` says."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @staticmethod
    def zeros(blocks: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype = torch.float32) -> Panels:
        shapes = cache_shapes(blocks, kv_heads, size, dim, dtype)
        return Panels(**{name: torch.zeros(shape, dtype=kept) for name, (shape, kept) in shapes.items()})

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.values.shape[2]

    def struct(self) -> stages.Cache:
        """The same as an argument of the kernels, valid for as long as this lives."""
        _, kv_heads, size, dim = self.values.shape
        scales = (None if x is None else x.data_ptr() for x in (self.key_scales, self.value_scales))
        kind = stages.TYPES[self.values.dtype]
        return stages.Cache(self.keys.data_ptr(), self.values.data_ptr(), *scales, kind, size, kv_heads, dim)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks [blocks], in their order: two [K, N, D] in fp32."""
        _, K, size, D = self.values.shape
        k, v = (plain(x)[blocks].view(x.dtype).float() for x in (self.keys, self.values))
        k = k.transpose(3, 4)
        if self.key_scales is not None and self.value_scales is not None:
            scales = self.key_scales[blocks].view(len(blocks), K, size // LANES, LANES, 1)
            k = (k.flatten(-2)[..., :D] if self.values.dtype == torch.int8 else k) * scales
            v = v * self.value_scales[blocks][..., None]
        return k.reshape(-1, K, size, D).transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


class Spans:
    """One step's tokens: of each sequence the position it goes on from, how many tokens come, and the blocks it has.

    Args:
        spans: for each sequence (start, count, its blocks from position 0 on).
        size: tokens of a block.
    """

    def __init__(self, spans: Sequence[tuple[int, int, Sequence[int]]], size: int) -> None:
        for start, count, blocks in spans:
            if len(blocks) * size < start + count:
                raise ConfigError(
                    f"{len(blocks)} blocks of {size} do not hold {start + count} tokens: give more blocks"
                )
        self.spans = [(start, count, tuple(blocks)) for start, count, blocks in spans]
        self.tokens = sum(count for _, count, _ in spans)
        widest = max((len(blocks) for *_, blocks in spans), default=0)

        def ints(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32)

        self.start_S = ints([start for start, *_ in spans])
        self.first_S = torch.cat((ints([0]), ints([count for _, count, _ in spans]).cumsum(0, dtype=torch.int32)))
        self.table = torch.zeros(len(spans), widest, dtype=torch.int32)
        for row, (*_, blocks) in enumerate(spans):
            self.table[row, : len(blocks)] = ints(blocks)
        pieces = [torch.arange(start, start + count, dtype=torch.int32) for start, count, _ in spans]
        self.positions_T = torch.cat(pieces) if pieces else ints([])
        self.struct = stages.Step(tokens=self.tokens, spans=len(spans), table_stride=widest)
        for name in ("start", "first"):
            setattr(self.struct, name, getattr(self, f"{name}_S").data_ptr())
        self.struct.table, self.struct.positions = self.table.data_ptr(), self.positions_T.data_ptr()


def run(*todo: ctypes.Structure) -> None:
    """Run stages one after another on as many threads as torch uses."""
    found = native.library()
    if found is None:
        raise ConfigError(f"the CPU kernels are not here: {native.missing()}; use the reference")
    found.run(stages.program(*todo), torch.get_num_threads())


# ------------------------------------------------------------------------------------------------------------- writing
@op
def keep(k_TKD: Tensor, v_TKD: Tensor, panels: Panels, spans: Spans) -> None:
    """Write the tokens' keys and values to their places; int8 and e4m3 with a scale for each token and head."""
    block_T, row_T = _places(panels, spans)
    k_TKD, v_TKD = k_TKD.float(), v_TKD.float()
    if panels.key_scales is None or panels.value_scales is None:
        panels.keys[block_T, :, row_T // LANES, :, row_T % LANES] = k_TKD.to(panels.keys.dtype)
        panels.values[block_T, :, row_T] = v_TKD.to(panels.values.dtype)
        return
    dtype = panels.values.dtype
    k_TKD, panels.key_scales[block_T, :, row_T] = narrowed(k_TKD, dtype)
    v_TKD, panels.value_scales[block_T, :, row_T] = narrowed(v_TKD, dtype)
    if dtype != torch.int8:
        plain(panels.keys)[block_T, :, row_T // LANES, :, row_T % LANES] = plain(k_TKD)
        plain(panels.values)[block_T, :, row_T] = plain(v_TKD)
        return
    padded = torch.nn.functional.pad(k_TKD, (0, -k_TKD.shape[-1] % 4)).unflatten(-1, (-1, 4))
    panels.keys[block_T, :, row_T // LANES, :, row_T % LANES] = padded
    panels.values[block_T, :, row_T] = v_TKD


@keep.on("native", why="the CPU kernel", missing=native.missing)
def _keep(k_TKD: Tensor, v_TKD: Tensor, panels: Panels, spans: Spans) -> None:
    both = torch.cat((k_TKD.flatten(1), v_TKD.flatten(1)), 1).float()
    heads = stages.Heads(cache=panels.struct(), qkv=both.data_ptr(), qkv_stride=both.shape[1])
    heads.step = ctypes.pointer(spans.struct)
    run(heads)


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """s8 codes of each row [..., D] and its scale [...]; a row that is not all finite has no finite scale."""
    scale = x.abs().amax(-1) / 127.0 + (x * 0.0).sum(-1)
    by = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / by[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 or e4m3 codes of each row [..., D] and its scale [...], which is not finite where the row is not."""
    if dtype == torch.int8:
        return to_bytes(x)
    scale = x.abs().amax(-1) / 448.0 + (x * 0.0).sum(-1)
    by = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / by[..., None]).nan_to_num().clamp(-448, 448).to(dtype), scale


def plain(x: Tensor) -> Tensor:
    """Small floats as bytes, which torch can gather and scatter."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _places(panels: Panels, spans: Spans) -> tuple[Tensor, Tensor]:
    """Of each token its block and its row there."""
    span_T = torch.repeat_interleave(torch.arange(len(spans.spans)), spans.first_S.diff().long())
    position_T = spans.positions_T.long()
    return spans.table[span_T, position_T // panels.size].long(), position_T % panels.size


# ------------------------------------------------------------------------------------------------------------- looking
@op
def paged_attention(
    q_THD: Tensor,
    panels: Panels,
    spans: Spans,
    how: Attend,
    sinks_H: Tensor | None = None,
    lse_TH: Tensor | None = None,
) -> Tensor:
    """Each query looks at its own sequence's past, itself included, in blocks of 128 keys: [T, H, D] in fp32.

    Without `how.causal` it looks ahead too, to the last of its span's tokens, which must be the whole sequence. A sink
    is one more score of each head, without a value. `lse_TH`, when given, receives m + log l.
    """
    fits(how, (start + count for start, count, _ in spans.spans))
    out_THD = torch.empty(q_THD.shape, dtype=torch.float32)
    at = 0
    for start, count, blocks in spans.spans:
        rows = slice(at, at + count)
        at += count
        if count:
            k_KND, v_KND = panels.read(torch.tensor(blocks[: -(-(start + count) // panels.size)]))
            whole = (0, 0, 0, -k_KND.shape[1] % KEYS)
            k_KND, v_KND = (torch.nn.functional.pad(x, whole) for x in (k_KND, v_KND))
            folded = _fold(q_THD[rows].float(), k_KND, v_KND, start, how, panels.values.dtype == torch.int8)
            if sinks_H is not None:
                sinks_KM1 = sinks_H.float().view(len(k_KND), 1, -1).expand(-1, count, -1).reshape(len(k_KND), -1, 1)
                folded.add(Fold(sinks_KM1, torch.ones_like(folded.l), torch.zeros_like(folded.o)), len(k_KND))
            out_THD[rows] = _by_token(folded.o / folded.l, count)
            if lse_TH is not None:
                lse_TH[rows] = _by_token(folded.m + torch.log(folded.l), count)[..., 0]
    return out_THD


def _fold(q_LHD: Tensor, k_KND: Tensor, v_KND: Tensor, start: int, how: Attend, as_bytes: bool) -> Fold:
    """The walk of one sequence's tokens from position `start` on."""
    L, H, D = q_LHD.shape
    K = len(k_KND)
    q_LHD = q_LHD * how.scale
    if as_bytes:
        codes, scale = to_bytes(q_LHD)
        q_LHD = codes.float() * scale[..., None]
    q_KMD = q_LHD.view(L, K, H // K, D).transpose(0, 1).reshape(K, -1, D)
    position_1L = torch.arange(start, start + L)[None]
    folded = Fold.nothing(q_KMD)
    for first in blocks_of(start, start + L, how, start + L):
        hidden, gap = mask(position_1L, first, KEYS, how, K, start + L)
        k, v = (x[:, first : first + KEYS].contiguous() for x in (k_KND, v_KND))
        folded.add(look(v, scores(q_KMD, k, hidden, gap, how)), K)
    return folded


def _by_token(x_KMD: Tensor, count: int) -> Tensor:
    """[K, L·G, D] to [L, H, D]."""
    K, M, D = x_KMD.shape
    return x_KMD.view(K, count, M // count, D).transpose(0, 1).flatten(1, 2)


@paged_attention.on("native", why="the CPU kernel", missing=native.missing, bits="own")
def _paged(
    q_THD: Tensor,
    panels: Panels,
    spans: Spans,
    how: Attend,
    sinks_H: Tensor | None = None,
    lse_TH: Tensor | None = None,
) -> Tensor:
    fits(how, (start + count for start, count, _ in spans.spans))
    q_THD = q_THD.contiguous().float()
    T, H, D = q_THD.shape
    out_THD = torch.empty(T, H, D)
    slopes_H = None if how.slopes is None else torch.tensor(how.slopes, dtype=torch.float32)
    sinks_H = None if sinks_H is None else sinks_H.contiguous().float()
    table = None if how.sparse is None else how.sparse.table()
    pointers = {"slopes": slopes_H, "sinks": sinks_H, "lse": lse_TH}
    look_back = stages.Attention(
        cache=panels.struct(),
        q=q_THD.data_ptr(),
        q_stride=H * D,
        out=out_THD.data_ptr(),
        out_stride=H * D,
        heads=H,
        window=how.window or 0,
        scale=how.scale,
        softcap=how.softcap or 0.0,
        sparse=stages.Sparse() if table is None else table.struct(),
        ahead=not how.causal,
        **{name: x.data_ptr() for name, x in pointers.items() if x is not None},
    )
    look_back.step = ctypes.pointer(spans.struct)
    run(look_back)
    return out_THD
