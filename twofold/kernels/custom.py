"""Kernels of your own: source that is compiled at first use, joined to autograd, and an implementation like any other.

    @op                                      the reference: the definition, the oracle, and what serves where the
    def swish(x_TD, beta): ...               kernel cannot be built

    cpp(swish, source=SOURCE, why="one pass over memory instead of three",
        forward=Entry("swish", In("x_TD"), Out("y_TD"), Int("T"), Int("D"), Float("beta")),
        backward=Entry("swish_back", In("x_TD"), In("grad_y_TD"), Out("grad_x_TD"), ...))

    print(check(swish))                      `check.py`: shapes, dtypes, strides, gradients against fp64

A backward entry may read inputs, outputs (`y_TD`) and the outputs' gradients (`grad_y_TD`), and writes the gradients of
inputs (`grad_x_TD`). Where it is not given, or an input's gradient is not among its outputs, autograd goes through the
reference. Nothing is compiled when a module is imported; a kernel that cannot be built is told of in one line.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .check import check
from .compiled import Compiled
from .entry import Entry, Float, In, Int, Out
from .joined import Kernel, Unusable, listed
from .op import Bits, Needs, Op

__all__ = ["Entry", "Float", "In", "Int", "Kernel", "Out", "check", "cpp", "cuda", "function", "triton"]

Backward = Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor | None]]


class Handed:
    """A kernel given as a Python function. `tolerant`: what its compiler refuses makes it unusable, not an error."""

    def __init__(
        self,
        op: Op[..., Any],
        run: Callable[..., Any],
        gradients: Backward | None,
        missing: Callable[[], str],
        tolerant: bool = False,
    ) -> None:
        self.run, self.gradients, self.prepare, self.tolerant = run, gradients, missing, tolerant
        self.tensors = op.reader.all_tensors

    def forward(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return listed(self._tried(self.run, *args))

    def backward(
        self, args: tuple[Any, ...], outs: tuple[Tensor, ...], grads: tuple[Tensor, ...], wanted: Sequence[str]
    ) -> Mapping[str, Tensor | None] | None:
        if self.gradients is None:
            return None
        found = self._tried(self.gradients, args, outs, grads)
        return dict(zip(self.tensors, listed(found), strict=True))

    def _tried(self, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:
            theirs = any(kind.__module__.split(".")[0] == "triton" for kind in type(error).__mro__)
            if not (self.tolerant and theirs):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise Unusable(f"Triton refused: {lines[-1].strip()[:300]}") from error


def cpp(
    op: Op[..., Any],
    *,
    source: str,
    forward: Entry,
    why: str,
    backward: Entry | None = None,
    name: str = "cpp",
    dtype: torch.dtype = torch.float32,
    instructions: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    bits: Bits = "own",
) -> Kernel:
    """Serve an op on the CPU by C++ functions with a C ABI, compiled at first use for this processor.

    Args:
        source: C++17; <cstdint> is included already. Floating-point contraction is off: write fma where you mean it.
        dtype: of every tensor that declares none; calls of another dtype are served by what else there is.
        instructions: what the processor must have, by the names of /proc/cpuinfo, e.g. "avx512f".
        fixed: values of parameters that the kernel is written for; calls with others go to the reference.
        why: what it gains, told where it is listed and where it is lost.

    Raises:
        ConfigError: the entries do not fit the reference's parameters or the source. A compiler that is not there, or
            refuses the source, is no error: one line tells, and the reference serves.
    """
    body = Compiled(
        op,
        source,
        forward,
        backward,
        dtype=dtype,
        device="cpu",
        fixed=tuple(fixed or ()),
        instructions=instructions,
        flags=flags,
    )
    return Kernel(op, name, body, why=why, needs=Needs(devices=("cpu",), dtypes=(dtype,)), bits=bits, fixed=fixed)


def cuda(
    op: Op[..., Any],
    *,
    source: str,
    forward: Entry,
    why: str,
    backward: Entry | None = None,
    name: str = "cuda",
    dtype: torch.dtype = torch.float32,
    flags: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    bits: Bits = "own",
) -> Kernel:
    """Serve an op on a CUDA device by functions that launch kernels, compiled by nvcc at first use for that device.

    As `cpp`, but pointers are the device's, and every function takes `void* stream` last: launch on that stream.
    """
    body = Compiled(op, source, forward, backward, dtype=dtype, device="cuda", fixed=tuple(fixed or ()), flags=flags)
    return Kernel(op, name, body, why=why, needs=Needs(devices=("cuda",), dtypes=(dtype,)), bits=bits, fixed=fixed)


def function(
    op: Op[..., Any],
    run: Callable[..., Any],
    *,
    why: str,
    name: str,
    backward: Backward | None = None,
    needs: Needs | None = None,
    missing: Callable[[], str] = lambda: "",
    fixed: Mapping[str, Any] | None = None,
    bits: Bits = "own",
) -> Kernel:
    """Serve an op by a Python function with the reference's parameters, whatever it launches.

    `backward(args, outs, grads)` gives a gradient, or None, for each tensor parameter in order; without it autograd
    goes through the reference. The function's own operations are not traced.
    """
    body = Handed(op, run, backward, missing)
    return Kernel(op, name, body, why=why, needs=needs or Needs(), bits=bits, fixed=fixed)


def triton(
    op: Op[..., Any],
    run: Callable[..., Any],
    *,
    why: str,
    name: str = "triton",
    backward: Backward | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    fixed: Mapping[str, Any] | None = None,
    bits: Bits = "own",
) -> Kernel:
    """Serve an op by a Python function that launches Triton kernels; Triton compiles and caches them by their content.

    With TRITON_INTERPRET=1 it serves CPU tensors too. What Triton refuses to compile is told of once, and the reference
    serves.
    """
    devices = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    body = Handed(op, run, backward, _no_triton, tolerant=True)
    needs = Needs(devices=devices, dtypes=dtypes)
    return Kernel(op, name, body, why=why, needs=needs, bits=bits, fixed=fixed)


def _no_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "Triton: pip install triton"
