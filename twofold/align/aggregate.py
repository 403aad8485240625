"""Many tokens' losses to one number, so that no split of a batch into micro-batches or ranks changes it.

    loss of the step = Σ over micro-batches and ranks of aggregate(...)  /  denominator(...) of the whole batch

    how             a sequence counts            the sum is divided by        is the loss of
    token           as its tokens                counted tokens               DAPO (Yu et al. 2025), PPO
    sequence        alike, by its tokens' mean   sequences                    GRPO (Shao et al. 2024), GSPO
    sequence_sum    as its tokens                sequences                    REINFORCE, RLOO
    constant        as its tokens                sequences · a fixed length   Dr.GRPO (Liu et al. 2025)

Shapes: R target tokens on one flat axis without padding, S sequences; `owner_R` int64, rising, names each token's
sequence. A token whose `mask_R` is False does not count, and neither does a sequence without a counted token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core import ConfigError

Aggregation = Literal["token", "sequence", "sequence_sum", "constant"]


def sequence_sums(x_R: Tensor, owner_R: Tensor, sequences: int, mask_R: Tensor | None = None) -> Tensor:
    """Each sequence's sum over its counted tokens [S], in fp32; gradients pass."""
    counted_R = x_R.float() if mask_R is None else x_R.float().masked_fill(~mask_R, 0.0)
    return torch.zeros(sequences, device=x_R.device).index_add(0, owner_R, counted_R)


def sequence_lengths(owner_R: Tensor, sequences: int, mask_R: Tensor | None = None) -> Tensor:
    """How many counted tokens each sequence has [S], int64."""
    return torch.bincount(owner_R if mask_R is None else owner_R[mask_R], minlength=sequences)


def sequence_means(x_R: Tensor, owner_R: Tensor, sequences: int, mask_R: Tensor | None = None) -> Tensor:
    """Each sequence's mean over its counted tokens [S]; 0 where it has none."""
    lengths_S = sequence_lengths(owner_R, sequences, mask_R)
    return sequence_sums(x_R, owner_R, sequences, mask_R) / lengths_S.clamp(min=1)


def aggregate(
    loss_R: Tensor, owner_R: Tensor, sequences: int, how: Aggregation, mask_R: Tensor | None = None
) -> Tensor:
    """This micro-batch's summand of the step's loss, a scalar; the step divides the total by `denominator`."""
    if how == "sequence":
        return sequence_means(loss_R, owner_R, sequences, mask_R).sum()
    return sequence_sums(loss_R, owner_R, sequences, mask_R).sum()


def denominator(lengths_N: Tensor, how: Aggregation, length: int | None = None) -> float:
    """What the whole step's sum is divided by; at least 1, so that an empty batch has loss 0.

    `lengths_N` holds the counted tokens of each sequence of the whole batch, of every rank and micro-batch;
    `length` is the fixed length of "constant".

    Raises:
        ConfigError: "constant" without a length.
    """
    counted = int((lengths_N > 0).sum())
    if how == "token":
        return float(max(int(lengths_N.sum()), 1))
    if how == "constant":
        if length is None:
            raise ConfigError("aggregate = 'constant' divides by a fixed length: give one, such as the longest answer")
        return float(max(counted, 1) * length)
    return float(max(counted, 1))
