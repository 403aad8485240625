"""The KV cache and the attention context on CUDA, where Triton's kernels read both.

    one layer of the cache    keys, values [blocks, K, size, D]; int8: a scale for each token and head [blocks, K, size]
    slot of a token           block · size + row; -1 is nowhere, for a row that only fills a captured batch up

A step's tokens are of two kinds: decodes, whose keys are read by many programs side by side, and chunks of prompts,
whose tiles of queries walk. Both fold keys in one order (`kernels/triton/attention.py`), so which kind a token is
leaves no trace in its bits.

Shapes: T tokens, S sequences, H query heads, K key-value heads, D head size, P pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.attention import Attend
from ..kernels.triton import SPAN, missing
from ..models.spec import ModelSpec
from .paged import Span, copy_blocks

if TYPE_CHECKING:
    from ..kernels.triton.attention import Keys, Queries

Angle = tuple[Tensor, Tensor]


class CudaCache:
    """Keys and values of every layer as Triton's kernels read them. All zero at first."""

    panels = False  # the CPU kernels' layout

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> None:
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.layers: list[dict[str, Tensor]] = []
        for mixer in (layer.mixer for layer in spec.layers):
            shape = (num_blocks, mixer.kv_heads, block_size, mixer.head_dim)
            parts = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("keys", "values")}
            if dtype == torch.int8:
                parts |= {f"{name}_scale": torch.zeros(shape[:3], device=device) for name in ("key", "value")}
            self.layers.append(parts)

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether decoders on this device run on Triton's attention."""
        return device.type == "cuda" and not missing()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer.values())

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero some blocks."""
        for layer in self.layers:
            for part in layer.values():
                part[torch.tensor(list(blocks), dtype=torch.int64, device=part.device)] = 0

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to); none is both."""
        copy_blocks(self.layers, pairs)

    def keys(self, layer: int, table_SP: Tensor) -> Keys:
        """One layer of some sequences, as the attention kernel takes it."""
        from ..kernels.triton.attention import Keys

        parts = self.layers[layer]
        return Keys(parts["keys"], parts["values"], table_SP, parts.get("key_scale"), parts.get("value_scale"))

    def keep(
        self,
        layer: int,
        k_TKD: Tensor,
        v_TKD: Tensor,
        slots_T: Tensor,
        angles: Angle | None = None,
        interleaved: bool = False,
    ) -> None:
        """Write the tokens' keys, turned by `angles` on the way where given, and values."""
        from ..kernels.triton.rope import keep

        parts = self.layers[layer]
        keep(k_TKD, parts["keys"], slots_T, parts.get("key_scale"), angles, interleaved)
        keep(v_TKD, parts["values"], slots_T, parts.get("value_scale"))


@dataclass(slots=True)
class Crowd:
    """Sequences that one launch serves: first token, position and tokens of each, and their block tables.

    `counts` bounds the tokens of each on the host; `queries` is made when a layer first asks, for each number of query
    heads that share keys.
    """

    sequences_S3: Tensor
    counts: list[int]
    table_SP: Tensor
    reach: int
    queries: dict[int, Queries] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[tuple[int, Span]], size: int, reach: int, device: torch.device) -> Crowd:
        """Spans with their first token's place on T."""
        used = [-(-(span.start + span.count) // size) for _, span in members]
        table_SP = torch.zeros(len(members), max(used), dtype=torch.int32)
        for row, pages, (_, span) in zip(table_SP, used, members, strict=True):
            row[:pages] = torch.tensor(span.blocks[:pages])
        triples = [(first, span.start, span.count) for first, span in members]
        sequences_S3 = torch.tensor(triples, dtype=torch.int32)
        counts = [span.count for _, span in members]
        return cls(sequences_S3.to(device), counts, table_SP.to(device), reach)

    def asked_by(self, group: int) -> Queries:
        from ..kernels.triton.attention import Queries, Tiles

        if group not in self.queries:
            tiles = Tiles.of(list(enumerate(self.counts)), group, self.table_SP.device)
            self.queries[group] = Queries(self.sequences_S3, tiles, self.reach)
        return self.queries[group]


class CudaContext:
    """One step's tokens: span after span on the flat axis. Implements AttnContext over a CudaCache."""

    def __init__(self, cache: CudaCache, spans: Sequence[Span], device: torch.device) -> None:
        self.cache = cache
        size = cache.block_size
        positions = [p for span in spans for p in range(span.start, span.start + span.count)]
        slots = [
            span.blocks[p // size] * size + p % size
            for span in spans
            for p in range(span.start, span.start + span.count)
        ]
        self.positions_T, self.slots_T = torch.tensor([positions, slots], dtype=torch.int64).to(device)
        decodes: list[tuple[int, Span]] = []
        chunks: list[tuple[int, Span]] = []
        first = 0
        for span in spans:
            if span.count:
                (decodes if span.count == 1 else chunks).append((first, span))
            first += span.count
        longest = max((span.start + 1 for _, span in decodes), default=0)
        self.crowds = [
            Crowd.of(members, size, reach, device)
            for members, reach in ((decodes, split_reach(longest)), (chunks, 0))
            if members
        ]

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> Tensor:
        self.cache.keep(layer, k_TKD, v_TKD, self.slots_T)
        return self._look(layer, q_THD, k_TKD.shape[1], how)

    def turn_and_attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend, angles: Angle, interleaved: bool
    ) -> Tensor:
        """`attend` of queries and keys turned by `angles`, the keys on their way into the cache."""
        from ..kernels.triton.rope import rotate

        self.cache.keep(layer, k_TKD, v_TKD, self.slots_T, angles, interleaved)
        return self._look(layer, rotate(q_THD, *angles, interleaved), k_TKD.shape[1], how)

    def _look(self, layer: int, q_THD: Tensor, kv_heads: int, how: Attend) -> Tensor:
        from ..kernels.triton.attention import attend

        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for crowd in self.crowds:
            queries = crowd.asked_by(q_THD.shape[1] // kv_heads)
            attend(q_THD, self.cache.keys(layer, crowd.table_SP), queries, how, out_THD)
        return out_THD


def split_reach(longest: int) -> int:
    """Keys up to which decodes are split, 0 when one program does as well: a power of four of the attention's spans.

    Few different reaches mean few captured graphs; a span that no row has costs a program that ends at once.
    """
    reach = SPAN
    while reach < longest:
        reach *= 4
    return reach if longest > SPAN else 0
