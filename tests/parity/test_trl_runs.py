"""Whole runs are TRL's: losses of every step and final weights, from the same weights on the same rows.

One process, CPU, fp32. Both sides sum in orders of their own, so bits differ; `Twin.same` has the tolerances. What TRL
does otherwise by a decision is set here as we have it, or the other way round: "Differences from TRL" in docs/align.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_runs import STEPS, Replay, Twin, dealt

pytest.importorskip("trl", reason="TRL is only needed to compare with it")

NAMES = [f"{verb}_{thing}" for verb in ("add", "print", "fox", "sleep") for thing in ("dog", "range", "cafe", "a", "b")]
PAIRS = [
    {"prompt": f"def {name}(a):", "chosen": f"\n    return a + {n}\n", "rejected": f" fox {name} fox"}
    for n, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return Twin(tmp_path_factory.mktemp("trl"))


DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"dpo__beta": 0.3}, {"beta": 0.3}),
    "ipo": ({"dpo__loss": "ipo", "dpo__beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    "hinge": ({"dpo__loss": "hinge", "dpo__beta": 0.02}, {"loss_type": ["hinge"], "beta": 0.02}),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo(twin: Twin, name: str) -> None:
    from trl import DPOConfig, DPOTrainer

    changes, settings = DPO[name]
    ours, _ = twin.ours(f"dpo-{name}", PAIRS, algorithm="dpo", **changes)
    twin.same(ours, twin.theirs(DPOTrainer, DPOConfig, dealt(PAIRS), max_length=64, **settings))


def test_reward_model(twin: Twin) -> None:
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(twin.base, num_labels=1)
    model.score.weight.data.zero_()  # as ours begins; theirs is drawn
    ours, _ = twin.ours("reward", PAIRS, algorithm="reward", reward__centring=0.01)
    settings = {"max_length": 64, "center_rewards_coefficient": 0.01}
    twin.same(ours, twin.theirs(RewardTrainer, RewardConfig, dealt(PAIRS), model=model, **settings))


def test_kto(twin: Twin) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": row["prompt"], "completion": row[end], "label": end == "chosen"}
        for n, row in enumerate(PAIRS)
        for end in (("chosen",) if n % 3 else ("chosen", "rejected"))
    ]
    ours, _ = twin.ours(
        "kto", rows, algorithm="dpo", dpo__loss="kto", dpo__beta=0.2, dpo__undesirable_weight=1.3
    )
    settings = {"max_length": 64, "beta": 0.2, "undesirable_weight": 1.3}
    twin.same(ours, twin.theirs(KTOTrainer, KTOConfig, dealt(rows), **settings))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(twin: Twin, smoothing: float) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    name = f"simpo-{smoothing}"
    changes = {"dpo__loss": "simpo", "dpo__beta": 2.0, "dpo__gamma": 1.0, "dpo__label_smoothing": smoothing}
    ours, _ = twin.ours(name, PAIRS, algorithm="dpo", **changes)
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": smoothing, "cpo_alpha": 0.0}
    twin.same(ours, twin.theirs(CPOTrainer, CPOConfig, dealt(PAIRS), max_length=64, **settings))


def test_orpo(twin: Twin) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class OfAnswers(ORPOTrainer):  # theirs has the likelihood of the prompt too
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            chosen_P, *others, _ = super().concatenated_forward(model, batch)
            return chosen_P, *others, -chosen_P.mean()

    ours, _ = twin.ours("orpo", PAIRS, algorithm="dpo", dpo__loss="orpo", dpo__beta=0.3)
    twin.same(ours, twin.theirs(OfAnswers, ORPOConfig, dealt(PAIRS), max_length=64, beta=0.3))


PROMPTS = [{"prompt": f"def {name}(a):"} for name in NAMES]
PROMPTS_PER_STEP, GROUP, LONGEST = 3, 4, 12
REWARD = {"kind": "length", "unit": "characters", "most": 10, "slack": 40, "weight": 1000.0}
"""Large, so that what is added to a standard deviation (ours 1e-6, theirs 1e-4) makes no difference."""

GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"grpo__beta": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    "dr_grpo": ({"grpo__variant": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "bnpo": ({"grpo__aggregate": "token"}, {"loss_type": "bnpo"}),
    "dapo": (
        {"grpo__variant": "dapo", "grpo__dynamic_sampling": False},
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    ),
    "gspo": (
        {"grpo__variant": "gspo", "grpo__clip_low": 0.02, "grpo__clip_high": 0.03},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "cispo": ({"grpo__variant": "cispo", "grpo__clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "warm": ({"rollout__temperature": 0.7, "grpo__scale": "batch"}, {"temperature": 0.7, "scale_rewards": "batch", "loss_type": "grpo"}),
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo(twin: Twin, name: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    changes, settings = GRPO[name]
    ours, seen = twin.ours(
        f"grpo-{name}",
        PROMPTS,
        algorithm="grpo",
        schedule__steps=STEPS // 2,
        data__prompts_per_step=PROMPTS_PER_STEP,
        rollout__max_tokens=LONGEST,
        rollout__num_blocks=64,
        rewards=[REWARD],
        grpo__group=GROUP,
        grpo__epochs=2,
        **changes,
    )
    replay = Replay(seen.harvests)
    theirs = twin.theirs(
        GRPOTrainer,
        GRPOConfig,
        dealt(PROMPTS, STEPS // 2, PROMPTS_PER_STEP),
        more={"rollout_func": replay.rollout, "reward_funcs": replay.reward},
        **{
            "per_device_train_batch_size": PROMPTS_PER_STEP * GROUP,
            "num_generations": GROUP,
            "num_iterations": 2,
            "max_completion_length": LONGEST,
            "shuffle_dataset": False,
            **settings,
        },
    )
    twin.same(ours, theirs)
