"""Whole runs are TRL's: losses of every step and final weights, from the same weights on the same rows.

One process, CPU, fp32. Both sides sum in orders of their own, so bits differ; `Twin.same` has the tolerances. What TRL
does otherwise by a decision is set here as we have it, or the other way round: "Differences from TRL" in docs/align.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl_runs import PER_STEP, STEPS, Outcome, Replay, Twin, dealt

from twofold.data.order import permutation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*experimental feature")

NAMES = [f"{verb}_{thing}" for verb in ("add", "print", "fox", "sleep") for thing in ("dog", "range", "cafe", "a", "b")]
PAIRS = [
    {"prompt": f"def {name}(a):", "chosen": f"\n    return a + {n}\n", "rejected": f" fox {name} fox"}
    for n, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return Twin(tmp_path_factory.mktemp("trl"))


CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_sft(twin: Twin, kind: Any) -> None:
    """Completions alone, and what the assistant says in two turns; half a step at a time."""
    from trl import SFTConfig, SFTTrainer

    said = [(row["prompt"], f"\n    return {n}\n", f"again {n}", row["chosen"]) for row in PAIRS for n in range(6)]
    every: list[dict[str, Any]] = [{"prompt": prompt, "completion": answer} for prompt, answer, *_ in said]
    if kind == "chat":
        roles = ("user", "assistant", "user", "assistant")
        every = [{"messages": [{"role": r, "content": text} for r, text in zip(roles, talk)]} for talk in said]
    template = twin.speaking(CHAT)
    rows, length = twin.alike(every)
    ours, seen = twin.ours(
        f"sft-{kind}",
        rows,
        algorithm="sft",
        kind=kind,
        model__tokenizer=str(template.parent),
        data__seq_len=length,
        data__tokens_per_step=PER_STEP * (length - 1),  # each loses its last id, so a step is so many whole rows
        data__micro_tokens=3 * (length - 1),
    )
    places = [seen.loader.documents(step) for step in range(STEPS)]
    assert all(len(step) == PER_STEP for step in places)
    theirs = twin.theirs(
        SFTTrainer,
        SFTConfig,
        [rows[place] for step in places for place in step],
        max_length=64,
        per_device_train_batch_size=PER_STEP // 2,
        gradient_accumulation_steps=2,
        assistant_only_loss=kind == "chat",
        chat_template_path=str(template),
    )
    twin.same(ours, theirs)


DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"dpo__beta": 0.3}, {"beta": 0.3}),
    "in-parts": (
        {"dpo__beta": 0.1, "data__micro_tokens": 64},
        {"beta": 0.1, "per_device_train_batch_size": PER_STEP // 3, "gradient_accumulation_steps": 3},
    ),
    "cdpo": (  # theirs has no cDPO; (1 - ε) l(x) + ε l(-x) is so much of l(x) less so much of "robust"
        {"dpo__beta": 0.3, "dpo__label_smoothing": 0.1},
        {"beta": 0.3, "label_smoothing": 0.1, "loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8]},
    ),
    "ipo": ({"dpo__loss": "ipo", "dpo__beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    "hinge": ({"dpo__loss": "hinge", "dpo__beta": 0.02}, {"loss_type": ["hinge"], "beta": 0.02}),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo(twin: Twin, name: str) -> None:
    from trl import DPOConfig, DPOTrainer

    changes, settings = DPO[name]
    ours, _ = twin.ours(f"dpo-{name}", PAIRS, algorithm="dpo", **changes)
    twin.same(ours, twin.theirs(DPOTrainer, DPOConfig, dealt(PAIRS), max_length=64, **settings))


def test_dpo_of_adapters(twin: Twin) -> None:
    """The reference is the base with the adapters off; theirs is a second adapter as they began, which adds 0."""
    from trl import DPOConfig, DPOTrainer

    ours, _ = twin.ours("lora", PAIRS, algorithm="dpo", lora__rank=4, lora__alpha=8.0)
    model, first = twin.adapted("lora")
    theirs = twin.theirs(DPOTrainer, DPOConfig, dealt(PAIRS), model=model, max_length=64)
    twin.same(ours, theirs, first)


def test_reward_model(twin: Twin) -> None:
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(twin.base, num_labels=1)
    model.score.weight.data.zero_()  # as ours begins; theirs is drawn
    rows = [row | {"margin": n / 10} for n, row in enumerate(PAIRS)]
    ours, _ = twin.ours("reward", rows, algorithm="reward", reward__centring=0.01, reward__margin="column")
    settings: dict[str, Any] = {"max_length": 64, "center_rewards_coefficient": 0.01}
    twin.same(ours, twin.theirs(RewardTrainer, RewardConfig, dealt(rows), model=model, **settings))


def test_kto(twin: Twin) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": row["prompt"], "completion": row[end], "label": end == "chosen"}
        for n, row in enumerate(PAIRS)
        for end in (("chosen",) if n % 3 else ("chosen", "rejected"))
    ]
    ours, _ = twin.ours("kto", rows, algorithm="dpo", dpo__loss="kto", dpo__beta=0.2, dpo__undesirable_weight=1.3)
    settings: dict[str, Any] = {"max_length": 64, "beta": 0.2, "undesirable_weight": 1.3}
    twin.same(ours, twin.theirs(KTOTrainer, KTOConfig, dealt(rows), **settings))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(twin: Twin, smoothing: float) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    name = f"simpo-{smoothing}"
    changes = {"dpo__loss": "simpo", "dpo__beta": 2.0, "dpo__gamma": 1.0, "dpo__label_smoothing": smoothing}
    ours, _ = twin.ours(name, PAIRS, algorithm="dpo", **changes)
    settings: dict[str, Any] = {
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 1.0,
        "label_smoothing": smoothing,
        "cpo_alpha": 0.0,
    }
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
ANSWERS = PROMPTS_PER_STEP * GROUP
REWARD = {"kind": "length", "unit": "characters", "most": 10, "slack": 40, "weight": 1000.0}
"""Large, so that what is added to a standard deviation (ours 1e-6, theirs 1e-4) makes no difference."""
HALVES = {"per_device_train_batch_size": ANSWERS // 2, "gradient_accumulation_steps": 2}
PLAIN_KL = {"use_bias_correction_kl": False}
TOOL = f"{Path(__file__).parents[1] / 'e2e' / 'bad_rewards.py'}:tool"

GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"grpo__beta": 0.1}, {"loss_type": "grpo", "beta": 0.1} | PLAIN_KL),
    "kl-unbiased": (
        {"grpo__beta": 0.1, "grpo__kl_unbiased": True, "data__micro_tokens": 64},
        {"loss_type": "grpo", "beta": 0.1} | HALVES,
    ),
    "dr_grpo": ({"grpo__variant": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "bnpo": ({"grpo__aggregate": "token"}, {"loss_type": "bnpo"}),
    "dapo": (
        {"grpo__variant": "dapo", "grpo__dynamic_sampling": False},
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True} | HALVES,
    ),
    "gspo": (
        {"grpo__variant": "gspo", "grpo__clip_low": 0.1, "grpo__clip_high": 0.15},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
    ),
    "tools": (
        {"rollout__turn": TOOL, "rollout__stop": ["e", "a"], "rollout__max_tokens": 24},
        {"loss_type": "grpo", "max_completion_length": 24},
    ),
    "equals": ({"grpo__aggregate": "token", "rewards": [REWARD | {"most": 22}]}, {"loss_type": "dapo"}),
    "cispo": ({"grpo__variant": "cispo", "grpo__clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "warm": (
        {"rollout__temperature": 0.7, "grpo__scale": "batch", "grpo__beta": 0.05},
        {"temperature": 0.7, "scale_rewards": "batch", "loss_type": "grpo", "beta": 0.05} | PLAIN_KL,
    ),
}


def played(twin: Twin, name: str, **changes: Any) -> tuple[Outcome, Replay]:
    """Our run of two updates, each of two optimizer steps, and its rollouts."""
    ours, seen = twin.ours(
        name,
        PROMPTS,
        algorithm="grpo",
        schedule__steps=STEPS // 2,
        data__prompts_per_step=PROMPTS_PER_STEP,
        rollout__num_blocks=64,
        grpo__group=GROUP,
        **{"rewards": [REWARD], "rollout__max_tokens": LONGEST, "grpo__epochs": 2} | changes,
    )
    ends = {it.finish for harvest in seen.harvests for it in harvest.rollouts}
    assert ends == {"stop", "length"}
    return ours, Replay(seen.harvests)


REPLAYED = {
    "per_device_train_batch_size": ANSWERS,
    "num_generations": GROUP,
    "num_iterations": 2,
    "max_completion_length": LONGEST,
    "shuffle_dataset": False,
}
ASKED = dealt(PROMPTS, STEPS // 2, PROMPTS_PER_STEP)


@pytest.mark.parametrize("name", GRPO)
def test_grpo(twin: Twin, name: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    changes, settings = GRPO[name]
    ours, replay = played(twin, f"grpo-{name}", **changes)
    more = {"rollout_func": replay.rollout, "reward_funcs": replay.reward}
    twin.same(ours, twin.theirs(GRPOTrainer, GRPOConfig, ASKED, more=more, **REPLAYED | settings))


def test_minibatches(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimizer steps of half the answers each, dealt as ours deals them."""
    from trl import GRPOConfig, GRPOTrainer

    ours, replay = played(twin, "minibatches", grpo__epochs=1, grpo__minibatches=2)
    orders = iter([_halves(step) for step in range(STEPS // 2)])

    def shuffled(batch: dict[str, Any]) -> dict[str, Any]:
        order = next(orders)
        return {name: value[order] if getattr(value, "ndim", 0) else value for name, value in batch.items()}

    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", shuffled)
    more = {"rollout_func": replay.rollout, "reward_funcs": replay.reward}
    steps = {"per_device_train_batch_size": ANSWERS // 2, "steps_per_generation": 2, "num_iterations": 1}
    twin.same(ours, twin.theirs(GRPOTrainer, GRPOConfig, ASKED, more=more, **REPLAYED | steps, loss_type="grpo"))


def _halves(step: int) -> list[int]:
    """The order in which `parts_of` deals a step's answers to two mini-batches."""
    order = permutation(ANSWERS, step * 1024).tolist()
    return sorted(order[: ANSWERS // 2]) + sorted(order[ANSWERS // 2 :])


def test_rloo(twin: Twin) -> None:
    from trl import RLOOConfig, RLOOTrainer

    reward = REWARD | {"weight": 1.0}
    ours, replay = played(twin, "rloo", grpo__variant="rloo", rewards=[reward], grpo__clip_low=0.5, grpo__clip_high=1.0)

    class Replayed(RLOOTrainer):  # which has no rollout_func
        def _generate(self, prompts: list[str]) -> Any:
            told = replay.rollout(prompts, self)
            return told["prompt_ids"], told["completion_ids"], [""] * len(prompts)

    settings = REPLAYED | {"beta": 0.0, "epsilon": 0.5, "epsilon_high": 1.0}
    twin.same(ours, twin.theirs(Replayed, RLOOConfig, ASKED, more={"reward_funcs": replay.reward}, **settings))
