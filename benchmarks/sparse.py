"""Does block-sparse attention cost what it looks at?

    twofold bench sparse [--quick] [--lengths N ...] [--block N] [--threads N] [--json FILE]

Attention alone, 8 query and 4 key-value heads of 64: forward, forward and backward of one sequence, and one more token
for each of 4 sequences. Dense and every layout take turns, A B C A B C; medians. Beside each time stands its share of
the dense one, and the share of the query-key pairs that the layout has: the nearer the first is to the second, the
better whole blocks are passed over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import limits
import torch
from torch import Tensor

from twofold.core.sparse import BigBird, Fixed, Layout, Local, Longformer, Strided, Variable
from twofold.kernels.attention import packed_attention
from twofold.kernels.blocksparse import Sparse
from twofold.kernels.paged import Panels, Spans, keep, paged_attention
from twofold.kernels.walk import Attend
from twofold.platforms import usable_cores

HEADS, KV_HEADS, DIM, PAGE, SEQUENCES = 8, 4, 64, 128, 4
LEAST = 0.02  # seconds of one measurement
Work = Callable[[Attend], object]


def layouts(block: int) -> dict[str, Layout | None]:
    return {
        "dense": None,
        "local": Local(block=block, num_sliding_window_blocks=7),
        "strided": Strided(block=block, stride_blocks=8),
        "fixed": Fixed(block=block, num_local_blocks=8),
        "fixed by head": Fixed(
            block=block, num_local_blocks=8, num_different_global_patterns=8, different_layout_per_head=True
        ),
        "variable": Variable(block=block, local_window_blocks=(2, 4, 8)),
        "bigbird": BigBird(block=block, num_random_blocks=2, num_sliding_window_blocks=5),
        "longformer": Longformer(block=block, num_sliding_window_blocks=5, global_block_indices=(0, 1)),
    }


def pairs(layout: Layout | None, first: int, length: int) -> float:
    """The share of the causal query-key pairs that a layout has, of the queries first..length-1."""
    if layout is None:
        return 1.0
    block, found = layout.block, 0
    for query in range(first, length):
        older = layout.row(0, query // block).bit_count() - 1
        found += older * block + query % block + 1
    return found / (length * (length + 1) // 2 - first * (first + 1) // 2)


def works(length: int) -> Iterator[tuple[str, int, Work]]:
    """What is timed at one length: its name, the first of the queries that look, and the work."""
    q, k, v = (torch.randn(length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    up, leaves = torch.randn_like(q), [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]

    def forward(how: Attend) -> Tensor:
        with torch.no_grad():
            return packed_attention(q, k, v, (length,), how)

    def both(how: Attend) -> object:
        return torch.autograd.grad(packed_attention(leaves[0], leaves[1], leaves[2], (length,), how), leaves, up)

    yield "forward", 0, forward
    yield "forward and backward", 0, both
    each = -(-length // PAGE)
    panels = Panels.zeros(SEQUENCES * each, KV_HEADS, PAGE, DIM)
    tables = [range(number * each, (number + 1) * each) for number in range(SEQUENCES)]
    for table in tables:
        keep(k, v, panels, Spans([(0, length, table)], PAGE))
    last = Spans([(length - 1, 1, table) for table in tables], PAGE)
    yield f"decode, {SEQUENCES} sequences", length - 1, lambda how: paged_attention(q[:SEQUENCES], panels, last, how)


def seconds(work: Work, how: Attend) -> float:
    """Wall time of one call, over as many as take LEAST seconds."""
    calls, took, start = 0, 0.0, time.perf_counter()
    while not calls or took < LEAST:
        work(how)
        calls, took = calls + 1, time.perf_counter() - start
    return took / calls


def measure(length: int, block: int, turns: int) -> Iterator[dict[str, Any]]:
    kinds = layouts(block)
    hows = {
        name: Attend(DIM**-0.5, sparse=Sparse(layout, HEADS, length) if layout else None)
        for name, layout in kinds.items()
    }
    for what, first, work in works(length):
        for how in hows.values():
            work(how)
        took: dict[str, list[float]] = {name: [] for name in hows}
        for _ in range(turns):
            for name, how in hows.items():
                took[name].append(seconds(work, how))
        for name in hows:
            shares = [mine / dense for mine, dense in zip(took[name], took["dense"], strict=True)]
            yield {
                "length": length,
                "work": what,
                "layout": name,
                "milliseconds": statistics.median(took[name]) * 1e3,
                "share_of_dense": statistics.median(shares),
                "share_of_pairs": pairs(kinds[name], first, length),
            }


def told(record: dict[str, Any]) -> str:
    return (
        f"{record['length']:>7}  {record['work']:<23}{record['layout']:<15}{record['milliseconds']:>10.2f} ms"
        f"{record['share_of_dense']:>8.0%} of dense, with {record['share_of_pairs']:>4.0%} of the pairs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence (default: 1024 4096 16384)")
    parser.add_argument("--block", type=int, default=64, help="tokens of a layout's block (default: 64)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--turns", type=int, default=3, help="how often each layout runs (default: 3)")
    parser.add_argument("--quick", action="store_true", help="512 and 2048 tokens, one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = limits.measure(args.threads, quick=args.quick)
    torch.set_num_threads(args.threads)
    print(limits.line(machine))
    records = []
    for length in args.lengths or ((512, 2048) if args.quick else (1024, 4096, 16384)):
        for record in measure(length, args.block, 1 if args.quick else args.turns):
            records.append(record)
            print(told(record), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"limits": machine, "block": args.block, "sparse": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
