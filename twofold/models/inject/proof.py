"""A replacement shows, on random numbers and the module's own weights, that it gives what the module gives.

That is why no list of architectures is kept: what computes something else is found out here, and left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core import ConfigError

# The largest difference allowed, as a share of the largest number: the rounding of the dtype, some times over.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ROWS = 5


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest number; infinite where shapes differ or numbers are lost."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    scale = float(theirs.abs().max().clamp_min(1e-6))
    return float((ours.float() - theirs.float()).abs().max()) / scale


def sample(width: int, like: nn.Module, seed: int = 0) -> Tensor:
    """Random activations [1, ROWS, width] of the dtype that `like` has its weights in."""
    weight = next(like.parameters(), None)
    dtype = torch.float32 if weight is None else weight.dtype
    made = torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


@torch.no_grad()
def disproof(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], object], x: Tensor) -> str:
    """Why `ours` may not stand for `theirs`, "" when it may: both are given `x`."""
    try:
        expected = theirs(x)
    except Exception as error:  # a module that wants other arguments than a tensor
        return f"it does not take one tensor ({type(error).__name__})"
    if not isinstance(expected, Tensor):
        return "it returns more than one tensor"
    try:
        distance = apart(ours(x), expected)
    except (RuntimeError, ValueError, ConfigError) as error:
        return f"our kernel refuses it: {str(error).splitlines()[0][:100]}"
    bound = BOUNDS.get(x.dtype, 0.0)
    return "" if distance <= bound else f"it computes something else (a difference of {distance:.1e})"
