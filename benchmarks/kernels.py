"""How near the machine's limits is each op, and how much faster than torch?

    twofold bench kernels [--quick] [--ops NAME ...] [--threads N] [--json FILE]

Every op of the registry at decode and prefill sizes of the reference model (cases.py). The implementation that serves
here takes turns with what a user of torch would call, or with the op's own definition, A B A B; medians. The limit is
the larger of the time to move each operand once and the time of the arithmetic, at bandwidth and peaks measured in the
same run. Arguments are drawn several times over and used in turn, so that no cache holds what decoding must read.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import pkgutil
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cases  # noqa: F401 (fills CASES)
import cases_training  # noqa: F401
import limits
import torch
from case import CASES, QUICK, Args, Case, Sizes, held, tensors

from twofold import kernels as package
from twofold.kernels import Op
from twofold.platforms import usable_cores

ENOUGH = 160 << 20  # bytes of arguments that no cache holds
MANY = 64
QUICKLY = 0.003  # seconds of each side in a smoke test, at least one call; otherwise:
LONG = 0.1


def measured(op: Op[..., Any], sizes: Sizes) -> list[Case]:
    """The op's cases; for an op that nobody has written any for, its own sample."""
    if op.name in CASES:
        return list(CASES[op.name](sizes))
    if op.sampler is not None:
        return [Case(label="its sample", make=op.sampler, moved=held(op.sampler()))]
    return []


def registered() -> list[Op[..., Any]]:
    """Every op; a module's ops are known once it is imported."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return list(package.all_ops())


def seconds(run: Any, sets: Iterator[Args], least: float) -> float:
    """Wall time of one call, over as many as take `least` seconds, each with the next arguments."""
    calls, took, start = 0, 0.0, time.perf_counter()
    while not calls or took < least:
        run(*next(sets))
        calls, took = calls + 1, time.perf_counter() - start
    return took / calls


@torch.inference_mode()
def measure(op: Op[..., Any], case: Case, machine: dict[str, Any], turns: int, least: float) -> dict[str, Any]:
    """One case: times of both sides, and ours against the limit."""
    first = case.make()
    enough = ENOUGH if least == LONG else ENOUGH // 8
    copies = max(1, min(MANY, enough // max(1, held(first))))
    sets = itertools.cycle([first, *(case.make() for _ in range(copies - 1))])
    name, served = serving(op, first, case.keywords)
    run = functools.partial(served, **case.keywords)
    plain = functools.partial(case.plain or op.reference, **case.keywords)
    plain(*first)  # torch's first call of a shape may measure or compile
    ours, theirs = [], []
    for turn in range(turns):
        ours.append(seconds(run, sets, least))
        if turn == 0 or theirs[0] < 5 * least:  # what is slow needs no second look
            theirs.append(seconds(plain, sets, least))
    took = statistics.median(ours)
    move = case.moved / machine["read_gb_s"] / 1e9
    compute = case.done / machine["fma_gflop_s" if case.unit == "fp32" else "int8_gop_s"] / 1e9
    return {
        "op": op.name,
        "case": case.label,
        "served_by": name,
        "microseconds": took * 1e6,
        "against": "torch" if case.plain else "definition",
        "against_microseconds": statistics.median(theirs) * 1e6,
        "ratio": statistics.median(theirs) / took,
        "gb_s": case.moved / took / 1e9,
        "gop_s": case.done / took / 1e9,
        "bound": "memory" if move >= compute else case.unit,
        "share_of_limit": max(move, compute) / took,
    }


def serving(op: Op[..., Any], args: Args, keywords: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and function of what a plain call with these arguments runs."""
    op(*args, **keywords)
    for name in op.implementations:
        if op.implementations[name].run is chosen(op, args):
            return name, op.implementations[name].run
    return "reference", op.reference


def chosen(op: Op[..., Any], args: Args) -> Any:
    from twofold.kernels.op import Call

    first = next(tensors(args), None)
    return op.choose(Call(dtype=None if first is None else first.dtype)).run


def told(record: dict[str, Any]) -> str:
    rate = f"{record['gb_s']:6.1f} GB/s" if record["bound"] == "memory" else f"{record['gop_s']:6.0f} GOP/s"
    return (
        f"{record['op']:<18}{record['case']:<41}{record['served_by']:<10}{record['microseconds']:>9,.0f} us"
        f"{record['ratio']:>7.1f}x {record['against']:<10} {rate}"
        f"  {record['share_of_limit']:>4.0%} of {record['bound']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    ops = registered()
    names = [op.name for op in ops]
    parser.add_argument("--ops", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--turns", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small batches and contexts, one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = limits.measure(args.threads, quick=args.quick)
    torch.set_num_threads(args.threads)
    print(limits.line(machine))
    sizes, turns, least = (QUICK, 1, QUICKLY) if args.quick else (Sizes(), args.turns, LONG)
    records = []
    for op in ops:
        found = measured(op, sizes) if op.name in args.ops else []
        for case in found:
            records.append(measure(op, case, machine, turns, least))
            print(told(records[-1]), flush=True)
        if op.name in args.ops and not found:
            print(f"{op.name:<18}has no case and no sample")
    if args.json:
        args.json.write_text(json.dumps({"limits": machine, "ops": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
