"""PPO: a policy learns from how much better an answer went than a value had expected (Schulman et al. 2017; Ouyang
et al. 2022).

    rollouts  = rollout(engine, prompts, 1)
    r_t       = -kl_coef KL_t(policy | reference) + [t is the last] reward
    A, G      = GAE(r, V)                                       V: a score head on the policy's own hidden states
    loss      = mean of max(-r A, -clip(r) A) + value_coef · ½ max((V - G)², (clip(V) - G)²) - entropy_coef H
                + pretrain_coef · next-token loss on text (PPO-ptx)

The batch of answers is a replay buffer: `epochs` times `minibatches` optimizer steps are taken on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data import Batch
from ..data.prompts import PromptLoader
from ..models.decoder import Decoder
from ..train.lesson import Lesson
from ..train.objective import Sums
from ..train.pieces import Held, Piece, Stored
from ..train.step import Step
from ..train.trainer import Loader, Trainer
from .advantage import gae, shaped_rewards, whiten
from .average import Average
from .correction import mismatch
from .episode import Prompt
from .experience import Harvest, pack
from .grpo import examine, line
from .judged import Judged, Seen, token_scores
from .kl import KlCoefficient, kl, kl_loss
from .pairwise import target_rows
from .play import Play, chosen, show
from .policy import clipped_loss, ratio, ratio_figures, value_figures, value_loss
from .policy_config import CorrectionConfig, PpoConfig
from .reference import Reference
from .update import Told, assert_on_policy, corrected, parts_of, rollout_figures, suspect

COEFFICIENT = "lesson.kl_coef"
RATIO = ("tokens", "approx_kl", "clipped", "clipped_low", "clipped_high", "clipped_dual")
VALUE = ("value_clipped", "value", "value_error_square", "returns", "returns_square")


class PolicyAndValue(Judged):
    """Both losses, mean over the answers' tokens; beside each target `old`, `advantage`, `values` and `returns`."""

    names = ("kl", "mismatch", "equal", "entropy", "ref_kl", "value_loss", "text", "text_loss", *RATIO, *VALUE)

    def __init__(self, config: PpoConfig, temperature: float = 1.0) -> None:
        self.config, self.temperature = config, temperature
        self.kl_coef = config.kl_coef
        self.exact_at: int | None = None
        self._text_share = 0.0
        """What a text token's loss is multiplied by, so that the mean over text is weighted by pretrain_coef."""

    def size(self, batch: Batch) -> float:
        rows_R = target_rows(batch)[0]
        text = float(batch.beside["text"][rows_R].sum())
        own = len(rows_R) - text
        self._text_share = self.config.pretrain_coef * own / text if text else 0.0
        return own

    def touch(self, decoder: Decoder, hidden_TD: Tensor) -> Tensor:
        return super().touch(decoder, hidden_TD).sum() + decoder.scores(hidden_TD[:1]).sum()

    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        config, beside = self.config, seen.beside
        own_R = beside["text"] == 0
        logp_R, values_R = seen.logprobs_R, seen.scores_R
        text_loss = -logp_R[~own_R].sum()
        at = own_R.nonzero().squeeze(1)
        logp_R, values_R = logp_R[at], values_R[at]
        old_R, advantage_R, returns_R = beside["old"][at], beside["advantage"][at], beside["returns"][at]
        ratio_R = ratio(logp_R, old_R, seen.owner_R[at], seen.sequences)
        loss_R = clipped_loss(ratio_R, advantage_R, config.clip, config.clip, config.dual_clip)
        if "weight" in beside:
            loss_R = loss_R * beside["weight"][at]
        value_R = value_loss(values_R, beside["values"][at], returns_R, config.value_clip)
        summed = loss_R.sum() + config.value_coef * value_R.sum() + self._text_share * text_loss
        now_R = logp_R.detach()
        if config.kl_in == "loss" and "ref" in beside:
            summed = summed + self.kl_coef * kl_loss(logp_R, beside["ref"][at], config.kl).sum()  # type: ignore[arg-type]
        if config.entropy_coef:
            entropy = seen.decoder.entropy(seen.hidden_RD[at], temperature=seen.temperature).sum()
            summed = summed - config.entropy_coef * entropy
        figures: dict[str, float | Tensor] = {
            **ratio_figures(ratio_R.detach(), advantage_R, config.clip, config.clip, config.dual_clip),
            **mismatch(now_R, old_R),
            **value_figures(values_R.detach(), beside["values"][at], returns_R, config.value_clip),
            "entropy": entropy.detach() if config.entropy_coef else -now_R.sum(),
            "ref_kl": kl(now_R, beside["ref"][at], "k3").sum() if "ref" in beside else 0.0,
            "value_loss": value_R.detach().sum(),
            "text": float(len(own_R) - len(at)),
            "text_loss": text_loss.detach(),
        }
        return summed, figures

    def figures(self, sums: Sums) -> dict[str, float]:
        if self.exact_at is not None:
            assert_on_policy(sums, self.exact_at)
            self.exact_at = None
        tokens = max(sums["tokens"], 1.0)
        found = {name: sums[name] / tokens for name in (*RATIO[1:], "entropy", "value_loss", "value", "value_clipped")}
        variance = sums["returns_square"] / tokens - (sums["returns"] / tokens) ** 2
        if variance > 0:
            found["explained_variance"] = 1.0 - sums["value_error_square"] / tokens / variance
        if sums["text"]:
            found["text_loss"] = sums["text_loss"] / sums["text"]
        return found | rollout_figures(sums) | ({"ref_kl": sums["ref_kl"] / tokens} if self.kl_coef else {})


