"""Align's policy losses and advantages against TRL's own, value and gradient, on the same tensors.

TRL keeps its formulas inside trainers: `lone_trainer.py` says how they are reached. TRL has no PPO any more, so GAE,
whitening and the value's loss are tested by hand alone (tests/unit/test_align_advantage.py, test_align_policy.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lone_trainer import (
    ADVANTAGE_S,
    LENGTHS,
    LOGP_ST,
    LONGEST,
    MASK_ST,
    OLD_ST,
    OWNER_R,
    REFERENCE_ST,
    S,
    draw,
    same,
    trainer,
)
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from twofold.align.advantage import group_advantage, overlong_penalty, rloo
from twofold.align.aggregate import aggregate, denominator, sequence_lengths
from twofold.align.correction import correct
from twofold.align.kl import kl_loss
from twofold.align.policy import Level, cispo_loss, clipped_loss, ratio, ratio_figures
from twofold.align.policy_config import CorrectionConfig, GrpoConfig


def grpo_trainer(logp_ST: Tensor, loss_type: str, level: str, **settings: Any) -> Any:
    args = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    attributes: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "max_completion_length": 10,
    }
    args |= {name: value for name, value in settings.items() if name in args}
    attributes |= {name: value for name, value in settings.items() if name not in args}
    return trainer(
        GRPOTrainer,
        args=SimpleNamespace(**args),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp_ST, torch.zeros_like(logp_ST), None),
        **attributes,
    )


def grpo_inputs() -> dict[str, Tensor]:
    prompt_S1 = torch.ones(S, 1, dtype=torch.int64)
    return {
        "prompt_ids": prompt_S1,
        "prompt_mask": prompt_S1,
        "completion_ids": MASK_ST.long(),
        "completion_mask": MASK_ST.long(),
        "advantages": ADVANTAGE_S,
        "old_per_token_logps": OLD_ST,
        "ref_per_token_logps": REFERENCE_ST,
        "num_items_in_batch": MASK_ST.sum(),
    }


def ours(logp_R: Tensor, config: GrpoConfig, level: Level, weight_R: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss as align puts it together, and the ratio of each token."""
    ratio_R = ratio(logp_R, OLD_ST[MASK_ST], OWNER_R, S, level)
    advantage_R = ADVANTAGE_S[OWNER_R]
    if config.loss == "cispo":
        loss_R = cispo_loss(logp_R, ratio_R, advantage_R, config.clip_low, config.clip_high)
    else:
        loss_R = clipped_loss(ratio_R, advantage_R, config.clip_low, config.clip_high, config.dual_clip)
    loss_R = loss_R * weight_R
    if config.beta:
        unbiased = ratio_R if config.kl_unbiased else None
        loss_R = loss_R + config.beta * kl_loss(logp_R, REFERENCE_ST[MASK_ST], config.kl, unbiased)
    size = denominator(sequence_lengths(OWNER_R, S), config.aggregate, length=10)
    return aggregate(loss_R, OWNER_R, S, config.aggregate) / size, ratio_R


CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
POLICIES: dict[str, tuple[GrpoConfig, dict[str, Any]]] = {
    "grpo": (GrpoConfig(**CLIP), {"loss_type": "grpo"}),
    "dr_grpo": (GrpoConfig(variant="dr_grpo", **CLIP), {"loss_type": "dr_grpo"}),
    "dapo": (GrpoConfig(variant="dapo"), {"loss_type": "dapo"}),
    "gspo": (
        GrpoConfig(variant="gspo", clip_low=0.05, clip_high=0.06),
        {"loss_type": "grpo", "level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
    ),
    "gspo-sums": (
        GrpoConfig(variant="gspo", clip_low=0.05, clip_high=0.06, aggregate="sequence_sum"),
        {"loss_type": "luspo", "level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
    ),
    "cispo": (GrpoConfig(variant="cispo", clip_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "dual": (GrpoConfig(dual_clip=1.5, **CLIP), {"loss_type": "grpo", "delta": 1.5}),
    "kl": (GrpoConfig(beta=0.1, **CLIP), {"loss_type": "grpo", "beta": 0.1}),
    "kl-unbiased": (
        GrpoConfig(variant="dapo", beta=0.1, kl_unbiased=True),
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses(name: str) -> None:
    config, settings = POLICIES[name]
    logp_ST = LOGP_ST.clone().requires_grad_()
    made = grpo_trainer(logp_ST, settings["loss_type"], settings.get("level", "token"), **settings_of(settings))
    theirs = made._compute_loss(made.model, grpo_inputs())
    loss, ratio_R = ours(logp_ST[MASK_ST], config, config.ratio)
    same(loss, theirs, logp_ST)
    shown = made._metrics["train"]
    if name in ("grpo", "dr_grpo", "dapo", "kl"):
        figures = ratio_figures(ratio_R, ADVANTAGE_S[OWNER_R], config.clip_low, config.clip_high)
        for figure, theirs_name in (("clipped", "region"), ("clipped_low", "low"), ("clipped_high", "high")):
            share = float(figures[figure] / figures["tokens"])
            assert share == pytest.approx(shown[f"clip_ratio/{theirs_name}_mean"][0])
            assert share > 0


def settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("loss_type", "level")}


def test_a_tools_words_are_left_out() -> None:
    logp_ST = LOGP_ST.clone().requires_grad_()
    tool_ST = torch.ones_like(MASK_ST).index_fill(1, torch.tensor([1, 2]), False) | (MASK_ST.sum(1, keepdim=True) < 3)
    made = grpo_trainer(logp_ST, "grpo", "token")
    theirs = made._compute_loss(made.model, {**grpo_inputs(), "tool_mask": tool_ST.long()})
    mask_R = tool_ST[MASK_ST]
    assert not mask_R.all()
    ratio_R = ratio(logp_ST[MASK_ST], OLD_ST[MASK_ST], OWNER_R, S)
    loss_R = clipped_loss(ratio_R, ADVANTAGE_S[OWNER_R], 0.2, 0.28)
    size = denominator(sequence_lengths(OWNER_R, S, mask_R), "sequence")
    same(aggregate(loss_R, OWNER_R, S, "sequence", mask_R) / size, theirs, logp_ST)


def test_rloo_loss() -> None:
    logp_ST = LOGP_ST.clone().requires_grad_()
    made = trainer(
        RLOOTrainer,
        epsilon_low=0.2,
        epsilon_high=0.28,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp_ST, torch.zeros_like(logp_ST), None),
    )
    theirs = made._compute_loss(made.model, {**grpo_inputs(), "old_logps": (OLD_ST * MASK_ST).sum(1)})
    loss, _ = ours(logp_ST[MASK_ST], GrpoConfig(variant="rloo", **CLIP), "trajectory")
    same(loss, theirs, logp_ST)


# What happens between rollout and update


def generated(kind: type, rewards_N: Tensor, group: int, lengths: list[int], **settings: Any) -> dict[str, Tensor]:
    """What TRL makes of a batch of rollouts with these rewards."""
    ids = [[5] * length for length in lengths]
    logs: Any = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    fixed: dict[str, Any] = {
        "args": SimpleNamespace(
            per_device_train_batch_size=len(ids),
            gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
        ),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "num_iterations": 1,
        "num_generations": group,
        "beta": 0.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "reward_weights": torch.ones(1),
        "reward_funcs": [None],
        "reward_func_names": ["one"],
        "_calculate_rewards": lambda *args: rewards_N[:, None].clone(),
        "_logs": logs,
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
    logprobs = settings.pop("rollout_logprobs", None)
    outcome = ([[1]] * len(ids), ids, ["x"] * len(ids))
    if kind is GRPOTrainer:
        outcome = (*outcome[:2], None, outcome[2], logprobs, {}, None, None)  # type: ignore[assignment]
    fixed["_generate"] = lambda prompts: outcome
    fixed["_get_per_token_logps_and_entropies"] = lambda *a, **k: (torch.zeros(len(ids), max(lengths)), None, None)
    made = trainer(kind, **{**fixed, **settings})
    return made._generate_and_score_completions([{"prompt": "?"} for _ in ids])  # type: ignore[no-any-return]


NAN = math.nan
REWARDS_N = torch.tensor([1.0, 0.2, 0.0, 1.5, 0.5, 0.5, 0.5, 0.5, NAN, 2.0, -1.0, NAN, NAN, NAN, NAN, 3.0])
GROUP_N = torch.arange(16) // 4
"""One group as usual, one of equals, one with two rewards missing, one with a single reward."""


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: Any) -> None:
    theirs_N = generated(GRPOTrainer, REWARDS_N, 4, [2] * 16, scale_rewards=scale)["advantages"]
    same(group_advantage(REWARDS_N, GROUP_N, scale=scale, eps=1e-4), theirs_N)


def test_leave_one_out_advantages() -> None:
    theirs_N = generated(RLOOTrainer, REWARDS_N, 4, [2] * 16)["advantages"]
    same(rloo(REWARDS_N, GROUP_N), theirs_N)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights(mode: str) -> None:
    rollout_ST = OLD_ST + draw(S, LONGEST, seed=21, scale=0.6)
    level, action = mode.split("_")
    low, high = 0.5, 1.6
    theirs = generated(
        GRPOTrainer,
        torch.arange(6.0),
        3,
        list(LENGTHS),
        rollout_logprobs=[row[:n].tolist() for row, n in zip(rollout_ST, LENGTHS)],
        _get_per_token_logps_and_entropies=lambda *a, **k: (OLD_ST, None, None),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    config = CorrectionConfig(level=level, action=action, low=low, high=high)  # type: ignore[arg-type]
    weight_R, kept_R = correct(OLD_ST[MASK_ST], rollout_ST[MASK_ST], OWNER_R, S, config)
    theirs_R = theirs["importance_sampling_ratio"].expand(S, LONGEST)[MASK_ST]
    same(weight_R, theirs_R)
    assert kept_R.all() == (action == "truncate")


def test_weights_multiply_the_loss() -> None:
    weight_ST = draw(S, LONGEST, seed=22).abs()
    logp_ST = LOGP_ST.clone().requires_grad_()
    made = grpo_trainer(logp_ST, "dapo", "token", use_vllm=True, vllm_importance_sampling_correction=True, beta=0.1)
    theirs = made._compute_loss(made.model, {**grpo_inputs(), "importance_sampling_ratio": weight_ST})
    loss, _ = ours(logp_ST[MASK_ST], GrpoConfig(variant="dapo", beta=0.1), "token", weight_ST[MASK_ST])
    same(loss, theirs, logp_ST)


def test_overlong_penalty() -> None:
    lengths = [1, 80, 81, 90, 99, 100, 101, 400]
    theirs = get_soft_overlong_punishment(100, 20)([[0] * n for n in lengths])
    same(overlong_penalty(torch.tensor(lengths), 100, 20), torch.tensor(theirs, dtype=torch.float32))
