"""Triton's interpreter, made faithful to a device where it is not. Import this before any module with a Triton kernel.

- A product adds k in increasing order for each output by itself, as tensor cores do; numpy's leaves the order to a
  library that looks at the whole shape. Without this no test of equal bits could mean anything.
- bf16 rounds to the nearest, ties to even (Triton 3.6 truncates, and may lose a carry), and products of bf16 are of
  its numbers (Triton 3.6 multiplies their bit patterns).
- A fused multiply-add rounds once.
- The language is patched once a launch, not once for each function that a kernel calls, which is most of the time.
- Loops over a tensor's number work with numpy 2.4, which no longer takes an array of one number for an int.
"""

from __future__ import annotations

import os
from typing import ClassVar

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("there is a device: `make test-gpu` runs the kernels on it", allow_module_level=True)
assert os.environ.get("TRITON_INTERPRET") == "1", "tests/conftest.py says so before anybody imports Triton"

interpreter = pytest.importorskip("triton.runtime.interpreter")
tl = interpreter.tl

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang


def numbers(handle):
    """A handle's numbers; bf16 as fp32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def bf16(x):
    """The nearest bf16 of fp32 numbers, as bit patterns."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def cast(self, src, dst_type, *_):
    target = dst_type.scalar
    data = numbers(src)
    if target == tl.bfloat16:
        return Handle(src.data if src.dtype.scalar == target else bf16(data.astype(np.float32)), target)
    with np.errstate(over="ignore", invalid="ignore"):
        return Handle(data.astype(interpreter._get_np_dtype(dst_type)), target)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = (numbers(x).astype(d.data.dtype) for x in (a, b))
    total = np.zeros_like(d.data)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, k]
    return Handle(total + d.data, d.dtype.scalar)


def fma(self, x, y, z):
    return Handle((x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)


def patch_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class Patches:
    """What is patched while a launch is under way: modules of the language, each once."""

    modules: ClassVar[set[str]] = set()
    scopes: ClassVar[list] = []

    def restore(self):
        """What a launch does at its end; functions that its kernel calls restore nothing."""
        while self.scopes:
            self.scopes.pop().restore()
        self.modules.clear()


def patch_language(function):
    languages = {value.__name__ for value in function.__globals__.values() if value in (tl, tl.core)}
    if not languages <= Patches.modules:
        Patches.scopes.append(_patch_language(function))
        Patches.modules |= languages
    return Patches()


Builder.cast_impl = cast
Builder.create_fp_to_fp = cast
Builder.create_dot = dot
Builder.create_fma = fma
interpreter._patch_lang_tensor = patch_tensor
interpreter._patch_lang = patch_language
