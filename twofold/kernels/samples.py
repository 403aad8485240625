"""Arguments of a typical size for each op, which `twofold kernels` measures with: a small model's layer, 64 tokens.

Imported by who measures, so that nobody else pays for it. Tensors are made on torch's default device.

Shapes: T tokens, D hidden, F width of the feed-forward, E experts, C experts of a token, H heads, d head size,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import activate, gated, soft_cap
from .attention import Attend, packed_attention
from .entropy import entropy_of, token_entropy
from .linear import linear
from .lora import Adapter, lora
from .loss import logprobs_of, token_logprobs
from .moe import experts, open_gate, route
from .norm import layer_norm, rms_norm
from .optimizer import Shard, adagrad, adam, adamw, lion, orthogonalised, sgd, square_sums
from .paged import Panels, Spans, keep, paged_attention
from .quantized import Logical, Packed, pack, quantize_rows, quantized_experts, quantized_linear, quantized_rows
from .rope import rotate
from .sample import Choice, choose, draw, score

T, D, F, E, C, H, d, V = 64, 1024, 3072, 8, 2, 16, 64, 8192


@linear.sample
def _linear() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(F, D)


@rms_norm.sample
def _rms_norm() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(D), 1e-6


@layer_norm.sample
def _layer_norm() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(D), torch.randn(D), 1e-5


@rotate.sample
def _rotate() -> tuple[Any, ...]:
    angle_TR = torch.randn(T, d // 2)
    return torch.randn(T, H, d), angle_TR.cos(), angle_TR.sin()


@activate.sample
def _activate() -> tuple[Any, ...]:
    return torch.randn(T, F), "gelu_tanh"


@gated.sample
def _gated() -> tuple[Any, ...]:
    return torch.randn(T, 2 * F), "silu"


@packed_attention.sample
def _packed_attention() -> tuple[Any, ...]:
    lengths = (300, 130, 82)
    keys = [torch.randn(sum(lengths), H // 2, d) for _ in range(2)]
    return torch.randn(sum(lengths), H, d), *keys, lengths, Attend(d**-0.5)


def _cache(sequences: int = 16, start: int = 500) -> tuple[Panels, Spans]:
    """Sequences of 500 tokens, each about to get one more, in blocks of 16."""
    each = -(-(start + 1) // 16)
    blocks = [range(number * each, (number + 1) * each) for number in range(sequences)]
    panels = Panels.zeros(sequences * each, H // 2, 16, d)
    return panels, Spans([(start, 1, kept) for kept in blocks], panels.size)


@keep.sample
def _keep() -> tuple[Any, ...]:
    return torch.randn(16, H // 2, d), torch.randn(16, H // 2, d), *_cache()


@paged_attention.sample
def _paged_attention() -> tuple[Any, ...]:
    return torch.randn(16, H, d), *_cache(), Attend(d**-0.5)


@soft_cap.sample
def _soft_cap() -> tuple[Any, ...]:
    return torch.randn(T, F), 30.0


@route.sample
def _route() -> tuple[Any, ...]:
    return torch.randn(T, E), C, True


def _routed() -> tuple[Tensor, Tensor]:
    return torch.rand(T, C), (torch.arange(T)[:, None] + torch.arange(C)) % E


@experts.sample
def _experts() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(E, F, D), torch.randn(E, D, F // 2), *_routed(), "silu"


@open_gate.sample
def _open_gate() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(T, D), torch.randn(T, 1)


@lora.sample
def _lora() -> tuple[Any, ...]:
    adapters = [Adapter(torch.randn(rank, D), torch.randn(F, rank)) for rank in (8, 16, 16, 64)]
    return torch.randn(T, D), torch.randn(T, F), adapters, torch.arange(T) % (len(adapters) + 1) - 1


@token_logprobs.sample
def _token_logprobs() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(V, D) * 0.1, None, torch.randint(0, V, (T,))


@logprobs_of.sample
def _logprobs_of() -> tuple[Any, ...]:
    return torch.randn(T, V), torch.randint(0, V, (T,))


@token_entropy.sample
def _token_entropy() -> tuple[Any, ...]:
    return torch.randn(T, D), torch.randn(V, D) * 0.1, None


@entropy_of.sample
def _entropy_of() -> tuple[Any, ...]:
    return (torch.randn(T, V),)


def _shards(states: int) -> list[Shard]:
    def shard() -> Shard:
        weight, grad, *kept = (torch.rand(F, D) for _ in range(2 + states))
        return Shard(weight, grad, tuple(kept), steps=3, decay=0.1)

    return [shard(), shard()]


@adamw.sample
@adam.sample
def _adam() -> tuple[Any, ...]:
    return _shards(2), 1e-3, (0.9, 0.95), 1e-8


@sgd.sample
def _sgd() -> tuple[Any, ...]:
    return _shards(1), 1e-3, 0.9, True


@lion.sample
def _lion() -> tuple[Any, ...]:
    return _shards(1), 1e-4, (0.9, 0.99)


@adagrad.sample
def _adagrad() -> tuple[Any, ...]:
    return _shards(1), 1e-2, 1e-10


@orthogonalised.sample
def _orthogonalised() -> tuple[Any, ...]:
    return (torch.randn(D, D),)


@square_sums.sample
def _square_sums() -> tuple[Any, ...]:
    return ([torch.randn(F, D) for _ in range(2)],)


@draw.sample
def _draw() -> tuple[Any, ...]:
    return torch.randn(16, V), [Choice(temperature=0.8, top_k=40, top_p=0.9, u=0.3)] * 16


@choose.sample
def _choose() -> tuple[Any, ...]:
    usual = [Choice(temperature=0.7, top_p=0.9, top_k=50, u=row / 16) for row in range(16)]
    return torch.randn(16, 32_000) * 3, usual


@score.sample
def _score() -> tuple[Any, ...]:
    return torch.randn(16, 32_000) * 3, list(range(16)), 5


def _packed(*shape: int) -> Packed:
    """An int8 weight of random codes, one scale for 64 inputs."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    return pack(Logical(codes, torch.full((*shape[:-1], shape[-1] // 64), 0.01), None), 64, True)


@quantize_rows.sample
def _quantize_rows() -> tuple[Any, ...]:
    return torch.randn(T, D), 64


@quantized_linear.sample
def _quantized_linear() -> tuple[Any, ...]:
    return torch.randn(T, D), _packed(F, D)


@quantized_rows.sample
def _quantized_rows() -> tuple[Any, ...]:
    return torch.arange(T) * 7, _packed(F, D)


@quantized_experts.sample
def _quantized_experts() -> tuple[Any, ...]:
    return torch.randn(T, D), _packed(E, F, D), _packed(E, D, F // 2), *_routed(), "silu"
