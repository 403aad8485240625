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

from .optimizer import local


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


def first_gradient(gradients: Iterable[tuple[str, Tensor | None]], order: Sequence[str]) -> str | None:
    """The module whose gradient the backward pass met first that is not finite; `order` is that of the forward pass.

    `gradients` come by the parameters' names, as the model lists them.
    """
    last = {name: at for at, name in enumerate(order)}
    found: tuple[float, str] | None = None
    at = -1.0  # before all calls: a table whose rows are looked up is no call
    for name, grad in gradients:
        module = name.rpartition(".")[0]
        called = _called(module, last)
        at = float(last[called]) if called else (at if at < 0 else math.inf)  # listed behind the layers: the head
        if grad is not None and not _finite(grad) and (found is None or at >= found[0]):
            found = at, module
    return found[1] if found else None


def explain(
    model: nn.Module,
    gradients: Iterable[tuple[str, Tensor | None]],
    forward: Callable[[], object],
    spoiled: bool,
) -> str:
    """What was not finite, and where first. `spoiled` says that the loss was, so that the forward pass is looked at."""
    calls = watch(model, forward)
    if spoiled:
        where = f"first in the output of {calls.broken}" if calls.broken else "though every module's output is"
        return f"the loss is not finite, {where}"
    module = first_gradient(gradients, calls.order)
    return f"the gradient is not finite, first in {module}" if module else "the gradient is not finite on another rank"


def _called(module: str, last: dict[str, int]) -> str | None:
    """The module, or the one around it that was called: experts use the weights inside them without a call."""
    while module and module not in last:
        module = module.rpartition(".")[0]
    return module or None


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(local(x)).all())
