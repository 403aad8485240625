"""Decode as captured CUDA graphs: a step in which every request brings one token is replayed, not launched.

    requests   1  2  3  4  5 .. 8  9 .. 16  17 .. 24          the batch is rounded up, and filled with rows that
    captured   1  2  4  4  8       16       24                stand nowhere (slot -1) and hold nothing (0 tokens)

A step writes ids, positions, slots and block tables into buffers that never move, then replays the graph of its size
and of how far its longest request reaches. A size's first step runs once by itself, so that kernels are built and
tiles compared, and is then captured. Steps with prompts in them run kernel by kernel; the bits are the same.

Shapes: R rows, P pages, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.decoder import Decoder
from ..models.fused import forward
from .cuda import Crowd, CudaCache, CudaContext, split_reach
from .paged import Span
from .plan import Chunk

Captured = tuple[Callable[[], None], Tensor]


def sizes(most: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, 8, then every 8, from 64 every 16, from 256 every 32, up to `most`."""
    found = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 32, 32)]
    return [*(size for size in found if size < most), most]


class Buffers:
    """What a captured step reads, at addresses that never change: room for `rows` requests of `pages` blocks."""

    def __init__(self, rows: int, pages: int, size: int, device: torch.device) -> None:
        self.rows, self.pages, self.size = rows, pages, size
        pinned = device.type == "cuda"
        self.long = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.sequences_R3 = torch.zeros(rows, 3, dtype=torch.int32, device=device)
        self.table_RP = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self.ids_R, self.positions_R, self.slots_R = self.long
        pinned = device.type == "cuda"
        self._long, self._sequences_R3, self._table_RP = (
            torch.zeros(there.shape, dtype=there.dtype, pin_memory=pinned)
            for there in (self.long, self.sequences_R3, self.table_RP)
        )
        self._held: list[tuple[int, ...]] = [()] * rows

    def fill(self, chunks: Sequence[Chunk], rows: int) -> None:
        """Write a step of one token a chunk; rows beyond them, up to `rows`, stand nowhere."""
        size = self.size
        places = [chunk.blocks[chunk.start // size] * size + chunk.start % size for chunk in chunks]
        idle = rows - len(chunks)
        self._long[0, :rows] = torch.tensor([chunk.ids[0] for chunk in chunks] + [0] * idle)
        self._long[1, :rows] = torch.tensor([chunk.start for chunk in chunks] + [0] * idle)
        self._long[2, :rows] = torch.tensor(places + [-1] * idle)
        triples = [(row, chunk.start, 1) for row, chunk in enumerate(chunks)] + [(0, 0, 0)] * idle
        self._sequences_R3[:rows] = torch.tensor(triples, dtype=torch.int32)
        for row, chunk in enumerate(chunks):
            if chunk.blocks is not self._held[row]:
                self._table_RP[row, : len(chunk.blocks)] = torch.tensor(chunk.blocks, dtype=torch.int32)
                self._held[row] = chunk.blocks
        pairs = [*zip(self.long, self._long), (self.sequences_R3, self._sequences_R3), (self.table_RP, self._table_RP)]
        for there, here in pairs:
            there[:rows].copy_(here[:rows], non_blocking=True)


class DecodeContext(CudaContext):
    """The context of a captured step: as CudaContext, but over Buffers. `rows` and `reach` are those of its graph."""

    def __init__(self, cache: CudaCache, buffers: Buffers, rows: int, reach: int) -> None:
        self.cache = cache
        self.positions_T, self.slots_T = buffers.positions_R[:rows], buffers.slots_R[:rows]
        self.crowds = [Crowd(buffers.sequences_R3[:rows], [1] * rows, buffers.table_RP[:rows], reach)]


class DecodeGraphs:
    """Graphs of one decoder over one cache, for at most `rows` requests of at most `max_len` tokens.

    `capture` turns a function into one that replays what it launched, and is the device's own unless a test brings
    another.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: CudaCache,
        *,
        rows: int,
        max_len: int,
        capture: Callable[[Callable[[], Tensor]], Captured] | None = None,
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self.sizes = sizes(rows)
        self.buffers = Buffers(rows, -(-max_len // cache.block_size) + 1, cache.block_size, decoder.device)
        self._capture = capture or Recorder()
        self._graphs: dict[tuple[int, int], Captured] = {}
        for angles in decoder.angles.values():
            angles.to(decoder.device)  # a captured step may not copy from the host

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is nothing but decodes, no more than were provided for."""
        return 0 < len(chunks) <= self.buffers.rows and all(len(c.ids) == 1 and not c.targets for c in chunks)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states of the step's tokens [T, D]; overwritten by the next step."""
        rows = next(size for size in self.sizes if size >= len(chunks))
        reach = split_reach(max(chunk.start for chunk in chunks) + 1)
        self.buffers.fill(chunks, rows)
        if (rows, reach) not in self._graphs:
            ctx = DecodeContext(self.cache, self.buffers, rows, reach)
            self._graphs[rows, reach] = self._capture(lambda: forward(self.decoder, self.buffers.ids_R[:rows], ctx))
        replay, hidden_RD = self._graphs[rows, reach]
        replay()
        return hidden_RD[: len(chunks)]


class Recorder:
    """CUDA's capture; all graphs of one recorder share their working memory, since no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        return graph.replay, out


class CudaForward:
    """A step's forward pass on CUDA: replayed where it is all decodes, else kernel by kernel."""

    def __init__(self, decoder: Decoder, cache: CudaCache, *, rows: int, max_len: int) -> None:
        self.decoder, self.cache = decoder, cache
        self.graphs = DecodeGraphs(decoder, cache, rows=rows, max_len=max_len)

    def __call__(self, chunks: Sequence[Chunk], captured: bool = True) -> Tensor:
        """Hidden states of the chunks' tokens [T, D]; not `captured` when adapters are among them."""
        if captured and self.graphs.takes(chunks):
            return self.graphs.run(chunks)
        device = self.decoder.device
        ids_T = torch.tensor([token for chunk in chunks for token in chunk.ids]).to(device)
        spans = [Span(chunk.start, len(chunk.ids), chunk.blocks) for chunk in chunks]
        return forward(self.decoder, ids_T, CudaContext(self.cache, spans, device))
