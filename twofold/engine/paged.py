"""KVCache and PagedContext: keys and values in fixed-size blocks, found through each request's block table.

    block table of a request     [ 7, 3, 9 ]            position p lives in block table[p // size], row p % size
    one layer of the cache       [blocks, K, size, D]   one block of one head is one run of memory

After PagedAttention (Kwon et al. 2023). The attention itself is the walk of `kernels/attention.py`, so a query has the
same bits here as in a training batch. Requests that bring about as many tokens walk together.

Shapes: T tokens, R requests that walk together, L tokens of each, H query heads, K key-value heads, D head size,
P pages (blocks) of one walk step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError
from ..kernels import native, paged
from ..kernels.paged import KV_TYPES, SCALED, Panels, cache_shapes, keep, paged_attention, plain
from ..kernels.walk import KEYS, Attend, Fold, blocks_of, grouped, look, mask, scores, ungrouped
from ..models.spec import ModelSpec
from ..platforms.pages import zeros


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start` to `start + count - 1` of one request, and the blocks that hold its positions from 0 on."""

    start: int
    count: int
    blocks: tuple[int, ...]


class KVCache:
    """Keys and values of every layer: `num_blocks` blocks of `block_size` tokens. All zero at first, always finite.

    For the CPU kernels (`panels`) keys lie sixteen tokens side by side, see `kernels/cpu/stages.h`; for the walk in
    torch a head's tokens lie one after another. One block more is nobody's and stays zero: a walk step that reaches
    past a request's last block reads it, so that a neighbour's broken numbers reach nobody (0 times NaN is NaN).

    Raises:
        ValueError: a block size that attention cannot walk over.
        ConfigError: a dtype that needs the CPU kernels, where they are not.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if KEYS % block_size or block_size % 16:
            raise ValueError(f"block_size is {block_size}; it must divide {KEYS}: choose 16, 32, 64 or 128")
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.panels = torch.device(device).type == "cpu" and dtype in KV_TYPES and not native.missing()
        if dtype in SCALED and not self.panels:
            name = "int8" if dtype == torch.int8 else "fp8"
            raise ConfigError(f"kv_dtype {name} needs the CPU kernels: {native.missing() or device}; use bfloat16")
        shapes = cache_shapes if self.panels else _walk_shapes
        self.layers = [
            {
                name: zeros(shape, kind, device)
                for name, (shape, kind) in shapes(
                    num_blocks + 1, mixer.kv_heads, block_size, mixer.head_dim, dtype
                ).items()
            }
            for mixer in (layer.mixer for layer in spec.layers)
        ]

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        scales = sum(2 * 4 * layer.mixer.kv_heads for layer in spec.layers) if dtype in SCALED else 0
        return (spec.kv_width * dtype.itemsize + scales) * block_size

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer.values())

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero some blocks: what a request with non-finite numbers must leave behind, since 0 times NaN is NaN."""
        index = torch.tensor(list(blocks), dtype=torch.int64)
        for layer in self.layers:
            for part in layer.values():
                plain(part)[index] = 0

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to); none is both."""
        copy_blocks(self.layers, pairs)

    def panels_of(self, layer: int) -> Panels:
        """One layer's keys and values for the CPU kernels."""
        return Panels(**self.layers[layer])


