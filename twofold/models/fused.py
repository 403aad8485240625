"""The decoder's forward on CUDA with fewer passes over memory: the same bits as `Decoder.forward`, layer by layer.

    Decoder.forward    x + attention ─▶ write, read ─▶ norm           q, k ─▶ turn, write, read ─▶ cache
    here               x + attention and norm in one pass             k is turned on its way into the cache

Layers of the Pre kind are run so; the others run as they are.

Shapes: T tokens, D hidden size, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kernels.attention import Attend
from .context import AttnContext
from .decoder import AnglesOf, Decoder, Layer
from .spec import Pre, Rope
from .tensors import Normalise


class FusedContext(AttnContext, Protocol):
    """An AttnContext that can turn queries and keys itself."""

    def turn_and_attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        how: Attend,
        angles: tuple[Tensor, Tensor],
        interleaved: bool,
    ) -> Tensor: ...


def forward(decoder: Decoder, ids_T: Tensor, ctx: FusedContext) -> Tensor:
    """Token ids [T] to the last layer's hidden states [T, D], final norm applied."""
    x_TD = decoder.embedded(ids_T, ctx.positions_T)
    angles = {rope: make(ctx.positions_T) for rope, make in decoder.angles.items()}
    due: tuple[Tensor, float] | None = None  # what is still to be added to x, times what
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        if isinstance(layer.spec.norms, Pre):
            x_TD, first = add_and_norm(layer.norm1, x_TD, due)
            x_TD, second = add_and_norm(layer.norm2, x_TD, (_attention(layer, first, ctx, angles), layer.spec.residual))
            due = layer.ffn(second, ctx), layer.spec.residual
        else:
            x_TD = layer(x_TD if due is None else _add(x_TD, *due), ctx, angles)
            due = None
    if not decoder.spec.norm:
        return x_TD if due is None else _add(x_TD, *due)
    return add_and_norm(decoder.norm, x_TD, due)[1]


def add_and_norm(norm: Normalise, x_TD: Tensor, due: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor]:
    """x with what is due added, and its norm."""
    if due is None:
        return x_TD, norm(x_TD)
    from ..kernels.triton.norm import add_layer_norm, add_rms_norm

    part, scale = due
    if norm.spec.kind == "rms":
        y, total = add_rms_norm(part, x_TD, norm.weight, norm.spec.eps, norm.spec.offset, scale)
    else:
        y, total = add_layer_norm(part, x_TD, norm.weight, norm.bias, norm.spec.eps, scale)
    return total, y


def _add(x_TD: Tensor, part: Tensor, scale: float) -> Tensor:
    return x_TD + (part if scale == 1.0 else part * scale)


def _attention(layer: Layer, x_TD: Tensor, ctx: FusedContext, angles: AnglesOf) -> Tensor:
    mixer = layer.spec.mixer
    q_THd, k_TKd, v_TKd = layer.projected(x_TD)
    if isinstance(mixer.position, Rope):
        turn, interleaved = angles[mixer.position], mixer.position.interleaved
        mixed_THd = ctx.turn_and_attend(layer.index, q_THd, k_TKd, v_TKd, layer.attend, turn, interleaved)
    else:
        mixed_THd = ctx.attend(layer.index, q_THd, k_TKd, v_TKd, layer.attend)
    out: Tensor = layer.out(mixed_THd.reshape(x_TD.shape[0], mixer.q_width))
    return out
