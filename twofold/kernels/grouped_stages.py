"""The stages of grouped products and of a mixture of experts, as ctypes; the rest is in `stages.py`, the picture in
`cpu/grouped.cpp` and `cpu/experts.cpp`.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from .stages import Panels, Rounded


class Route(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("renormalise", c_int32),
        ("unused", c_int32),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("bias", c_void_p),
        ("weights", c_void_p),
        ("chosen", c_void_p),
    )


class Deal(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("groups", c_int32),
        ("choices", c_int32),
        ("chosen", c_void_p),
        ("first", c_void_p),
        ("row", c_void_p),
        ("pair", c_void_p),
        ("places", c_void_p),
    )


class Matrix(Structure):
    """One of the matrices of Grouped."""

    _fields_ = (
        ("w", c_void_p),
        ("stride", c_int64),
        ("n", c_int32),
        ("k", c_int32),
        ("type", c_int32),
        ("scale", c_float),
        ("a_at", c_int32),
        ("out_at", c_int32),
        ("panels", Panels),
    )


class Grouped(Structure):
    _fields_ = (
        ("groups", c_int32),
        ("act", c_int32),
        ("gated", c_int32),
        ("add", c_int32),
        ("parts", c_int32),
        ("unused", c_int32),
        ("matrices", c_void_p),
        ("first", c_void_p),
        ("from_", c_void_p),
        ("to", c_void_p),
        ("rounded", Rounded),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Combine(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("choices", c_int32),
        ("width", c_int32),
        ("places", c_void_p),
        ("pair", c_void_p),
        ("weights", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class Gate(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("unused", c_int32),
        ("gate", c_void_p),
        ("gate_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )
