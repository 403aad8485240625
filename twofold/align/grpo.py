"""GRPO: an answer is as good as it is better than the other answers to its prompt (Shao et al. 2024), and its variants.

    for prompts in batches:
        rollouts   = rollout(engine, prompts, group)
        advantages = (reward - mean of the group) / std of the group
        loss       = mean of max(-r A, -clip(r) A) + beta KL(policy | reference),     r = π(token) / π_old(token)

Which mean, which clip, which ratio and which advantage is what Dr.GRPO, DAPO, RLOO, GSPO, CISPO and REINFORCE++ differ
in: fields of `GrpoConfig`, whose `variant` sets them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import Batch
from ..data.prompts import PromptLoader
from ..train.lesson import GivenUp, Lesson
from ..train.objective import Sums
from ..train.pieces import Held, Piece, Stored
from ..train.step import Step
from ..train.trainer import Trainer
from .advantage import group_advantage, informative, overlong_penalty, reinforce_baseline, rloo
from .aggregate import aggregate, denominator
from .correction import mismatch
from .episode import Prompt
from .estimates import bootstrap
from .experience import Harvest, pack
from .judged import Judged, Seen
from .kl import kl, kl_loss
from .play import Play, chosen, show, together
from .policy import cispo_loss, clipped_loss, ratio, ratio_figures
from .policy_config import CorrectionConfig, GrpoConfig
from .reference import Reference
from .update import Told, assert_on_policy, corrected, own_tokens, parts_of, rollout_figures, suspect, teaching

ROUNDS = 10
"""Draws of prompts at most for one step of dynamic sampling (DAPO)."""
DRAWN = "lesson.drawn"


class GroupLoss(Judged):
    """The clipped policy gradient; beside each target `old`, `advantage`, and where asked `weight` and `ref`."""

    names = ("tokens", "kl", "mismatch", "equal", "ref_kl", "approx_kl", "clipped", "clipped_low", "clipped_high",
             "clipped_dual")  # fmt: skip

    def __init__(self, config: GrpoConfig, length: int, temperature: float = 1.0) -> None:
        """`length` is that of the longest answer, which "constant" divides by if the config says nothing."""
        self.config, self._length, self.temperature = config, config.length or length, temperature
        self.exact_at: int | None = None
        """The step whose first optimizer step must find the engine's log-probabilities."""
        self.counted: Tensor | None = None
        """Own tokens of every answer of the next optimizer step, of those left out for their gradient is 0 as well."""

    def size(self, batch: Batch) -> float:
        counted = own_tokens(batch) if self.counted is None else self.counted
        return denominator(counted, self.config.aggregate, self._length)

    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        config, old_R, advantage_R = self.config, seen.beside["old"], seen.beside["advantage"]
        logp_R, clip = seen.logprobs_R, (config.clip_low, config.clip_high)
        ratio_R = ratio(logp_R, old_R, seen.owner_R, seen.sequences, config.ratio)
        if config.loss == "cispo":
            loss_R = cispo_loss(logp_R, ratio_R, advantage_R, *clip)
        else:
            loss_R = clipped_loss(ratio_R, advantage_R, *clip, config.dual_clip)
        if "weight" in seen.beside:
            loss_R = loss_R * seen.beside["weight"]
        now_R, ref_R = logp_R.detach(), seen.beside.get("ref")
        if ref_R is not None:
            loss_R = loss_R + config.beta * kl_loss(logp_R, ref_R, config.kl, ratio_R if config.kl_unbiased else None)
        figures = ratio_figures(ratio_R.detach(), advantage_R, *clip, config.dual_clip) | mismatch(now_R, old_R)
        figures["ref_kl"] = kl(now_R, ref_R, "k3").sum() if ref_R is not None else torch.zeros(())
        return aggregate(loss_R, seen.owner_R, seen.sequences, config.aggregate), figures

    def figures(self, sums: Sums) -> dict[str, float]:
        if self.exact_at is not None:
            assert_on_policy(sums, self.exact_at)
            self.exact_at = None
        tokens = max(sums["tokens"], 1.0)
        shares = {name: sums[name] / tokens for name in self.names if name not in ("tokens", "ref_kl")}
        return shares | rollout_figures(sums) | ({"ref_kl": sums["ref_kl"] / tokens} if self.config.beta else {})


def advantages(harvest: Harvest, config: GrpoConfig, longest: int) -> Tensor:
    """What each rollout was better by than it was expected to be, fp32 [N]."""
    rewards_N, group_N = harvest.rewards_N, harvest.group_N
    if config.overlong_buffer:
        penalty_N = overlong_penalty(harvest.lengths_N, longest, config.overlong_buffer)
        rewards_N = rewards_N + config.overlong_penalty * penalty_N
    if config.baseline == "leave_one_out":
        return rloo(rewards_N, group_N)
    if config.baseline == "whiten":
        return reinforce_baseline(rewards_N, group_N, harvest.lengths_N, baseline=config.group > 1)
    return group_advantage(rewards_N, group_N, scale=config.scale)


