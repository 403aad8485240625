"""Align's losses of preferences against TRL's own, value and gradient, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lone_trainer import LOGP_ST, LONGEST, MASK_ST, OWNER_R, REFERENCE_ST, S, draw, same, trainer
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from twofold.align.aggregate import sequence_lengths, sequence_means, sequence_sums
from twofold.align.preference import (
    Pairs,
    bradley_terry,
    kto,
    kto_baseline,
    orpo,
    pair_loss,
    preference_figures,
)
from twofold.align.preference_config import DpoConfig


def pairs(logp_ST: Tensor) -> Pairs:
    sums_S = sequence_sums(logp_ST[MASK_ST], OWNER_R, S)
    reference_S = sequence_sums(REFERENCE_ST[MASK_ST], OWNER_R, S)
    tokens_S = sequence_lengths(OWNER_R, S)
    return Pairs(
        chosen_P=sums_S[:3],
        rejected_P=sums_S[3:],
        chosen_tokens_P=tokens_S[:3],
        rejected_tokens_P=tokens_S[3:],
        ref_chosen_P=reference_S[:3],
        ref_rejected_P=reference_S[3:],
    )


def answers(logp_ST: Tensor) -> Callable[..., SimpleNamespace]:
    """A model whose tokens have these log-probabilities, after a prompt of one token."""
    blank_ST = torch.zeros_like(logp_ST)
    return lambda **kwargs: SimpleNamespace(
        log_probs=logp_ST * MASK_ST, entropy=blank_ST, mean_logits=blank_ST, is_top1=blank_ST.bool()
    )


def padded() -> dict[str, Tensor]:
    prompt_S1 = torch.ones(S, 1, dtype=torch.int64)
    answer_ST = MASK_ST.long()
    return {
        "input_ids": torch.cat([prompt_S1, answer_ST], 1),
        "attention_mask": torch.cat([prompt_S1, answer_ST], 1),
        "completion_mask": torch.cat([0 * prompt_S1, answer_ST], 1),
    }


@pytest.mark.parametrize(("loss", "name"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge")])
@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_dpo_family(loss: Any, name: str, nll: float) -> None:
    logp_ST = LOGP_ST.clone().requires_grad_()
    known = pairs(logp_ST)
    loss_P, chosen_P, rejected_P = pair_loss(known, DpoConfig(loss=loss, beta=0.3, nll=nll))
    made = trainer(
        DPOTrainer,
        beta=0.3,
        loss_types=[name],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = {**padded(), "ref_chosen_logps": known.ref_chosen_P, "ref_rejected_logps": known.ref_rejected_P}
    theirs = made._compute_loss(answers(logp_ST), inputs, return_outputs=False)
    chosen_means_P = sequence_means(logp_ST[MASK_ST], OWNER_R, S)[:3]
    same(loss_P.mean(), theirs - nll * chosen_means_P.mean(), logp_ST)
    if loss != "ipo":  # whose rewards TRL shows as sums, though its loss is of means
        figures = preference_figures(chosen_P, rejected_P)
        shown = made._metrics["train"]
        assert float(figures["accuracy"]) / 3 == pytest.approx(shown["rewards/accuracies"][0])
        assert float(figures["margin"]) / 3 == pytest.approx(shown["rewards/margins"][0], rel=1e-5)
        assert float(figures["chosen"]) / 3 == pytest.approx(shown["rewards/chosen"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DpoConfig(beta=0.3, label_smoothing=0.2), "sigmoid"),
        (DpoConfig(loss="hinge", beta=0.3), "hinge"),
        (DpoConfig(loss="simpo", beta=2.0, gamma=0.8), "simpo"),
        (DpoConfig(loss="simpo", beta=2.0, gamma=0.8, label_smoothing=0.1), "simpo"),
    ],
    ids=["cdpo", "hinge", "simpo", "simpo-smooth"],
)
def test_losses_without_a_reference(config: DpoConfig, name: str) -> None:
    """CPO's: there label smoothing is cDPO's, and SimPO lives."""
    logp_ST = LOGP_ST.clone().requires_grad_()
    known = pairs(logp_ST)
    free = Pairs(**{**vars(known), "ref_chosen_P": None, "ref_rejected_P": None})
    made = trainer(
        CPOTrainer,
        alpha=0.0,
        beta=config.beta,
        loss_type=name,
        label_smoothing=config.label_smoothing,
        simpo_gamma=config.gamma,
    )
    chosen_P, rejected_P = free.means() if name == "simpo" else (free.chosen_P, free.rejected_P)
    loss_P, chosen_reward_P, rejected_reward_P = pair_loss(free, config)
    theirs_P, chosen_theirs_P, rejected_theirs_P = made.cpo_loss(chosen_P, rejected_P)
    same(loss_P.mean(), theirs_P.mean(), logp_ST)
    same(chosen_reward_P, chosen_theirs_P)
    same(rejected_reward_P, rejected_theirs_P)


def test_means_over_the_tokens_of_an_answer() -> None:
    logits_STV = draw(S, LONGEST + 1, 11, seed=9)
    labels_ST = torch.randint(0, 11, (S, LONGEST), generator=torch.Generator().manual_seed(8)).masked_fill(
        ~MASK_ST, -100
    )
    padded_ST = torch.cat([torch.full((S, 1), -100), labels_ST], 1)
    logp_R = logits_STV.log_softmax(-1)[:, :-1].gather(2, labels_ST.clamp(min=0)[..., None])[..., 0][MASK_ST]
    theirs_S = ORPOTrainer.get_batch_logps(logits_STV, padded_ST, average_log_prob=True)
    same(sequence_means(logp_R, OWNER_R, S), theirs_S)


def test_orpo() -> None:
    logp_ST = LOGP_ST.clone().requires_grad_()
    chosen_P, rejected_P = pairs(logp_ST).means()
    blank = torch.zeros(1)
    made = trainer(ORPOTrainer, beta=0.3)
    made.concatenated_forward = lambda model, batch: (chosen_P, rejected_P, blank, blank, -chosen_P.mean())
    theirs, _ = made.get_batch_loss_metrics(None, {})
    same(orpo(chosen_P, rejected_P, 0.3).mean(), theirs, logp_ST)
    same(pair_loss(pairs(logp_ST), DpoConfig(loss="orpo", beta=0.3))[0].mean(), theirs, logp_ST)


@pytest.mark.parametrize("shift", [0.0, -0.9], ids=["baseline", "baseline-at-zero"])
def test_kto(shift: float) -> None:
    logp_ST = LOGP_ST.clone().requires_grad_()
    desirable_S = torch.tensor([True, False, True, True, False, False])
    mismatched_ST = LOGP_ST.flip(0) * MASK_ST
    reference_S, ref_mismatched_S = REFERENCE_ST.mul(MASK_ST).sum(1), mismatched_ST.sum(1) - draw(S, seed=7) - shift
    made = trainer(
        KTOTrainer,
        beta=0.2,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.0,
        undesirable_weight=1.3,
    )
    inputs = {**padded(), "label": desirable_S, "ref_logps": reference_S, "ref_KL_logps": ref_mismatched_S}
    inputs |= {f"KL_{name}": x for name, x in padded().items()}
    right, wrong = answers(logp_ST), answers(mismatched_ST)

    def model(**kwargs: Any) -> SimpleNamespace:
        return right(**kwargs) if torch.is_grad_enabled() else wrong(**kwargs)

    theirs = made._compute_loss(model, inputs, return_outputs=False)
    baseline = kto_baseline(mismatched_ST.sum(1) - ref_mismatched_S)
    assert float(baseline) == pytest.approx(made._metrics["train"]["kl"][0], abs=1e-6)
    log_ratio_S = sequence_sums(logp_ST[MASK_ST], OWNER_R, S) - reference_S
    same(kto(log_ratio_S, desirable_S, baseline, 0.2, 1.0, 1.3).mean(), theirs, logp_ST)


@pytest.mark.parametrize("centring", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_reward_model(centring: float | None, margin: bool) -> None:
    scores_S = draw(S, seed=11).requires_grad_()
    inputs: dict[str, Any] = {"attention_mask": torch.ones(S, 2)}
    if margin:
        inputs["margin"] = draw(3, seed=12).abs()
    made = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centring))
    theirs = made.compute_loss(lambda **kwargs: SimpleNamespace(logits=scores_S[:, None]), dict(inputs))
    ours_P = bradley_terry(scores_S[:3], scores_S[3:], inputs.get("margin", 0.0), centring or 0.0)
    same(ours_P.mean(), theirs, scores_S)