@dataclass
class PpoLesson(Lesson):
    """A batch of prompts a step, an answer to each."""

    curve = "reward"

    config: PpoConfig
    correction: CorrectionConfig
    play: Play
    prompts: PromptLoader
    valid: Sequence[Prompt]
    objective: PolicyAndValue
    text: Loader | None = None
    """What pretrain_coef mixes in."""
    average: Average | None = None
    """Of the policy's weights, over steps."""
    reference: Reference | None = field(default=None, init=False)
    coefficient: KlCoefficient = field(init=False)

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        config = self.config
        if config.kl_coef:
            self.reference = Reference(trainer.recipe, trainer, self.objective.temperature)
        self.play.begin(trainer, stored)
        start = float(stored.read(COEFFICIENT)) if stored else config.kl_coef
        self.coefficient = KlCoefficient(value=start, target=config.kl_target, horizon=config.kl_horizon)
        if self.average:
            self.average.begin(trainer, stored)

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        value = torch.tensor(self.coefficient.value, dtype=torch.float64)
        found = {COEFFICIENT: Piece(Held.all(value.shape), value, value.dtype)}
        return found | (self.average.pieces(trainer) if self.average else {}) | self.play.pieces(trainer)

    def step(self, trainer: Trainer) -> Step:
        number, config = trainer.position.batch, self.config
        harvest = self.play.next(trainer, self.prompts.batch, 1)
        figures = harvest.figures()
        learned = chosen(harvest, ~harvest.rewards_N.isnan() & (harvest.lengths_N > 0))
        if not learned.rollouts:
            why = "no rollout has a reward to learn from"
            return Step(loss=0.0, targets=0, lr=0.0, grad_norm=0.0, skipped=why, figures=figures)
        batch, more = self.experience(trainer, learned)
        figures |= more
        trainer.journal.add(
            number + 1, rollouts=show(learned, _per_answer(batch, batch.beside["advantage"]), self.play.config.shown)
        )
        tokens = len(batch.ids_T)
        self.objective.kl_coef = self.coefficient.value
        self.objective.exact_at = number + 1 if self.play.config.on_policy and self.play.config.exact else None
        key = trainer.recipe.run.seed * 1_000_003 + number
        steps = []
        for turn, part in enumerate(parts_of(batch, config.epochs, config.minibatches, key)):
            steps.append(trainer.step(self._mixed(part, number, turn), self.objective))
        if self.average:
            self.average.move(trainer)
        self.play.updated(trainer, figures)
        if "ref_kl_sum" in figures:
            self.coefficient = self.coefficient.after(figures.pop("ref_kl_sum"), len(learned.rollouts))
        done = Told(steps).one(figures, tokens)
        self.play.learned(trainer)
        return done

    def experience(self, trainer: Trainer, harvest: Harvest) -> tuple[Batch, dict[str, float]]:
        """The rollouts as a batch, with advantages and returns beside each token, and what is to be told of them."""
        config, figures = self.config, {"kl_coef": self.coefficient.value}
        scores_N = harvest.rewards_N
        if config.missing_eos_penalty is not None:
            scores_N = scores_N - config.missing_eos_penalty * harvest.truncated_N
        batch = pack(harvest.rollouts)
        if suspect(self.play.config, self.correction):
            batch, more = corrected(trainer, batch, self.correction, self.objective.temperature)
            figures |= more
        if self.reference:
            batch = self.reference.beside(trainer, batch)
        rows_R, owner_R = target_rows(batch)
        values_R = trainer.read(batch, token_scores)[rows_R]
        kl_R = None
        if self.reference:
            estimator = "k1" if config.kl_in == "loss" else config.kl
            kl_R = kl(batch.beside["old"][rows_R], batch.beside["ref"][rows_R], estimator)  # type: ignore[arg-type]
            figures["ref_kl_sum"] = float(kl_R.double().sum()) / len(harvest.rollouts)
        paid_R = kl_R if config.kl_in == "reward" else None
        rewards_R = shaped_rewards(scores_N, owner_R, paid_R, self.coefficient.value)
        if config.whiten_rewards:
            rewards_R = whiten(rewards_R, shift=False)
        advantages_R, returns_R = gae(rewards_R, values_R, owner_R, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages_R = whiten(advantages_R)
        known = {"advantage": advantages_R, "returns": returns_R, "values": values_R}
        beside = {name: torch.zeros(len(batch.ids_T)).index_copy(0, rows_R, value_R) for name, value_R in known.items()}
        beside["text"] = torch.zeros(len(batch.ids_T))
        return replace(batch, beside={**batch.beside, **beside}), figures

    def _mixed(self, part: Batch, number: int, turn: int) -> Batch:
        """The rollouts of an optimizer step with text behind them, where text is mixed in."""
        if self.text is None:
            return part
        text = self.text.batch(number * self.config.epochs * self.config.minibatches + turn)
        zeros = {name: torch.zeros(len(text.ids_T)) for name in part.beside}
        zeros["text"] = torch.ones(len(text.ids_T))
        return Batch(
            ids_T=torch.cat([part.ids_T, text.ids_T]),
            targets_T=torch.cat([part.targets_T, text.targets_T]),
            lengths=(*part.lengths, *text.lengths),
            beside={name: torch.cat([value_T, zeros[name]]) for name, value_T in part.beside.items()},
        )

    def examine(self, trainer: Trainer) -> None:
        examine(trainer, self.play, self.valid)

    def line(self, figures: dict[str, float]) -> str:
        return line(figures)

    def finish(self, trainer: Trainer) -> None:
        if self.average:
            self.average.export(trainer)

    def close(self) -> None:
        self.play.close()


def _per_answer(batch: Batch, value_T: Tensor) -> Tensor:
    """The mean of each sequence's targets [S]."""
    rows_R, owner_R = target_rows(batch)
    sums_S = torch.zeros(len(batch.lengths)).index_add(0, owner_R, value_T[rows_R])
    return sums_S / torch.bincount(owner_R, minlength=len(batch.lengths)).clamp(min=1)
