"""`twofold kernels`: every op, which implementation serves it here, why, how fast, and what the others lack."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..kernels import all_ops, native
from ..kernels.op import Call, Op

_ENOUGH = 0.12  # seconds of measuring for each op, half of it the reference's


def kernels(measure: bool = True) -> int:
    """Print the table for this machine; `measure` adds each op's speed beside its reference's."""
    print(library())
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        print()
        for line in table(device, measure):
            print(line)
    return 0


def library() -> str:
    """One line about the CPU kernels: their instruction set and where they lie, or why they are not there."""
    found, why = native.state()
    if found is None:
        return f"CPU kernels: none, {why}; {native.COST}"
    where = "with the package" if found.path.is_relative_to(native.BUILT) else "at first use"
    return f"CPU kernels: for {found.isa}, built {where}: {found.path}"


def table(device: str = "cpu", measure: bool = False) -> Iterator[str]:
    """A line for each op, lines for what could serve it and does not, and at the end what this machine cannot run."""
    if measure:
        from ..kernels import samples as samples  # registers them
    call, absent = Call(device=device), defaultdict[str, list[str]](list)
    speed = f"{'time':>10}  {'speedup':<9}" if measure else ""
    yield f"{'op on ' + device:<20}{'served by':<12}{speed}why"
    for op in all_ops():
        chosen, why = op.decide(call)
        bits = "; bits of its own, not the reference's" if chosen.bits == "own" else ""
        yield f"{op.name:<20}{chosen.name:<12}{measured(op, chosen.run, device) if measure else ''}{why}{bits}"
        for name, why_not in op.others(call).items():
            if why_not.startswith("lacks "):
                absent[f"{name} {why_not}"].append(op.name)
            else:
                yield f"{'':<20}{name:<12}{'':<{len(speed)}}{why_not}"
    for reason, names in absent.items():
        yield f"{reason}, for {', '.join(names)}"


def measured(op: Op[..., Any], run: Callable[..., Any], device: str) -> str:
    """Median time of a call of typical size, and how many times as fast as the reference that is; two columns."""
    if op.sampler is None:
        return f"{'':>10}  {'':<9}"
    try:
        with torch.device(device), torch.no_grad():
            mine, reference = _times((run, op.reference), op.sampler(), device)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{'failed':>10}  {type(error).__name__[:8]:<9}"
    ratio = "" if run is op.reference else f"{reference / mine:.1f} x"
    return f"{_duration(mine):>10}  {ratio:<9}"


def _times(runs: tuple[Callable[..., Any], ...], args: tuple[Any, ...], device: str) -> list[float]:
    """Median seconds of each, taken in turns so that a busy moment meets all alike."""
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:  # what is built or measured at first use
        run(*args)
    end = time.perf_counter() + _ENOUGH
    while time.perf_counter() < end or len(taken[0]) < 3:
        for run, times in zip(runs, taken, strict=True):
            _settle(device)
            start = time.perf_counter()
            run(*args)
            _settle(device)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
