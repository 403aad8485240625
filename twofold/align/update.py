"""Update: what a batch of judged rollouts does to the policy, in optimizer steps; shared by GRPO and PPO.

    rollouts ─▶ what the trainer thinks of them (only where they are off-policy, or a reference is asked)
             ─▶ epochs × minibatches, each an optimizer step on some of the rollouts, in an order of its own

On-policy, the log-probabilities that the engine reported are the trainer's, bit for bit; the first optimizer step of an
update sees whether they are, and stops a run in which they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import StateError
from ..data import Batch
from ..data.order import permutation
from ..train.objective import Sums
from ..train.step import Step
from ..train.trainer import Trainer
from .correction import correct, largest_ratio, mismatch
from .judged import owners, target_logprobs
from .pairwise import target_rows
from .policy_config import CorrectionConfig
from .rollout_config import RolloutConfig

FIRST = ("kl", "mismatch", "equal")
"""Figures of the rollout against the trainer, which mean something in the first optimizer step of an update alone."""


def parts_of(batch: Batch, epochs: int, minibatches: int, key: int) -> Iterator[Batch]:
    """The batches of an update's optimizer steps: each epoch deals all sequences anew, a function of `key`."""
    if minibatches == 1:
        yield from [batch] * epochs
        return
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, batch.lengths, strict=True)]
    for epoch in range(epochs):
        order = permutation(len(batch.lengths), key * 1024 + epoch).tolist()
        each = -(-len(order) // minibatches)
        for first in range(0, len(order), each):
            yield take(batch, sorted(order[first : first + each]), starts, ends)


def take(batch: Batch, chosen: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> Batch:
    """Some sequences of a batch, as a batch of their own."""
    rows_T = torch.cat([torch.arange(starts[n], ends[n]) for n in chosen])
    return Batch(
        ids_T=batch.ids_T[rows_T],
        targets_T=batch.targets_T[rows_T],
        lengths=tuple(batch.lengths[n] for n in chosen),
        beside={name: value_T[rows_T] for name, value_T in batch.beside.items()},
    )


def teaching(batch: Batch) -> Batch:
    """The sequences whose advantage is not 0: of the others a policy gradient is exactly 0, whatever clips it.

    Where all are equal the shortest stays, so that a step is a step.
    """
    rows_R, owner_R = target_rows(batch)
    moves_S = torch.zeros(len(batch.lengths)).index_add(0, owner_R, batch.beside["advantage"][rows_R].abs()) > 0
    chosen = moves_S.nonzero().squeeze(1).tolist()
    if len(chosen) == len(batch.lengths):
        return batch
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, batch.lengths, strict=True)]
    return take(batch, chosen or [min(range(len(ends)), key=batch.lengths.__getitem__)], starts, ends)


def suspect(rollout: RolloutConfig, correction: CorrectionConfig) -> bool:
    """Whether the trainer is asked what it thinks of the rollouts' tokens before they are learned from.

    Of another policy's always; of its own where they need not be `exact` and something is to make up for it.
    """
    return not rollout.on_policy or not (rollout.exact or correction.plain)


def corrected(
    trainer: Trainer, batch: Batch, config: CorrectionConfig, temperature: float
) -> tuple[Batch, dict[str, float]]:
    """Off-policy rollouts with what the trainer's policy thinks of their tokens in the place of `old`, and `weight`
    beside each target, which makes up for the difference; and figures of how large that is. A collective.
    """
    rows_R, owner_R = target_rows(batch)
    with torch.no_grad():
        now_T = trainer.read(batch, target_logprobs(temperature))
    rollout_R, now_R = batch.beside["old"][rows_R], now_T[rows_R]
    weight_R, kept_R = correct(now_R, rollout_R, owner_R, len(batch.lengths), config)
    weight_T = torch.zeros(len(batch.ids_T)).index_copy(0, rows_R, weight_R)
    sums = {name: float(value) for name, value in mismatch(now_R, rollout_R, kept_R).items()}
    figures = rollout_figures(sums) | {"masked": sums["masked"] / sums["tokens"]}
    figures["largest_ratio"] = largest_ratio(now_R, rollout_R)
    return replace(batch, beside={**batch.beside, "old": now_T, "weight": weight_T}), figures


def rollout_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Rollout against trainer, means over tokens."""
    tokens = max(sums["tokens"], 1.0)
    return {name: sums[name] / tokens for name in FIRST}


def assert_on_policy(sums: Sums, step: int) -> None:
    """Raises StateError when a token's log-probability is not the same bits in the engine and in the trainer."""
    unequal = round(sums["tokens"] - sums["equal"])
    if unequal:
        raise StateError(
            f"step {step}: {unequal} of {sums['tokens']:.0f} rollout tokens have another log-probability in the "
            f"trainer than in the engine (mean difference {sums['mismatch'] / sums['tokens']:.2e}): this machine's "
            "kernels do not keep the contract; set rollout.exact = false and a [correction], or choose kernels that do"
        )


def own_tokens(batch: Batch) -> Tensor:
    """How many targets each sequence has [S]."""
    rows_R = target_rows(batch)[0]
    return torch.bincount(owners(batch)[rows_R], minlength=len(batch.lengths))


@dataclass
class Told:
    """The optimizer steps of one update as one step of the run."""

    steps: list[Step]

    def one(self, figures: Mapping[str, float], tokens: int) -> Step:
        """Their means, but the rollout's figures of the first; skipped when every one was."""
        done = [it for it in self.steps if it.skipped is None]
        whole = dict(figures)
        if not done:
            first = self.steps[0]
            return replace(first, tokens=tokens, figures=whole)
        for name in dict.fromkeys(name for it in done for name in it.figures):
            if name in FIRST:
                whole.setdefault(name, self.steps[0].figures.get(name, math.nan))
            else:
                known = [it.figures[name] for it in done if name in it.figures]
                whole[name] = sum(known) / len(known)
        return replace(
            done[0],
            loss=sum(it.loss for it in done) / len(done),
            grad_norm=sum(it.grad_norm for it in done) / len(done),
            targets=sum(it.targets for it in self.steps),
            tokens=tokens,
            flops=sum(it.flops for it in self.steps),
            figures={name: value for name, value in whole.items() if math.isfinite(value)},
        )
