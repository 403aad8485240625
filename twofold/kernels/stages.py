"""The stages that the CPU kernels know, as ctypes: the same structs as `cpu/stages.h`, field by field.

A stage holds addresses; whoever writes one keeps the tensors behind them alive for as long as it may run. Each struct
has its namesake in the library, `tf_run_<name>`, and the two are held to one size at the first use.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor


class Type(IntEnum):
    FP32 = 0
    BF16 = 1
    INT8 = 2
    FP16 = 3
    FP8 = 4


TYPES = {
    torch.float32: Type.FP32,
    torch.bfloat16: Type.BF16,
    torch.int8: Type.INT8,
    torch.float16: Type.FP16,
    torch.float8_e4m3fn: Type.FP8,
}
ACTS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "gelu_quick": 4, "relu": 5, "relu2": 6, "sigmoid": 7}


class Numbers(Structure):
    """A row of weights in the type they are kept in; empty when there is none."""

    _fields_ = (("at", c_void_p), ("type", c_int32), ("unused", c_int32))


class Step(Structure):
    """One step's tokens: spans of sequences, end to end on the token axis."""

    _fields_ = (
        ("tokens", c_int32),
        ("spans", c_int32),
        ("wanted", c_int32),
        ("table_stride", c_int32),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("first", c_void_p),
        ("start", c_void_p),
        ("table", c_void_p),
        ("rows", c_void_p),
        ("kinds", c_void_p),
    )


class Embed(Structure):
    _fields_ = (
        ("step", POINTER(Step)),
        ("table", Numbers),
        ("places", Numbers),
        ("kinds", Numbers),
        ("width", c_int32),
        ("offset", c_int32),
        ("scale", c_float),
        ("unused", c_int32),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Norm(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("groups", c_int32),
        ("width", c_int32),
        ("kind", c_int32),
        ("offset", c_int32),
        ("per_group", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("unused", c_int32),
        ("weight", Numbers),
        ("bias", Numbers),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Add(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("scale", c_float),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("z", c_void_p),
        ("z_stride", c_int64),
    )


class Pointwise(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("act", c_int32),
        ("gated", c_int32),
        ("unused", c_int32),
        ("clip", c_float),
        ("multiplier", c_float),
        ("softcap", c_float),
        ("unused_too", c_float),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Gather(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("index", c_void_p),
        ("width", c_int32),
        ("unused", c_int32),
        ("source", c_void_p),
        ("source_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Reorder(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("order", c_void_p),
        ("width", c_int32),
        ("unused", c_int32),
        ("source", c_void_p),
        ("source_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Finite(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("unused", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("out", c_void_p),
    )


class Linear(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("type", c_int32),
        ("act", c_int32),
        ("gated", c_int32),
        ("unused", c_int32),
        ("w", c_void_p),
        ("w_stride", c_int64),
        ("bias", Numbers),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Cache(Structure):
    """One layer's keys and values in panels; see `cpu/stages.h`."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("type", c_int32),
        ("size", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
    )


class Heads(Structure):
    _fields_ = (
        ("step", POINTER(Step)),
        ("cache", Cache),
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("heads", c_int32),
        ("pairs", c_int32),
        ("interleaved", c_int32),
        ("norm", c_int32),
        ("offset", c_int32),
        ("per_head", c_int32),
        ("eps", c_float),
        ("clip", c_float),
        ("q_weight", Numbers),
        ("k_weight", Numbers),
        ("q_bias", Numbers),
        ("k_bias", Numbers),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Sparse(Structure):
    """A layout's bits; see `blocksparse.py`. All zero: every block is there."""

    _fields_ = (
        ("bits", c_void_p),
        ("pattern", c_void_p),
        ("block", c_int32),
        ("rows", c_int32),
        ("stride", c_int32),
        ("unused", c_int32),
    )


class Attention(Structure):
    _fields_ = (
        ("step", POINTER(Step)),
        ("cache", Cache),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("heads", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
        ("lse", c_void_p),
        ("sparse", Sparse),
        ("ahead", c_int32),
        ("unused", c_int32),
    )


class AttentionBackward(Structure):
    _fields_ = (
        ("step", POINTER(Step)),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("slopes", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("grad", c_void_p),
        ("lse", c_void_p),
        ("dq", c_void_p),
        ("dk", c_void_p),
        ("dv", c_void_p),
        ("sparse", Sparse),
        ("ahead", c_int32),
        ("unused", c_int32),
    )


class Panels(Structure):
    """A quantized weight in panels of sixteen outputs; see `quantized.py`."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", Numbers),
        ("zeros", c_void_p),
        ("offsets", c_void_p),
        ("bits", c_int32),
        ("group", c_int32),
        ("inputs", c_int32),
        ("groups", c_int32),
        ("floats", c_int32),
        ("unused", c_int32),
    )


class Rounded(Structure):
    """Activations rounded to int8 by row and group, codes, a scale and a sum for each."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("stride", c_int32),
        ("groups", c_int32),
    )


class Quantize(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("k", c_int32),
        ("group", c_int32),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("out", Rounded),
    )


class QuantizedLinear(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("act", c_int32),
        ("gated", c_int32),
        ("w", Panels),
        ("bias", Numbers),
        ("rounded", Rounded),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class QuantizedEmbed(Structure):
    _fields_ = (
        ("step", POINTER(Step)),
        ("table", Panels),
        ("places", Numbers),
        ("width", c_int32),
        ("offset", c_int32),
        ("scale", c_float),
        ("unused", c_int32),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Stage(Structure):
    """One stage of a program: the kernel's address, and that of its arguments."""

    _fields_ = (("run", c_void_p), ("args", c_void_p))


def program(*stages: Structure) -> tuple[Structure, ...]:
    """Stages in their order, for `Library.run`; whoever keeps a bound program keeps `stages` alive too."""
    return stages


def numbers(x: Tensor | None) -> Numbers:
    """A contiguous tensor as Numbers."""
    return Numbers() if x is None else Numbers(x.data_ptr(), TYPES[x.dtype], 0)
