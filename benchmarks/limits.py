"""What can this machine do at most? Read bandwidth and torch's own matrix product, printed beside every result.

python benchmarks/limits.py [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twofold.platforms import usable_cores


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of one call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(threads: int, mebibytes: int = 256) -> float:
    """GB/s at which `threads` threads read memory that no cache holds: the sum of a large array, and a product of one
    row with a large matrix, whichever is faster."""
    torch.set_num_threads(threads)
    count = mebibytes * 2**20 // 4
    flat = torch.ones(count)
    matrix, row = flat.view(-1, 4096), torch.ones(4096)
    best = min(seconds(lambda: flat.sum()), seconds(lambda: torch.mv(matrix, row)))
    return count * 4 / best / 1e9


def matmul_peak(threads: int, size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of torch's own product of two square matrices."""
    torch.set_num_threads(threads)
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / seconds(lambda: left @ right, 3) / 1e9


def measure(threads: int, *, quick: bool = False) -> dict[str, float]:
    """The limits at `threads` threads, the thread count left as it was found."""
    before = torch.get_num_threads()
    try:
        return {
            "threads": threads,
            "read_gb_s": read_bandwidth(threads, 64 if quick else 256),
            "matmul_fp32_gflop_s": matmul_peak(threads, 1024 if quick else 2048),
        }
    finally:
        torch.set_num_threads(before)


def line(limits: dict[str, float]) -> str:
    return (
        f"limits at {limits['threads']:.0f} threads: {limits['read_gb_s']:.1f} GB/s read, "
        f"{limits['matmul_fp32_gflop_s']:.0f} GFLOP/s fp32 matmul"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, help="only this thread count (default: 1, 2, 4 ... all cores)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays: seconds instead of a minute")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    cores = usable_cores()
    counts = [args.threads] if args.threads else sorted({n for n in (1, 2, 4, 8, 16, 32) if n < cores} | {cores})
    records: list[dict[str, Any]] = []
    for threads in counts:
        records.append(measure(threads, quick=args.quick))
        print(line(records[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
