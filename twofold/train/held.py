"""How much a layer holds between its forward and its backward pass, from its spec and policy alone: a forecast.

    Pre, none                                 selective        attention   ffn        full
    x   n1   qkv   q k turned   out  lse      x qkv out lse    x           x n1 qkv   x
    x'  n2   gate up   gated                  x' gate up       x' n2       x'         .
                                                               gate up     q k out    .
                                                               gated       lse        .

Numbers are counted as the CPU kernels keep them: 4 bytes each, activations being fp32 whatever the weights are. For a
GPT layer of h inputs, a heads and s tokens, Korthikanti et al. 2022 count s·h·(34 + 5·a·s/h) bytes in fp16 with dropout
and the scores kept; ours keeps no scores, and nothing of a norm or an activation but its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..models.spec import (
    Attention,
    Ffn,
    Gated,
    LayerSpec,
    Mixture,
    ModelSpec,
    Parallel,
    Plain,
    PostResidual,
    Pre,
    Rope,
    Sandwich,
)
from .policies import Policy

BYTES = 4


class Half(NamedTuple):
    """Numbers of one token in attention or the feed-forward: of products and attention, and what is cheaply made."""

    dear: int
    cheap: int


def layer_numbers(layer: LayerSpec, hidden: int, policy: Policy) -> int:
    """Numbers that one token holds in this layer, its input counted, its output not."""
    stream, between, norms = _stream(layer)
    attention, ffn = _attention(layer.mixer), _feed_forward(layer.ffn, hidden)
    if policy == "full":
        return hidden
    if policy == "selective":
        return stream * hidden + attention.dear + ffn.dear
    total = (stream + between) * hidden
    if policy != "attention":
        total += norms * hidden + sum(attention)
    if policy != "ffn":
        total += norms * hidden + sum(ffn)
    return total


def held_bytes(spec: ModelSpec, policies: Sequence[Policy], tokens: int) -> int:
    """Bytes that the layers hold for `tokens` tokens, each by its policy."""
    numbers = (layer_numbers(layer, spec.hidden, own) for layer, own in zip(spec.layers, policies, strict=True))
    return BYTES * tokens * sum(numbers)


def gpt_bytes(hidden: int, heads: int, tokens: int, selective: bool = False) -> int:
    """Korthikanti et al. 2022, equation 2: bytes of one GPT layer in fp16 with dropout, one sequence of `tokens`."""
    scores = 0 if selective else 5 * heads * tokens // hidden
    return tokens * hidden * (34 + scores)


def _stream(layer: LayerSpec) -> tuple[int, int, int]:
    """Hidden states that are sums or read by a norm behind a half; norms outside of both halves; norms inside each."""
    match layer.norms:
        case Pre():
            return 2, 0, 1
        case Parallel(shared=shared):
            return (1, 1, 0) if shared else (1, 0, 1)
        case Sandwich():
            return 4, 0, 1
        case PostResidual():
            return 3, 1, 0
        case _:  # PostOutput
            return 4, 0, 0


def _attention(mixer: Attention) -> Half:
    product = mixer.q_width + 2 * mixer.kv_width
    product *= 2 if mixer.clip_qkv is not None else 1
    own = isinstance(mixer.position, Rope) or mixer.qk_norm is not None  # else views of the product
    return Half(product + mixer.q_width + mixer.heads, mixer.q_width + mixer.kv_width if own else 0)


def _feed_forward(ffn: Ffn, hidden: int) -> Half:
    match ffn:
        case Gated(width=width):
            return Half(2 * width, width)
        case Plain(width=width):
            return Half(width, width)
        case Mixture() as mixture:
            routing = mixture.experts + 3 * mixture.top_k  # logits, weights, and choices of 8 bytes
            shared = mixture.shared_width or 0
            return Half(routing + 2 * shared + (2 * hidden + 1 if shared else 0), shared)
