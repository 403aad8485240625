"""`twofold train RECIPE --plan`: bytes, traffic and time of a run, and what would make it fit, before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from ..core import ConfigError, load_config
from ..platforms import read_memory
from ..train.build import DTYPES
from ..train.config import Recipe
from ..train.meter import matmul_peak
from ..train.planning import RUNTIME, Machine, Plan, plan, spec_of
from .bytes import human
from .train import parse_change

TYPICAL = 0.4
"""The share of the matmul peak that training of a middling model reaches; the line says that it is a guess."""


def planned(recipe: str, changes: Sequence[str], asked: bool, ranks: str | None, node: str | None) -> int:
    """Print it for `ranks` ranks, `node` of them on a machine like this one; 0 when it fits, 1 when it does not.

    Raises:
        ConfigError: flags that mean nothing together, or a recipe that cannot be laid out so.
    """
    if not asked:
        raise ConfigError("--ranks and --node are for --plan: a run is told its ranks by what starts it (torchrun)")
    count = _count("--ranks", ranks or "1")
    each = _count("--node", node) if node else count
    if count % each:
        raise ConfigError(f"--ranks {count} is not a whole number of machines with --node {each} ranks each")
    given = load_config(Recipe, recipe, dict(map(parse_change, changes)))
    return show(recipe, given, count, each)


def _count(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag} takes a number of 1 or more, not '{text}'")
    return int(text)


def show(recipe: str, given: Recipe, ranks: int, node: int) -> int:
    """Print the sum; its exit code."""
    memory = read_memory()
    machine = Machine(available=memory.available, node=node)
    spec = spec_of(given)
    found = plan(given, spec, ranks, machine)
    print(f"recipe        {recipe}")
    print(f"model         {spec.architecture}, {len(spec.layers)} layers, hidden {spec.hidden}, {given.model.dtype}")
    for name, value in lines(given, found, speed(given, node)):
        print(f"{name:<14}{value}")
    room = machine.available // node
    print(f"memory        {human(room)} a rank: {human(memory.available)} free of {human(memory.total)}, {node} here")
    print(f"fits          {'yes' if found.fits else 'no'}")
    for fix in found.fixes:
        print(f"would fit     {fix}")
    return 0 if found.fits else 1


def speed(recipe: Recipe, node: int) -> float:
    """FLOP/s of one of `node` ranks at this machine's matmul peak, measured with the recipe's threads."""
    torch.set_num_threads(recipe.run.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    peak = matmul_peak(device, DTYPES[recipe.model.dtype] if gpu else torch.float32)
    wanted, cores = node * recipe.run.threads, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return peak if gpu or not cores else peak * min(1.0, cores / wanted)


def lines(recipe: Recipe, found: Plan, flops: float) -> Iterator[tuple[str, str]]:
    """Name and value of each part."""
    peak, load = found.memory.peak, found.load
    yield "layout", f"{found.layout.world} ranks ({found.layout})" if found.layout.world > 1 else "one process"
    for why in found.layout.why:
        yield "", why
    yield "weights", human(peak.weights) + " a rank"
    yield "optimizer", f"{human(peak.optimizer)} ({recipe.optimizer.name}, and fp32 masters where weights are narrower)"
    yield "gradients", f"{human(peak.gradients)}, and what is being reduced"
    yield "gathered", human(peak.gathered)
    yield (
        "activations",
        f"{human(peak.activations)} of {load.tokens} tokens at once (recompute {recipe.model.recompute})",
    )
    yield "working", human(peak.working)
    yield "runtime", f"{human(RUNTIME)} (interpreter, torch)"
    yield "peak", f"{human(peak.total + RUNTIME)} a rank, at '{peak.name}'; {human(found.memory.kept)} between steps"
    yield "micro-batches", f"{load.parts} of {load.tokens} tokens a rank and step"
    for axis, sent in found.sent.items():
        yield f"sent on {axis}"[:13], f"{human(sent)} a rank and step"
    steps, tokens = recipe.schedule.steps, recipe.data.tokens_per_step
    yield "steps", f"{steps} of {tokens} tokens: {steps * tokens:,} tokens"
    least = found.flops / flops
    said = f"{duration(least)} a step, {duration(least * steps)} in all at the matmul peak ({flops / 1e9:.0f} GFLOP/s"
    usual = f"{duration(least * steps / TYPICAL)} at {TYPICAL:.0%} of it, a usual share"
    yield "time", f"{said} a rank, communication hidden); {usual}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people say."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
