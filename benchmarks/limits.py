"""What can this machine do at most? Read bandwidth, fp32 and int8 arithmetic, printed beside every result.

    twofold bench limits [--threads N] [--quick] [--json FILE]

A small C source (limits.cpp) is compiled here and run on 1, 2, 4 ... threads: registers full of fused multiply-adds, of
int8 dot products, and one pass over memory that no cache holds. Each figure is the best of some runs: a limit is what
could be had. torch's own matrix product stands beside them, and stands in for them where there is no compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twofold.kernels.build import BuildError, build
from twofold.platforms import instruction_sets, usable_cores

SOURCE = Path(__file__).resolve().with_name("limits.cpp")
Span = ctypes.c_int64 * 2
STREAMS = (1, 2, 4)


@functools.cache
def library() -> ctypes.CDLL | None:
    """limits.cpp, compiled for this very processor; None without a compiler that manages to."""
    has = [f"-DHAS_{name}" for name in instruction_sets()]  # for the cache, which may be shared by machines
    try:
        path = build("limits", [SOURCE], ("-march=native", "-ffp-contract=fast", *has))
    except BuildError:
        return None
    found = ctypes.CDLL(str(path))
    found.dot_name.restype = ctypes.c_char_p
    found.read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
    for call in (found.multiply_add, found.dot):
        call.argtypes = (ctypes.c_int64, ctypes.c_void_p)
    return found


def together(threads: int, work: Callable[[int, Any], object]) -> float:
    """Seconds from the first thread's beginning to the last one's end; `work(thread, span)` lets go of the GIL."""
    spans = [Span() for _ in range(threads)]
    start = threading.Barrier(threads)

    def one(thread: int) -> None:
        start.wait()
        work(thread, ctypes.byref(spans[thread]))

    team = [threading.Thread(target=one, args=(thread,)) for thread in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return (max(span[1] for span in spans) - min(span[0] for span in spans)) / 1e9


def best(work: Callable[[], float], repeats: int) -> float:
    """The least of some times, after one to warm up."""
    work()
    return min(work() for _ in range(repeats))


def arithmetic(call: Any, threads: int, per_lane: int, lib: ctypes.CDLL, milliseconds: float) -> float:
    """1e9 operations a second of one of limits.cpp's loops; `per_lane` operations for each lane of each chain."""
    one = Span()
    call(1_000_000, ctypes.byref(one))
    rounds = int(1_000_000 * milliseconds * 1e6 / max(1, one[1] - one[0]))
    took = best(lambda: together(threads, lambda _, span: call(rounds, span)), 4)
    return float(rounds * threads * lib.chains() * lib.lanes() * per_lane / took / 1e9)


def read_bandwidth(threads: int, lib: ctypes.CDLL, mebibytes: int) -> float:
    """GB/s at which `threads` threads read memory that no cache holds, each its own share of one large block.

    Of one, two and four streams a thread the fastest counts: which it is differs between processors by half as much
    again.
    """
    size = mebibytes << 20
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    view = (ctypes.c_char * size).from_buffer(block)
    place = ctypes.addressof(view)
    ctypes.memset(place, 1, size)
    share = size // threads // 4096 * 4096

    def read(streams: int) -> float:
        return together(threads, lambda t, span: lib.read_all(place + t * share, share, streams, span))

    took = min(best(lambda streams=streams: read(streams), 4) for streams in STREAMS)
    del view
    block.close()
    return share * threads / took / 1e9


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_read(threads: int, mebibytes: int) -> float:
    """GB/s of torch: the sum of a large array, or one row times a large matrix, whichever is faster."""
    torch.set_num_threads(threads)
    count = mebibytes * 2**20 // 4
    flat = torch.ones(count)
    matrix, row = flat.view(-1, 4096), torch.ones(4096)
    took = min(best(lambda: seconds(lambda: flat.sum()), 5), best(lambda: seconds(lambda: torch.mv(matrix, row)), 5))
    return count * 4 / took / 1e9


def torch_matmul(threads: int, size: int, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of torch's own product of two square matrices, GOP/s for int8."""
    torch.set_num_threads(threads)
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * size**3 / best(lambda: seconds(lambda: product(left, right)), 3) / 1e9


def measure(threads: int, *, quick: bool = False) -> dict[str, Any]:
    """The limits at `threads` threads, torch's thread count left as it was found."""
    before, lib = torch.get_num_threads(), library()
    mebibytes, size, long = (256, 1024, 20.0) if quick else (512, 2048, 100.0)
    try:
        matmul = torch_matmul(threads, size)
        found: dict[str, Any] = {"threads": threads, "matmul_fp32_gflop_s": matmul}
        if lib is None:
            int8 = torch_matmul(threads, size, torch.int8)
            how = {"fma_gflop_s": matmul, "int8_gop_s": int8, "int8_by": "torch's int8 product, for want of a compiler"}
            return found | {"read_gb_s": torch_read(threads, mebibytes)} | how
        return found | {
            "read_gb_s": read_bandwidth(threads, lib, mebibytes),
            "fma_gflop_s": arithmetic(lib.multiply_add, threads, 2, lib, long),
            "int8_gop_s": arithmetic(lib.dot, threads, 8, lib, long),
            "int8_by": lib.dot_name().decode(),
        }
    finally:
        torch.set_num_threads(before)


def line(limits: dict[str, Any]) -> str:
    return (
        f"limits at {limits['threads']} thread{'s' if limits['threads'] > 1 else ''}: "
        f"{limits['read_gb_s']:.1f} GB/s read, {limits['fma_gflop_s']:.0f} GFLOP/s fp32, "
        f"{limits['int8_gop_s']:.0f} GOP/s int8 ({limits['int8_by']}), "
        f"torch's fp32 matmul {limits['matmul_fp32_gflop_s']:.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, help="only this thread count (default: 1, 2, 4 ... all cores)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays: seconds instead of half a minute")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    cores = usable_cores()
    counts = [args.threads] if args.threads else sorted({n for n in (1, 2, 4, 8, 16, 32) if n < cores} | {cores})
    records = []
    for threads in counts:
        records.append(measure(threads, quick=args.quick))
        print(line(records[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
