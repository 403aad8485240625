"""How much better a token or an answer was than expected: what a policy gradient is multiplied by.

None of it has a gradient, and all of it is global: statistics are those of the whole batch, which every rank has.

Shapes: R tokens on one flat axis without padding, `owner_R` int64, rising, each token's sequence, `mine_R` bool
False where a tool spoke; N answers of a batch, `group_N` int64 the prompt each one answers, `rewards_N` NaN where no
reward could be given. Such an answer is counted nowhere and its advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


@torch.no_grad()
def shaped_rewards(
    score_S: Tensor, owner_R: Tensor, kl_R: Tensor | None = None, coefficient: float = 0.0, mine_R: Tensor | None = None
) -> Tensor:
    """Rewards of tokens [R] from those of sequences: the score on its last own token, less the KL of every own token.

    r_t = -coefficient · kl_t + [t is the last] · score (Ziegler et al. 2019, equation 2). Sequences without an own
    token lose their score: there is nobody to give it to.
    """
    rewards_R = torch.zeros(len(owner_R), device=owner_R.device)
    if kl_R is not None:
        rewards_R -= coefficient * kl_R.float()
    mine_R = torch.ones_like(owner_R, dtype=torch.bool) if mine_R is None else mine_R
    rewards_R.masked_fill_(~mine_R, 0.0)
    own = mine_R.nonzero().squeeze(1)
    last = own[_ends(owner_R[own])]
    rewards_R[last] += score_S.float()[owner_R[last]]
    return rewards_R


@torch.no_grad()
def gae(
    rewards_R: Tensor, values_R: Tensor, owner_R: Tensor, gamma: float, lam: float, mine_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016): advantages and the returns a value should learn, [R].

    δ_t = r_t + γ V_{t+1} - V_t and A_t = Σ_k (γλ)^k δ_{t+k}, where t+1 is the next token of the same sequence that is
    its own: what a tool said is stepped over as if it were not there, and is 0 in both. V behind the end is 0.
    """
    if mine_R is not None:
        advantages_R, returns_R = torch.zeros_like(rewards_R), torch.zeros_like(rewards_R)
        found = gae(rewards_R[mine_R], values_R[mine_R], owner_R[mine_R], gamma, lam)
        advantages_R[mine_R], returns_R[mine_R] = found
        return advantages_R, returns_R
    next_R = values_R.roll(-1).masked_fill(_ends(owner_R), 0.0)
    delta_R = rewards_R + gamma * next_R - values_R
    advantages_R = discounted_sums(delta_R, owner_R, gamma * lam)
    return advantages_R, advantages_R + values_R


