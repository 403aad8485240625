"""Kernel: what serves an op from outside, joined to autograd.

call ─▶ fixed arguments as declared? ─no─▶ the reference
     ─▶ no gradient wanted ─▶ body.forward
     ─▶ gradient wanted ─▶ body.forward, inputs and outputs kept ─▶ body.backward, or autograd of the reference
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core import ConfigError
from .op import Bits, Needs, Op, unwatched

log = logging.getLogger("twofold.kernels")


class Unusable(Exception):
    """A body found out, when it ran, that it cannot run on this machine."""


class Body(Protocol):
    """The kernel itself; arguments are whole, in the order of the reference's parameters."""

    def prepare(self) -> str:
        """Make it ready to run, once; what is lacking, "" when it is ready."""
        ...

    def forward(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]: ...

    def backward(
        self, args: tuple[Any, ...], outs: tuple[Tensor, ...], grads: tuple[Tensor, ...], wanted: Sequence[str]
    ) -> Mapping[str, Tensor | None] | None:
        """Gradients by the parameters' names; None leaves them to the reference."""
        ...


class Kernel:
    """A body registered as an implementation of an op; `fixed` arguments have the one value it was written for.

    Raises:
        ConfigError: the name is taken, or a fixed argument is none of the op's.
    """

    def __init__(
        self,
        op: Op[..., Any],
        name: str,
        body: Body,
        *,
        why: str,
        needs: Needs,
        bits: Bits = "own",
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.op, self.name, self.body, self.why = op, name, body, why
        self.names, self.fixed = op.reader.names, dict(fixed or {})
        self._lock = threading.Lock()
        self._lacks: str | None = None
        for given in self.fixed:
            if given not in self.names:
                raise ConfigError(f"{op.name} has no parameter '{given}': it has {', '.join(self.names)}")
        op.on(name, why=why, missing=self.missing, needs=needs, bits=bits)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self.names):
            args = self.op.reader.whole(args, kwargs)
        if self.missing() or any(args[self.names.index(name)] != value for name, value in self.fixed.items()):
            return self.op.reference(*args)
        try:
            if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                outs: tuple[Tensor, ...] = _Joined.apply(self, *args)
            else:
                outs = self.body.forward(args)
        except Unusable as error:
            self.lose(str(error))
            return self.op.reference(*args)
        return outs[0] if len(outs) == 1 else outs

    def missing(self) -> str:
        """What this machine lacks to run it, "" when nothing. Builds at the first call, and tells of a failure once."""
        if self._lacks is None:
            with self._lock:
                if self._lacks is None:
                    self.lose(self.body.prepare())
        return self._lacks or ""

    def lose(self, lacks: str) -> None:
        """From now on the reference serves, unless nothing is lacking."""
        self._lacks = lacks
        if lacks:
            log.warning(
                "%s: kernel '%s' is not used: %s. The reference in torch serves instead; lost: %s",
                self.op.name,
                self.name,
                lacks,
                self.why,
            )


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *args: Any) -> tuple[Tensor, ...]:
        outs = kernel.body.forward(args)
        ctx.kernel, ctx.count = kernel, len(outs)
        ctx.plain = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.tensor_at = [at for at, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[at] for at in ctx.tensor_at), *outs)
        ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernel: Kernel = ctx.kernel
        args, saved = list(ctx.plain), ctx.saved_tensors
        for at, tensor in zip(ctx.tensor_at, saved, strict=False):
            args[at] = tensor
        outs = saved[len(ctx.tensor_at) :]
        wanted = [at for at in ctx.tensor_at if ctx.needs_input_grad[at + 1]]
        names = [kernel.names[at] for at in wanted]
        try:
            found = kernel.body.backward(tuple(args), outs, grads, names)
        except Unusable as error:
            kernel.lose(str(error))
            found = None
        if found is None:
            found = through_reference(kernel.op, args, grads, wanted)
        return None, *(found.get(name) if name in names else None for name in kernel.names)


def through_reference(
    op: Op[..., Any], args: Sequence[Any], grads: Sequence[Tensor], wanted: Sequence[int]
) -> dict[str, Tensor | None]:
    """The gradients of the arguments at places `wanted`, by autograd of the op's reference, by parameter name."""
    leaves = [
        arg.detach().requires_grad_(at in wanted) if isinstance(arg, Tensor) else arg for at, arg in enumerate(args)
    ]
    with torch.enable_grad(), unwatched():
        outs = op.reference(*leaves)
    pairs = [(out, grad) for out, grad in zip(listed(outs), grads, strict=True) if out.requires_grad]
    names = [op.reader.names[at] for at in wanted]
    if not pairs:
        return dict.fromkeys(names)
    found = torch.autograd.grad(
        [out for out, _ in pairs], [leaves[at] for at in wanted], [grad for _, grad in pairs], allow_unused=True
    )
    return dict(zip(names, found, strict=True))


def listed(outs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return (outs,) if isinstance(outs, Tensor) else tuple(outs)
