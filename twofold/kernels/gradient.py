"""The gradient of a kernel by way of its definition: forward runs the kernel, backward runs the reference again.

Nothing but the inputs is kept, so memory is that of recomputation (Chen et al. 2016); a kernel whose own backward is
faster brings one instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .op import unwatched


def with_reference_gradient(run: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any) -> Tensor:
    """`run(*args)`, differentiable as `reference(*args)` is when any tensor among `args` wants a gradient."""
    wanted = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    if not wanted:
        return run(*args)
    out: Tensor = _Borrowed.apply(run, reference, *args)
    return out


class _Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any) -> Tensor:
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[i] for i in tensors))
        ctx.reference, ctx.places = reference, tensors
        ctx.rest = [None if i in tensors else arg for i, arg in enumerate(args)]
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.rest)
        for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[place] = saved.detach().requires_grad_(ctx.needs_input_grad[2 + place])
        wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        with torch.enable_grad(), unwatched():
            found = iter(torch.autograd.grad(ctx.reference(*args), wanted, grads[0]))
        return (None, None, *(next(found) if isinstance(arg, Tensor) and arg.requires_grad else None for arg in args))
