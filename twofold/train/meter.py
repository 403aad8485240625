"""What the progress line says of the machine: the share of its matmul peak that the model reaches, and memory.

The model's work is counted from the spec: forward products and attention pairs, and twice as many for backward, once
where the weights are frozen beside adapters. What
is computed again to save memory is no part of it, so recomputation lowers the share (the "model FLOPs utilization" of
PaLM, Chowdhery et al. 2022). The peak is the best of torch's product and ours, measured once a machine and kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..core import TwofoldError
from ..kernels.build import cache_folder
from ..kernels.flops import pairs
from ..kernels.linear import linear
from ..models.lora import loras
from ..models.spec import Ffn, Gated, Mixture, ModelSpec, Plain
from ..platforms.instructions import processor_name

SECONDS = 0.3
"""How long the peak is measured for, when it is not known."""


class Meter:
    """For one model on one device, with `peak` FLOP/s to reach."""

    def __init__(self, spec: ModelSpec, device: torch.device, peak: float, passes: int = 3) -> None:
        self.spec, self.device, self.peak, self.passes = spec, device, peak, passes

    @classmethod
    def of(cls, spec: ModelSpec, decoder: nn.Module) -> Meter:
        """For a model with `spec`, of which `decoder` is all or this rank's part."""
        weight = next(decoder.parameters())
        compute = torch.float32 if weight.device.type == "cpu" else weight.dtype
        return cls(spec, weight.device, matmul_peak(weight.device, compute), passes(bool(loras(decoder))))

    def work(self, lengths: Sequence[int], targets: int) -> int:
        """FLOPs of a step that reads sequences of `lengths`, of whose tokens `targets` are predicted."""
        return self.passes * forward_flops(self.spec, lengths, targets)

    def figures(self, flops_per_second: float) -> dict[str, Any]:
        """`peak_share` of one process, 1 when the peak is reached, and `memory` in bytes, by the journal's names."""
        return {"peak_share": round(flops_per_second / self.peak, 4), "memory": self.memory()}

    def memory(self) -> int:
        """The most bytes that were allocated on the device, or what is resident of this process."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return int(psutil.Process().memory_info().rss)


def passes(frozen: bool) -> int:
    """How many times the forward pass's work a step is: without gradients of weights backward is as much again."""
    return 2 if frozen else 3


def forward_flops(spec: ModelSpec, lengths: Sequence[int], targets: int) -> int:
    """FLOPs of products and attention in one forward pass, the head's for the targets alone."""
    tokens, width = sum(lengths), spec.embedding.project or spec.hidden
    once: dict[int | None, int] = {}
    total = 2 * targets * spec.vocab * width
    if spec.embedding.project:
        total += 2 * (tokens + targets) * width * spec.hidden
    for layer in spec.layers:
        mixer = layer.mixer
        weights = 2 * spec.hidden * (mixer.q_width + mixer.kv_width) + feed_forward(layer.ffn, spec.hidden)
        seen = once.setdefault(mixer.window, pairs(lengths, mixer.window))
        total += 2 * tokens * weights + 4 * mixer.q_width * seen
    return total


def feed_forward(ffn: Ffn, hidden: int) -> int:
    """Weights that one token is multiplied by."""
    match ffn:
        case Gated(width=width):
            return 3 * hidden * width
        case Plain(width=width):
            return 2 * hidden * width
        case Mixture() as mixture:
            shared = (3 * mixture.shared_width + 1) * hidden if mixture.shared_width else 0
            return (mixture.experts + 3 * mixture.top_k * mixture.width) * hidden + shared


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product here with this many threads, from the user's cache or measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    key = f"{name}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"
    place = _cache()
    known = _read(place)
    if key not in known:
        known[key] = measure(device, dtype)
        if place is not None:
            with contextlib.suppress(OSError):
                fresh = place.with_suffix(f".{os.getpid()}")
                fresh.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                os.replace(fresh, place)
    return known[key]


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """FLOP/s of the best of torch's product and ours, square and large enough."""
    size = 4096 if device.type == "cuda" else 768
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return (
        2
        * size**3
        / min(_fastest(lambda: a @ b, device, seconds / 2), _fastest(lambda: linear(a, b), device, seconds / 2))
    )


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, best = time.perf_counter() + seconds, once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def _cache() -> Path | None:
    try:
        return cache_folder() / "matmul.json"
    except (TwofoldError, OSError):
        return None


def _read(place: Path | None) -> dict[str, float]:
    try:
        found = json.loads(place.read_text(encoding="utf-8")) if place is not None else {}
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float) and value > 0}
