"""Which ops Triton serves on CUDA. A kernel's module, and Triton with it, is imported at the op's first call.

Forward is the kernel; the gradient is that of a plain torch function, which is free of the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activation, attention, linear, moe, norm, quantized, rope, sample
from ..gradient import with_reference_gradient
from ..op import Needs, Op
from .available import missing

CUDA = Needs(devices=("cuda",))


def _serve(op: Op[..., Any], module: str, why: str, gradient: Callable[..., Tensor] | None = None) -> None:
    """Let module.<name of the op> serve CUDA tensors, before all that is registered so far."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kernel = getattr(import_module(f"{__package__}.{module}"), op.name)
        if gradient is None or not torch.is_grad_enabled():
            return kernel(*args, **kwargs)
        return with_reference_gradient(kernel, gradient, *op.reader.whole(args, kwargs))

    op.on("triton", why=why, needs=CUDA, missing=missing, bits="own")(run)
    op.implementations = {"triton": op.implementations.pop("triton"), **op.implementations}


def _route(logits_TE: Tensor, top_k: int, renormalise: bool, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    kernel: Callable[..., tuple[Tensor, Tensor]] = import_module(f"{__package__}.experts").route
    weights_TC, experts_TC = kernel(logits_TE.detach(), top_k, renormalise, bias_E)
    weights_TC = with_reference_gradient(lambda *_: weights_TC, moe.weights_of, logits_TE, experts_TC, renormalise)
    return weights_TC, experts_TC


_serve(linear.linear, "linear", "one tile for each shape of weights, so a row has one bit pattern", F.linear)
_serve(norm.rms_norm, "norm", "one pass over memory", norm.rms_norm.reference)
_serve(norm.layer_norm, "norm", "one pass over memory", norm.layer_norm.reference)
_serve(rope.rotate, "rope", "one pass over memory", rope.rotate.reference)
_serve(activation.activate, "activation", "one pass over memory", activation.activate.reference)
_serve(activation.gated, "activation", "one pass over memory", activation.gated.reference)
_serve(
    attention.packed_attention,
    "attention",
    "scores never leave the chip; the engine's own walk",
    attention.packed_attention.implementations["together"].run,
)
_serve(moe.experts, "experts", "every expert in two launches, and nothing waits for the device", moe.experts.reference)
_serve(quantized.quantized_linear, "linear", "codes are widened on the way to the tensor cores")
_serve(quantized.quantized_rows, "quantize", "one pass over memory")
_serve(quantized.quantize_rows, "quantize", "one launch")
_serve(quantized.quantized_experts, "experts", "every expert in two launches, from codes")
_serve(sample.draw, "sampling", "no sort, and nothing waits for the device")
moe.route.on("triton", why="no sort", needs=CUDA, missing=missing, bits="own")(_route)
moe.route.implementations = {"triton": moe.route.implementations.pop("triton"), **moe.route.implementations}
