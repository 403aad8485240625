"""Which module a number stopped being finite in. Asked only when it happened: it runs one forward pass more.

forward    embed ─▶ layers.0.norm1 ─▶ layers.0.qkv ─▶ ... ─▶ layers.3.down ─▶ norm ─▶ head
backward   ◀──────────────────────────── the first gradient that is not finite is met from here
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .zero import local

Merge = Callable[[Sequence[float]], Sequence[float]]
"""Numbers added up over the ranks that hold the same modules."""


@dataclass
class Calls:
    """One forward pass: its modules in the order in which they ended, and the first whose output is not finite."""

    order: list[str] = field(default_factory=list)
    broken: str | None = None


@torch.no_grad()
def watch(model: nn.Module, forward: Callable[[], object]) -> Calls:
    """Run `forward`, which calls `model`, with a look at what each of its modules gives."""
    calls = Calls()

    def look(name: str) -> Callable[..., None]:
        def ended(module: nn.Module, given: Any, out: object) -> None:
            calls.order.append(name)
            outs = out if isinstance(out, tuple) else (out,)
            if calls.broken is None and not all(_finite(x) for x in outs if isinstance(x, Tensor)):
                calls.broken = name

        return ended

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def explain(
    model: nn.Module,
    gradients: Iterable[tuple[str, Tensor | None]],
    forward: Callable[[], object],
    spoiled: bool,
    merge: Merge = list,
) -> str:
    """What was not finite, and where first; with all ranks of a `merge`, where it was first on any of them.

    `gradients` come by the parameters' names, as the model lists them. `spoiled` says that the loss was not finite,
    so that the forward pass is looked at.
    """
    calls = watch(model, forward)
    names = [name for name, _ in model.named_modules()]
    if spoiled:
        found = _anywhere(names, {calls.broken}, merge)
        first = next((name for name in calls.order if name in found), None)
        where = f"first in the output of {first}" if first else "though every module's output is"
        return f"the loss is not finite, {where}"
    places, bad = _places((name for name, _ in model.named_parameters()), calls.order), set[str | None]()
    for name, grad in gradients:
        if grad is not None and not _finite(grad):
            bad.add(name.rpartition(".")[0])
    found = _anywhere(names, bad, merge)
    last = max((name for name in places if name in found), key=places.__getitem__, default=None)
    return f"the gradient is not finite, first in {last}" if last else "the gradient is not finite on another rank"


def _places(parameters: Iterable[str], order: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Where in the forward pass each module with weights is: (call, place in the list).

    Tables whose rows are looked up are never called: those listed before all that is (embeddings) are at the begin,
    the others (the head) at the end.
    """
    last = {name: at for at, name in enumerate(order)}
    places: dict[str, tuple[float, int]] = {}
    at = -1.0
    for number, parameter in enumerate(parameters):
        module = parameter.rpartition(".")[0]
        called = _called(module, last)
        at = float(last[called]) if called else (at if at < 0 else math.inf)
        places[module] = at, number
    return places


def _called(module: str, last: dict[str, int]) -> str | None:
    """The module, or the one around it that was called: experts use the weights inside them without a call."""
    while module and module not in last:
        module = module.rpartition(".")[0]
    return module or None


def _anywhere(names: list[str], mine: set[str | None], merge: Merge) -> set[str]:
    counts = merge([float(name in mine) for name in names])
    return {name for name, count in zip(names, counts, strict=True) if count}


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(local(x)).all())