@dataclass
class GrpoLesson(Lesson):
    """A batch of prompts a step."""

    curve = "reward"

    config: GrpoConfig
    correction: CorrectionConfig
    play: Play
    prompts: PromptLoader
    per_step: int
    valid: Sequence[Prompt]
    objective: GroupLoss
    reference: Reference | None = field(default=None, init=False)
    drawn: int = field(default=0, init=False)
    """Prompts taken from the loader so far."""

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        if self.config.beta:
            self.reference = Reference(trainer.recipe, trainer, self.objective.temperature)
        self.play.begin(trainer, stored)
        if stored is not None:
            self.drawn = int(stored.read(DRAWN))

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        drawn = torch.tensor(self.drawn)
        return {DRAWN: Piece(Held.all(drawn.shape), drawn, drawn.dtype)} | self.play.pieces(trainer)

    def step(self, trainer: Trainer) -> Step:
        config, longest = self.config, self.play.config.max_tokens
        harvest, seen = self._draw(trainer)
        advantage_N = advantages(harvest, config, longest)
        trainer.journal.add(trainer.position.step + 1, rollouts=show(harvest, advantage_N, self.play.config.shown))
        keep_N = ~harvest.rewards_N.isnan()
        if config.mask_truncated:
            keep_N &= ~harvest.truncated_N
        keep_N &= harvest.lengths_N > 0
        learned, figures = chosen(harvest, keep_N), seen.figures() | {"learned": float(keep_N.sum())}
        figures["taught"] = float((advantage_N[keep_N] != 0).sum())
        return self._update(trainer, learned, advantage_N[keep_N], figures)

    def _update(self, trainer: Trainer, harvest: Harvest, advantage_N: Tensor, figures: dict[str, float]) -> Step:
        if not harvest.rollouts:
            why = "no rollout has a reward to learn from"
            return Step(loss=0.0, targets=0, lr=0.0, grad_norm=0.0, skipped=why, figures=figures)
        batch = pack(harvest.rollouts, {"advantage": advantage_N})
        rollouts = self.play.config
        if suspect(rollouts, self.correction):
            batch, more = corrected(trainer, batch, self.correction, self.objective.temperature)
            figures |= more
        if self.reference:
            batch = self.reference.beside(trainer, batch)
        self.objective.exact_at = trainer.position.step + 1 if rollouts.on_policy and rollouts.exact else None
        key = trainer.recipe.run.seed * 1_000_003 + trainer.position.step
        moe = trainer.recipe.moe
        every = self.reference is not None or bool(moe.balance_loss or moe.z_loss)  # what has no advantage teaches, too
        steps = []
        for part in parts_of(batch, self.config.epochs, self.config.minibatches, key):
            self.objective.counted = own_tokens(part)
            steps.append(trainer.step(part if every else teaching(part), self.objective))
        self.play.updated(trainer, figures)
        done = Told(steps).one(figures, len(batch.ids_T))
        self.play.learned(trainer)
        return done

    def _draw(self, trainer: Trainer) -> tuple[Harvest, Harvest]:
        """What is learned from, and all that was rolled out for it: with dynamic sampling more than one draw."""
        if not self.config.dynamic_sampling:
            found = self.play.next(trainer, self.prompts.batch, self.config.group)
            return found, found
        drawn = self.drawn
        every: list[Harvest] = []
        kept: list[Harvest] = []
        groups = 0
        while groups < self.per_step and len(every) < ROUNDS:
            prompts = self.prompts.take(self.drawn, self.drawn + self.per_step)
            self.drawn += self.per_step
            try:
                found = self.play.harvest(trainer, prompts, self.config.group, len(every))
            except GivenUp:
                self.drawn = drawn
                raise
            every.append(found)
            good_N = informative(found.rewards_N, found.group_N)
            within = list(dict.fromkeys(found.group_N[good_N].tolist()))[: self.per_step - groups]
            groups += len(within)
            kept.append(chosen(found, torch.isin(found.group_N, torch.tensor(within))))
        return together(kept), together(every)

    def examine(self, trainer: Trainer) -> None:
        examine(trainer, self.play, self.valid)

    def line(self, figures: dict[str, float]) -> str:
        return line(figures)

    def close(self) -> None:
        self.play.close()


def examine(trainer: Trainer, play: Play, valid: Sequence[Prompt]) -> None:
    """The likeliest answers to held-out prompts, and their rewards with the interval of the mean (95%)."""
    if not valid:
        return
    harvest, step = play.look(trainer, valid), trainer.position.step
    found = harvest.figures()
    wanted = ("reward", "length", "truncated", "faults")
    seen = {name: value for name, value in found.items() if name.startswith(wanted) and math.isfinite(value)}
    counted = harvest.rewards_N[~harvest.rewards_N.isnan()].tolist()
    if counted:
        around = bootstrap(counted)
        seen |= {"low": around.low, "high": around.high}
    trainer.journal.add(step, eval=seen)
    reward = f"{found['reward']:.4f}" if counted else "given to none"
    trainer.display.say(f"step {step}: held-out reward {reward}, {found['length']:.0f} tokens")


def line(figures: Mapping[str, float]) -> str:
    """What a step's line on the terminal has of rewards."""
    wanted = {"reward": "reward {:.3f}", "kl": "kl={}", "entropy": "entropy {:.2f}", "length": "length {:.0f}"}
    return "  ".join(text.format(figures[name]) for name, text in wanted.items() if name in figures)
