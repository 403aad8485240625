"""Next-token cross-entropy that never holds the logits of a whole batch, and starts the backward pass as it goes.

Each chunk of rows becomes logits, loss and gradient before the next chunk begins, so only one chunk's logits are
alive; nothing is computed twice. A token's log-probability has the bits that the serving engine reports for it.

Shapes: T tokens, R rows with a target, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100
CHUNK_NUMBERS, CHUNK_ROWS = 1 << 22, 256
"""A chunk's logits are about 2^22 numbers (16 MiB in fp32), yet never of fewer rows than make its product worth it."""


class Readout(Protocol):
    """The part of a decoder that the loss needs: hidden states and one id for each to log-probabilities [R]."""

    def logprobs(self, hidden_RD: Tensor, ids_R: Tensor, *, keep: bool = False) -> Tensor: ...


Loss = Callable[[Readout, Tensor, Tensor], Tensor]
"""(decoder, hidden_CD, targets_C) to the sum of the rows' losses; every target is a real one."""


def next_token(decoder: Readout, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    """The summed negative log-probability of the targets, in nats."""
    return -decoder.logprobs(hidden_CD, targets_C, keep=True).sum()


def backward(
    decoder: Readout, hidden_TD: Tensor, targets_T: Tensor, total: float, vocab: int, loss: Loss = next_token
) -> float:
    """Add the gradient of (sum of losses / `total`) to every weight; the sum of losses over this micro-batch.

    `total` is the number of targets of the whole step, so that the split into micro-batches changes nothing; where the
    loss is scaled (scaler.py) it is so many times smaller.
    """
    rows_R = (targets_T != IGNORE).nonzero().squeeze(1)
    if not len(rows_R):  # nothing to learn, but ranks reduce together: a gradient of zeros for every weight
        nothing = loss(decoder, hidden_TD[:1], targets_T[:1] * 0) * 0.0
        torch.autograd.backward(nothing)
        return 0.0
    every = len(rows_R) == len(targets_T)
    picked_RD = hidden_TD if every else hidden_TD.index_select(0, rows_R)
    targets_R = targets_T if every else targets_T.index_select(0, rows_R)
    summed = 0.0
    grads: list[Tensor] = []
    for start, stop in chunks(len(rows_R), vocab):
        leaf_CD = picked_RD[start:stop].detach().requires_grad_()
        value = loss(decoder, leaf_CD, targets_R[start:stop])
        torch.autograd.backward(value / total)
        summed += float(value.detach())
        assert leaf_CD.grad is not None
        grads.append(leaf_CD.grad)
    torch.autograd.backward(picked_RD, torch.cat(grads))
    return summed


@torch.no_grad()
def evaluate(decoder: Readout, hidden_TD: Tensor, targets_T: Tensor, vocab: int) -> tuple[float, int]:
    """The summed loss and the number of targets, without gradients."""
    rows_R = (targets_T != IGNORE).nonzero().squeeze(1)
    summed = 0.0
    for start, stop in chunks(len(rows_R), vocab):
        rows_C = rows_R[start:stop]
        summed += float(next_token(decoder, hidden_TD[rows_C], targets_T[rows_C]))
    return summed, len(rows_R)


def chunks(rows: int, vocab: int) -> Iterator[tuple[int, int]]:
    """Spans of rows whose logits are in memory together."""
    size = max(CHUNK_ROWS, CHUNK_NUMBERS // vocab)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))