@torch.no_grad()
def discounted_sums(x_R: Tensor, owner_R: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor · y_{t+1} within each sequence [R]: returns of rewards, advantages of TD errors.

    All sequences take a step together, in a table [longest, S]; a sequence's numbers depend on no other one.
    """
    if not len(x_R):
        return x_R.clone()
    lengths_S = torch.bincount(owner_R)
    starts_S = lengths_S.cumsum(0) - lengths_S
    place_R = torch.arange(len(owner_R), device=owner_R.device) - starts_S[owner_R]
    table = x_R.new_zeros(int(lengths_S.max()), len(lengths_S))
    table[place_R, owner_R] = x_R
    for t in range(len(table) - 2, -1, -1):
        table[t] += factor * table[t + 1]
    return table[place_R, owner_R]


@torch.no_grad()
def whiten(x_R: Tensor, mask_R: Tensor | None = None, *, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """x with unit variance and, with `shift`, mean 0, over all counted tokens of the batch [R]; others are 0.

    (x - mean) / √(var + eps), var unbiased, and the mean added again without `shift`: rewards keep their sign so.
    Fewer than two counted tokens have no variance: they are only shifted.
    """
    mask_R = torch.ones_like(x_R, dtype=torch.bool) if mask_R is None else mask_R
    counted = x_R[mask_R].double()
    variance = counted.var() if len(counted) > 1 else x_R.new_tensor(1.0).double()
    mean = counted.mean() if len(counted) else 0.0
    white_R = (x_R.double() - mean) * (variance + eps).rsqrt() + (0.0 if shift else mean)
    return white_R.to(x_R.dtype).masked_fill(~mask_R, 0.0)


@torch.no_grad()
def group_advantage(rewards_N: Tensor, group_N: Tensor, *, scale: Scale = "group", eps: float = 1e-6) -> Tensor:
    """A = (r - mean of the group) / (std + eps) of each answer [N] (GRPO, Shao et al. 2024).

    std is unbiased: of the `group`, of all rewards of the `batch`, or left out with "none", which is Dr.GRPO
    (Liu et al. 2025). A group of equal rewards, or of one, says nothing: its advantages are exactly 0, not the
    rounding error of a mean divided by eps.
    """
    rewards_N = rewards_N.double()
    counts_G, mean_G = _group_means(rewards_N, group_N)
    centred_N = torch.where(informative(rewards_N, group_N), rewards_N - mean_G[group_N], 0.0)
    if scale == "none":
        return centred_N.float()
    if scale == "batch":
        valid = rewards_N[~rewards_N.isnan()]
        std_N = valid.std() if len(valid) > 1 else rewards_N.new_tensor(1.0)
    else:
        squares_G = torch.zeros_like(mean_G).index_add(0, group_N, centred_N.square())
        std_N = (squares_G / (counts_G - 1).clamp(min=1)).sqrt()[group_N]
    return (centred_N / (std_N + eps)).float()


@torch.no_grad()
def rloo(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """A = r - mean of the others' rewards in its group [N] (REINFORCE leave-one-out, Ahmadian et al. 2024).

    For n answers that is (r - mean) · n / (n - 1). A lone answer has no others, and 0.
    """
    rewards_N = rewards_N.double()
    counts_G, mean_G = _group_means(rewards_N, group_N)
    stretch_G = counts_G / (counts_G - 1).clamp(min=1)
    centred_N = (rewards_N - mean_G[group_N]) * stretch_G[group_N]
    return torch.where(informative(rewards_N, group_N), centred_N, 0.0).float()


@torch.no_grad()
def reinforce_baseline(
    rewards_N: Tensor, group_N: Tensor, tokens_N: Tensor, *, baseline: bool = True, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++ (Hu 2025): rewards less their group's mean, then whitened over all tokens of the batch [N].

    An answer of n tokens counts n times, as when its advantage is written on each token and those are whitened.
    Without `baseline` the group's mean stays, for one answer to a prompt.
    """
    rewards_N = rewards_N.double()
    valid_N = ~rewards_N.isnan()
    centred_N = rewards_N - _group_means(rewards_N, group_N)[1][group_N] if baseline else rewards_N
    if baseline:
        centred_N = torch.where(informative(rewards_N, group_N), centred_N, 0.0)
    weight_N = torch.where(valid_N, tokens_N.double(), 0.0)
    x_N = torch.where(valid_N, centred_N, 0.0)
    total = weight_N.sum()
    if total < 2:
        return torch.zeros_like(x_N).float()
    mean = (weight_N * x_N).sum() / total
    variance = (weight_N * (x_N - mean).square()).sum() / (total - 1)
    return torch.where(valid_N, (x_N - mean) * (variance + eps).rsqrt(), 0.0).float()


@torch.no_grad()
def informative(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Which answers [N], bool, have a reward and stand in a group whose rewards differ.

    Dynamic sampling (DAPO, Yu et al. 2025) drops the rest, whose gradient is 0, and draws more prompts.
    """
    valid_N = ~rewards_N.isnan()
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    lowest_G = rewards_N.new_full((groups,), torch.inf)
    lowest_G = lowest_G.scatter_reduce(0, group_N, rewards_N.nan_to_num(nan=torch.inf), "amin")
    highest_G = rewards_N.new_full((groups,), -torch.inf)
    highest_G = highest_G.scatter_reduce(0, group_N, rewards_N.nan_to_num(nan=-torch.inf), "amax")
    return valid_N & (lowest_G < highest_G)[group_N]


def overlong_penalty(tokens_N: Tensor, longest: int, buffer: int) -> Tensor:
    """What to add to the reward of a long answer [N] (DAPO, Yu et al. 2025, equation 13).

    0 up to longest - buffer tokens, from there falling evenly to -1 at `longest`, and -1 beyond.
    """
    if not buffer:
        return torch.zeros(len(tokens_N), device=tokens_N.device)
    return ((longest - buffer - tokens_N.float()) / buffer).clamp(-1.0, 0.0)


def _ends(owner_R: Tensor) -> Tensor:
    """True at the last token of each sequence [R]."""
    ends_R = torch.ones_like(owner_R, dtype=torch.bool)
    ends_R[:-1] = owner_R[1:] != owner_R[:-1]
    return ends_R


def _group_means(rewards_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """How many rewards each group has, and their mean [G]; NaN is skipped."""
    valid_N = ~rewards_N.isnan()
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    counts_G = rewards_N.new_zeros(groups).index_add(0, group_N, valid_N.to(rewards_N.dtype))
    sums_G = rewards_N.new_zeros(groups).index_add(0, group_N, rewards_N.nan_to_num(nan=0.0))
    return counts_G, sums_G / counts_G.clamp(min=1)
