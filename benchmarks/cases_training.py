"""The cases of the ops that training calls beside those of serving: see cases.py.

Shapes: T tokens, D hidden, H query heads, K key-value heads, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nn
from case import Args, Case, Sizes, cases
from cases import HEAD, TABLE, D, F, H, K, V, attend, how, seen


@cases("packed_attention")
def packed_attention(sizes: Sizes) -> Iterator[Case]:
    tokens = sizes.prompt
    yield Case(
        label=f"train {tokens}",
        make=lambda: (*(torch.randn(tokens, heads, HEAD) for heads in (H, K, K)), [tokens], how()),
        moved=4 * tokens * HEAD * (2 * H + 2 * K),
        done=4 * seen([0], [tokens]) * H * HEAD,
        plain=functools.partial(attend, 1, tokens),
    )


@cases("token_logprobs")
def token_logprobs(sizes: Sizes) -> Iterator[Case]:
    tokens = sizes.prompt
    yield Case(
        label=f"train {tokens}, fp32",
        make=lambda: (torch.randn(tokens, D), torch.randn(TABLE, D), None, torch.zeros(tokens, dtype=torch.int64)),
        moved=4 * D * (TABLE + tokens),
        done=2 * tokens * TABLE * D,
        plain=lambda x, w, b, ids: nn.cross_entropy(nn.linear(x, w), ids, reduction="none"),
    )


@cases("logprobs_of")
def logprobs_of(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        label=f"{sizes.batch} rows",
        make=lambda: (torch.randn(sizes.batch, V), torch.zeros(sizes.batch, dtype=torch.int64)),
        moved=4 * sizes.batch * V,
    )


# ------------------------------------------------------------------------------------------------ the optimizer
LAYER = ((3 * D + D, D), (D, 2 * D), (2 * F, D), (D, F), (D,), (D,))
"""Shapes of one layer's parameters, near enough."""
STEP: dict[str, Any] = {"rate": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters() -> int:
    return sum(torch.Size(shape).numel() for shape in LAYER)


@cases("adamw")
def adamw(sizes: Sizes) -> Iterator[Case]:
    def make() -> Args:
        from twofold.kernels.optimizer import Shard

        def shard(shape: tuple[int, ...]) -> Any:
            weight, grad, mean = (torch.randn(shape) for _ in range(3))
            return Shard(weight, grad, (mean, torch.rand(shape)), 10, 0.1)

        return ([shard(shape) for shape in LAYER],)

    def fused(shards: Any, *, rate: float, betas: tuple[float, float], eps: float) -> None:
        columns = [list(column) for column in zip(*((it.weight, it.grad, *it.states) for it in shards))]
        steps = [torch.tensor(10.0) for _ in shards]
        settings = {"lr": rate, "beta1": betas[0], "beta2": betas[1], "weight_decay": 0.1, "eps": eps}
        torch._fused_adamw_(*columns, [], steps, amsgrad=False, maximize=False, **settings)

    yield Case(label="one layer", make=make, moved=28 * parameters(), keywords=STEP, plain=fused)


@cases("square_sums")
def square_sums(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        label="one layer",
        make=lambda: ([torch.randn(shape) for shape in LAYER],),
        moved=4 * parameters(),
        plain=torch.nn.utils.get_total_norm,
    )