def copy_blocks(layers: Iterable[dict[str, Tensor]], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) of every layer, whatever a layer keeps: the first dimension of each part is blocks.

    A block is one run of memory of a few kilobytes: on the host, starting threads for that takes longer than the copy.
    """
    for part in (part for layer in layers for part in layer.values()):
        if part.device.type == "cpu":
            at, size = part.data_ptr(), part.stride(0) * part.itemsize
            for source, target in pairs:
                ctypes.memmove(at + target * size, at + source * size, size)
        else:
            places = torch.tensor(pairs, dtype=torch.int64, device=part.device)
            part[places[:, 1]] = part[places[:, 0]]


def _walk_shapes(
    blocks: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return dict.fromkeys(("keys", "values"), ((blocks, kv_heads, size, dim), dtype))


class PagedContext:
    """One step's tokens: span after span on the flat axis. Implements AttnContext over a KVCache."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        device = cache.layers[0]["keys"].device if cache.layers else "cpu"
        size = cache.block_size
        positions = [position for span in spans for position in range(span.start, span.start + span.count)]
        self.positions_T = torch.tensor(positions, dtype=torch.int64, device=device)
        blocks = [span.blocks[p // size] for span in spans for p in range(span.start, span.start + span.count)]
        self._block_T = torch.tensor(blocks, dtype=torch.int64, device=device)
        self._row_T = self.positions_T % size
        self._spans = paged.Spans([(span.start, span.count, span.blocks) for span in spans], size)
        self._walks = [] if cache.panels else [_Walk(members, cache, device) for members in _alike(spans)]

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> Tensor:
        if self.cache.panels:
            panels = self.cache.panels_of(layer)
            keep(k_TKD, v_TKD, panels, self._spans)
            return paged_attention(q_THD, panels, self._spans, how).to(q_THD.dtype)
        if not how.causal:
            raise ConfigError("a cache is looked back over: an encoder's texts go through whole, in a PackedContext")
        keys, values = (self.cache.layers[layer][name] for name in ("keys", "values"))
        keys[self._block_T, :, self._row_T] = k_TKD.to(keys.dtype)
        values[self._block_T, :, self._row_T] = v_TKD.to(values.dtype)
        out_THD = torch.empty_like(q_THD)
        for walk in self._walks:
            walk.attend(q_THD, keys, values, how, out_THD)
        return out_THD


def _alike(spans: Sequence[Span]) -> list[list[tuple[int, Span]]]:
    """Spans with their first token's place on T, in groups that walk together: by count rounded up to a power of two.

    A long chunk walks alone, since padding it to a neighbour's length would cost more than the calls it saves.
    """
    groups: dict[tuple[int, int], list[tuple[int, Span]]] = {}
    at = 0
    for number, span in enumerate(spans):
        if span.count:
            rounded = 1 << (span.count - 1).bit_length()
            groups.setdefault((rounded, number if rounded > 32 else -1), []).append((at, span))
        at += span.count
    return list(groups.values())


class _Walk:
    """Requests that walk over their keys together, the one with the most keys first."""

    def __init__(self, members: list[tuple[int, Span]], cache: KVCache, device: torch.device | str) -> None:
        size = cache.block_size
        self.pages = KEYS // size
        members = sorted(members, key=lambda member: -(member[1].start + member[1].count))
        reach = [-(-(span.start + span.count) // KEYS) for _, span in members]
        longest = max(span.count for _, span in members)
        at_R = torch.tensor([at for at, _ in members], device=device)
        count_R = torch.tensor([span.count for _, span in members], device=device)
        start_R = torch.tensor([span.start for _, span in members], device=device)
        place_L = torch.arange(longest, device=device)
        self.kept_RL = place_L < count_R[:, None]
        self.all_kept = bool(self.kept_RL.all())
        self.token_RL = torch.where(self.kept_RL, at_R[:, None] + place_L, at_R[:, None])
        self.position_RL = start_R[:, None] + torch.where(self.kept_RL, place_L, 0)
        table = torch.full((len(members), reach[0] * self.pages), cache.num_blocks)
        for row, (_, span) in enumerate(members):
            used = -(-(span.start + span.count) // size)
            table[row, :used] = torch.tensor(span.blocks[:used])
        self.table_RP = table.to(device)
        self.active = [sum(blocks > step for blocks in reach) for step in range(reach[0])]
        self.starts = [span.start for _, span in members]
        self.ends = [span.start + span.count for _, span in members]
        self.lowest = min(self.starts)
        self._runs: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[tuple[object, ...], tuple[int, Tensor | None, Tensor | None]] = {}

    def attend(self, q_THD: Tensor, keys: Tensor, values: Tensor, how: Attend, out_THD: Tensor) -> None:
        R, H, K = len(self.token_RL), q_THD.shape[1], keys.shape[1]
        q_ZMD = grouped(q_THD[self.token_RL].float() * how.scale, K)
        folded = Fold.nothing(q_ZMD)
        for step in self._steps(how):
            active, late = self.active[step], self._late(step) * (H // K)
            q = q_ZMD[: active * K, late:]
            k_ZND, v_ZND = (self._gather(part, step, active) for part in (keys, values))
            clear, hidden, gap = self._mask(step, how, K)
            seen = look(v_ZND, scores(q.contiguous(), k_ZND, hidden, gap, how, clear))
            Fold(*(part[:, late:] for part in (folded.m, folded.l, folded.o))).add(seen, active * K)
        mixed_RLHD = ungrouped(folded.o / folded.l, R, H).to(out_THD.dtype)
        if self.all_kept:
            out_THD[self.token_RL] = mixed_RLHD
        else:
            out_THD[self.token_RL[self.kept_RL]] = mixed_RLHD[self.kept_RL]

    def _steps(self, how: Attend) -> list[int]:
        """The steps in which any request sees anything."""
        seen = {start // KEYS for span in zip(self.starts, self.ends, strict=True) for start in blocks_of(*span, how)}
        return sorted(seen)

    def _gather(self, part: Tensor, step: int, active: int) -> Tensor:
        """The keys or values of one walk step, contiguous for each head: [active·K, KEYS, D], fp32."""
        blocks, K, size, D = part.shape
        if (step, K) not in self._runs:  # the same for keys and values, and for every layer
            page_RP = self.table_RP[:active, step * self.pages : (step + 1) * self.pages]
            head_K = torch.arange(K, device=part.device)
            self._runs[step, K] = (page_RP[:, None, :] * K + head_K[None, :, None]).flatten()
        run = self._runs[step, K]
        return part.view(blocks * K, size * D).index_select(0, run).view(active * K, KEYS, D).float()

    def _late(self, step: int) -> int:
        """Tokens of a chunk that walks alone which stand before this step's keys: they see none of them."""
        return max(0, step * KEYS - self.lowest) if len(self.starts) == 1 else 0

    def _mask(self, step: int, how: Attend, kv_heads: int) -> tuple[int, Tensor | None, Tensor | None]:
        """How many of the first requests see the whole block, what is hidden from the others, and the distances.

        Most requests are behind most blocks, so most need no mask; distances are for ALiBi alone.
        """
        key = (step, how.window, how.slopes is not None, how.sparse, kv_heads)
        if key not in self._masks:
            clear, active, after = 0, self.active[step], (step + 1) * KEYS
            if how.window is None and how.slopes is None and how.sparse is None:
                clear = next((row for row in range(active) if self.starts[row] < after - 1), active)
            late_RL = self.position_RL[clear:active, self._late(step) :]
            hidden, gap = mask(late_RL, step * KEYS, KEYS, how, kv_heads)
            masked = None if clear == active else hidden
            self._masks[key] = (clear, masked, gap if how.slopes is not None else None)
        return self._masks[key]
