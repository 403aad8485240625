"""The two products of a linear layer's backward, on the tiles of its forward.

torch's own products stand in where there is no library, for other dtypes and on other devices, and where threads are
few: MKL is some percent ahead on one, level on two, and a fifth behind on four of an AVX2 machine (docs/benchmarks.md).
Adding a weight's gradient to what is there is one pass here, and no second gradient is held beside it.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import native, stages

READ = (torch.float32, torch.bfloat16)
FEW_THREADS = 2


class Slopes(Structure):
    """out (+)= A b, where A lies as [rows, k], or stands as [k, rows]; b [k, n] (`cpu/linear_backward.cpp`)."""

    _fields_ = (
        ("rows", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("type", c_int32),
        ("standing", c_int32),
        ("add", c_int32),
        ("unused", c_int32),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


def input_slopes(grad_TN: Tensor, w_NK: Tensor, out_TK: Tensor | None = None, *, add: bool = False) -> Tensor:
    """grad · W [T, K] in the gradient's dtype; written, or added, to `out_TK` where that is given."""
    if not _fits(grad_TN, w_NK, out_TK) or torch.get_num_threads() <= FEW_THREADS:
        w_NK = w_NK.to(grad_TN.dtype)
        return out_TK.addmm_(grad_TN, w_NK) if add and out_TK is not None else _put(grad_TN @ w_NK, out_TK)
    return tiled(_lines(grad_TN), _lines(w_NK), out_TK, add=add)


def weight_slopes(grad_TN: Tensor, x_TK: Tensor, out_NK: Tensor | None = None, *, add: bool = False) -> Tensor:
    """gradᵀ · x [N, K] in the gradient's dtype; written, or added, to `out_NK` where that is given."""
    if not _fits(grad_TN, x_TK, out_NK) or (out_NK is None and torch.get_num_threads() <= FEW_THREADS):
        grad_NT, x_TK = grad_TN.t(), x_TK.to(grad_TN.dtype)
        return out_NK.addmm_(grad_NT, x_TK) if add and out_NK is not None else _put(grad_NT @ x_TK, out_NK)
    return tiled(_lines(grad_TN), _lines(x_TK), out_NK, standing=True, add=add)


def _put(found: Tensor, out: Tensor | None) -> Tensor:
    return found if out is None else out.copy_(found)


def _fits(grad: Tensor, b: Tensor, out: Tensor | None) -> bool:
    here = grad.device.type == "cpu" and grad.dtype == torch.float32 and b.dtype in READ
    fits = out is None or (out.dtype == torch.float32 and out.stride(-1) == 1)
    return here and fits and native.library() is not None


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def tiled(a: Tensor, b: Tensor, out: Tensor | None = None, *, standing: bool = False, add: bool = False) -> Tensor:
    """a · b, or aᵀ · b where it is `standing`, by the kernel: any number of threads, the same bits."""
    library = native.library()
    assert library is not None, "asked for only where it is there"
    rows = ctypes.c_int32(a.shape[1] if standing else a.shape[0])
    out = torch.empty(rows.value, b.shape[1]) if out is None else out
    slopes = Slopes(
        rows=ctypes.addressof(rows),
        n=b.shape[1],
        k=b.shape[0],
        type=stages.TYPES[b.dtype],
        standing=standing,
        add=add,
        b=b.data_ptr(),
        b_stride=b.stride(0),
        a=a.data_ptr(),
        a_stride=a.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )
    library.run([slopes], torch.get_num_threads())
    return out
