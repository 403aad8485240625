"""Compile every Triton kernel for a device that is not there, and print one JSON line for each that was made.

    python triton_compiler.py CAPABILITY        90 for Hopper, 80 for Ampere

Triton's compiler, and NVIDIA's assembler beside it, need no driver: a driver that only says which device is meant is
enough, and a launch ends where the binary would be loaded. Tensors lie on the CPU; only types and alignment count.
"""

from __future__ import annotations

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from twofold.core.sparse import Local
from twofold.kernels.attention import Attend
from twofold.kernels.blocksparse import Sparse
from twofold.kernels.sample import Choice
from twofold.kernels.triton import activation, attention, experts, linear, norm, quantize, rope, sampling, tiles
from twofold.quant import named

CAPABILITY = int(sys.argv[1])
HALF = torch.bfloat16


class Absent:
    """The driver of a device that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launch = JITFunction.run
made: set[int] = set()


def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    if id(kernel) not in made:
        made.add(id(kernel))
        text = kernel.asm["ptx"]
        print(
            json.dumps(
                {
                    "kernel": self.fn.__name__,
                    "shared": kernel.metadata.shared,
                    "binary": len(kernel.asm["cubin"]),
                    "products": sorted(set(re.findall(r"(wgmma|mma)\S*\.(?:m\d+n\d+k16)\S*", text))),
                    "widest_copy": max(
                        map(int, re.findall(r"cp\.async\.c\S* \[[^]]*\], \[[^]]*\], 0x(\d+)", text)), default=0
                    ),
                }
            )
        )
    return kernel


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def everything() -> None:
    x, w = empty(300, 1024), empty(2048, 1024)
    for rows in (1, 40, 300):
        linear.linear(x[:rows], w)
    linear.linear(x.float(), w, w[:, 0].contiguous())
    for name in ("int8", "int4", "int4-g128-asym-weight-only"):
        packed = named(name).empty(256, 1024)
        linear.quantized_linear(x, packed)
        quantize.quantized_rows(empty(4, dtype=torch.int64), packed)
    experts.route(empty(8, 16, dtype=torch.float32), 4, True, empty(16, dtype=torch.float32))
    weights, chosen = (x.zero_() for x in experts.route(empty(8, 16, dtype=torch.float32), 4, True))
    experts.experts(empty(8, 64), empty(16, 256, 64), empty(16, 64, 128), weights, chosen, "silu")
    norm.rms_norm(x, w[0], 1e-5)
    norm.add_layer_norm(x, x, w[0], w[1], 1e-5, 0.5)
    for act in ("gelu", "gelu_tanh"):
        activation.gated(x, act)
    q, k, angles = empty(64, 8, 128), empty(64, 2, 128), empty(64, 64, dtype=torch.float32)
    rope.rotate(q, angles, angles)
    cache, codes, scales = (
        empty(9, 2, 16, 128),
        empty(9, 2, 16, 128, dtype=torch.int8),
        empty(9, 2, 16, dtype=torch.float32),
    )
    rope.keep(k, cache, empty(64, dtype=torch.int64), None, (angles, angles), True)
    rope.keep(k, codes, empty(64, dtype=torch.int64), scales)
    how = Attend(0.1, window=300, softcap=30.0, slopes=(0.1,) * 8)
    attention.packed_attention(q, k, k, (64,), Attend(0.1))
    attention.packed_attention(q, k, k, (64,), Attend(0.1, sparse=Sparse(Local(), 8, 64)))
    queries = attention.Queries.of([(0, 40, 1)], 4, "cpu", 2048)
    table = empty(1, 9, dtype=torch.int32)
    attention.attend(q, attention.Keys(cache, cache, table), queries, how, q, empty(8, dtype=torch.float32))
    attention.attend(q, attention.Keys(codes, codes, table, scales, scales), queries, how, q)
    sampling.draw(empty(2, 32_000, dtype=torch.float32), [Choice(top_k=5, top_p=0.9)] * 2)


driver.set_active(Absent())
JITFunction.run = compile_only
tiles._alike = lambda *_: True  # what is narrower is compiled too
everything()
