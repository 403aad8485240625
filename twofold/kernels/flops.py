"""FLOPs of a call, exact and from shapes alone: a multiplication and an addition are two.

Matrix products and attention are counted; what passes over its numbers once (norms, activations, turns) is counted in
numbers instead, for there is no one way to count its operations. Attention counts the pairs of a query and a key that
it may look at: tiles that a kernel computes and then hides are its own affair.

    forward   linear 2·T·K·N   attention 4·H·d a pair   experts 6·T·C·D·F   log-probabilities 2·R·D·V
    backward  linear 2·T·K·N for each of x and w        attention 10·H·d, the scores being made again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .op import Op, watch


@dataclass(kw_only=True, slots=True)
class Count:
    """FLOPs of products and attention, and numbers that came out of all other ops."""

    forward: int = 0
    backward: int = 0
    again: int = 0
    """Forward products that were done once more, in a backward pass."""
    numbers: int = 0
    numbers_again: int = 0

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.again


Formula = Callable[..., tuple[int, int]]
"""(the op's arguments) to FLOPs forward, and backward if its gradient is asked for."""


def pairs(lengths: Iterable[int], window: int | None = None, causal: bool = True) -> int:
    """Pairs of a query and a key that attention looks at: each position sees itself and those before it.

    Without `causal` those after it too: as many again, less itself.
    """
    total = 0
    for length in lengths:
        short = length if window is None else min(length, window)
        back = short * (short + 1) // 2 + (length - short) * short
        total += back if causal else 2 * back - length
    return total


def _wanted(*tensors: Tensor | None) -> int:
    return sum(1 for x in tensors if x is not None and x.requires_grad)


def _linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> tuple[int, int]:
    product = 2 * x_TK.shape[0] * w_NK.shape[0] * w_NK.shape[1]
    return product, product * _wanted(x_TK, w_NK)


def _attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], how: Any) -> tuple[int, int]:
    product = 2 * q_THD.shape[1] * q_THD.shape[2] * pairs(lengths, how.window, how.causal)
    return 2 * product, 5 * product


def _experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> tuple[int, int]:
    product = 6 * experts_TC.numel() * down_EDF.shape[1] * down_EDF.shape[2]
    return product, 3 * product  # the hidden states of each expert are made again


def _logprobs(
    hidden_RD: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    ids_R: Tensor,
    multiplier: float,
    softcap: Any,
    keep: bool,
    *_: Any,
) -> tuple[int, int]:
    product = 2 * hidden_RD.shape[0] * w_VD.shape[0] * w_VD.shape[1]
    return product, product * (_wanted(hidden_RD, w_VD) + (not keep))


def _entropy(hidden_RD: Tensor, w_VD: Tensor, *_: Any) -> tuple[int, int]:
    product = 2 * hidden_RD.shape[0] * w_VD.shape[0] * w_VD.shape[1]
    return product, product * (_wanted(hidden_RD, w_VD) + 1)  # the scores are made again


def _lora(x_TK: Tensor, y_TN: Tensor, adapters: Sequence[Any], index_T: Tensor) -> tuple[int, int]:
    tokens = torch.bincount(index_T.long() + 1, minlength=len(adapters) + 1)[1:].tolist()
    sizes = ((a.a_RK.numel() + a.b_NR.numel(), a.a_RK.numel()) for a in adapters)
    both = [(2 * n * whole, 2 * n * shrink) for n, (whole, shrink) in zip(tokens, sizes, strict=True)]
    forward = sum(whole for whole, _ in both)
    return forward, 2 * forward + sum(shrink for _, shrink in both)  # A x is made again


def _quantized(x_TK: Tensor, w: Any, *_: Any) -> tuple[int, int]:
    return 2 * x_TK.shape[0] * w.n * w.k, 0


def _quantized_experts(
    x_TD: Tensor, gate_up: Any, down: Any, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> tuple[int, int]:
    return 2 * experts_TC.numel() * (gate_up.n * gate_up.k + down.n * down.k), 0


FORMULAS: dict[str, Formula] = {
    "linear": _linear,
    "packed_attention": _attention,
    "experts": _experts,
    "token_logprobs": _logprobs,
    "token_entropy": _entropy,
    "lora": _lora,
    "quantized_linear": _quantized,
    "quantized_experts": _quantized_experts,
}
"""Ops whose work is products."""

PASSES = frozenset(
    {"rms_norm", "layer_norm", "activate", "gated", "soft_cap", "rotate", "route", "open_gate", "logprobs_of"}
    | {"entropy_of"}
    | {"quantize_rows", "quantized_rows"}
)
"""Ops that pass over their numbers once."""

UNCOUNTED = frozenset(
    {"paged_attention", "keep", "draw", "choose", "score"}
    | {"adamw", "adam", "sgd", "lion", "adagrad", "orthogonalised", "square_sums"}
)
"""Ops of serving, whose work hangs on what is cached, and of the optimizer: no part of a forward or backward pass."""


def of(op: Op[..., Any], args: tuple[Any, ...]) -> tuple[int, int]:
    """FLOPs of products in this call, forward and backward."""
    formula = FORMULAS.get(op.name)
    return formula(*args) if formula else (0, 0)


def in_backward() -> bool:
    """Whether autograd is at work in this thread: an op called now is called once more, for recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def count() -> Iterator[Count]:
    """Count what is called while entered; a backward counts when it truly runs, so it must run inside as well."""
    found, depth = Count(), 0

    def watcher(op: Op[..., Any], args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        nonlocal depth
        if depth:  # a product inside an op that is counted whole
            return call()
        forward, backward = of(op, args)
        depth += bool(forward)
        try:
            out = call()
        finally:
            depth -= bool(forward)
        first = out[0] if isinstance(out, tuple) else out
        again = in_backward()
        if forward:
            _add(found, "again" if again else "forward", forward)
        elif op.name in PASSES:
            _add(found, "numbers_again" if again else "numbers", first.numel())
        if backward and not again:
            when_due(first, lambda: _add(found, "backward", backward))
        return out

    with watch(watcher, everywhere=True):
        yield found


def when_due(out: object, then: Callable[[], object]) -> None:
    """Call `then` just before the gradient of what made `out` is computed."""
    if isinstance(out, Tensor) and torch.is_grad_enabled() and out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda grads: then() and None)


def _add(found: Count, field: str, amount: int) -> None:
    setattr(found, field, getattr(found, field) + amount)
