"""Whether Triton can serve tensors on this machine's accelerator. Imports neither Triton nor a kernel."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

SPAN = 512
"""Keys that attention folds by themselves, and at whose multiples a decode may be split."""

LEAST = (8, 0)
"""The compute capability from which tensor cores take bf16 (Ampere)."""


@cache
def missing() -> str:
    """ "" when CUDA tensors can be served by Triton here, else what this machine lacks."""
    if not torch.cuda.is_available():
        return "a CUDA device"
    have = torch.cuda.get_device_capability()
    if have < LEAST:
        return f"compute capability {LEAST[0]}.{LEAST[1]} (this device has {have[0]}.{have[1]})"
    if importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    return ""
