"""What lessons are made of, at their borders: nothing to learn from, steps that were skipped, tables that clash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from twofold.align.config import AlignData, AlignRecipe
from twofold.align.episode import Prompt, Rollout
from twofold.align.experience import Harvest, pack
from twofold.align.grpo import advantages
from twofold.align.play import chosen, together
from twofold.align.policy_config import CorrectionConfig, GrpoConfig
from twofold.align.rewards.config import RewardConfig
from twofold.align.rollout_config import RolloutConfig
from twofold.align.update import Told, parts_of, suspect, teaching
from twofold.core import ConfigError
from twofold.train.config import ModelConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig
from twofold.train.journal import Journal, read_rows
from twofold.train.loss import IGNORE
from twofold.train.step import Step

TOKEN = CorrectionConfig(level="token")


def rolled(mine: str, prompt: int = 2) -> Rollout:
    """A rollout whose tokens are the model's where `mine` says "m"."""
    size = len(mine)
    return Rollout(
        prompt=Prompt(number=0, ids=tuple(range(100, 100 + prompt))),
        sample=0,
        ids=tuple(range(size)),
        logprobs=tuple(-1.0 - n if who == "m" else 0.0 for n, who in enumerate(mine)),
        mine=tuple(who == "m" for who in mine),
        versions=(1,) * size,
        finish="stop",
        text="",
    )


@pytest.mark.parametrize("variant", ["grpo", "dapo", "rloo", "reinforce"])
def test_a_step_that_nothing_is_learned_from_has_types_and_no_rows(variant: str) -> None:
    one = Harvest(rollouts=(rolled("mm"),), group_N=torch.tensor([0]), rewards_N=torch.tensor([1.0]))
    none = together([chosen(one, torch.tensor([False]))] * 2)
    assert not len(advantages(none, GrpoConfig(variant=variant), 8))
    assert (~none.truncated_N).dtype == torch.bool and none.lengths_N.dtype == torch.int64
    assert none.figures()["skipped_rollouts"] == 0.0


def test_only_the_models_own_tokens_are_learned() -> None:
    """Of a prompt of 2 and m m t t m: targets where the model speaks, each beside its own log-probability."""
    batch = pack([rolled("mmttm"), rolled("m", prompt=1)], {"advantage": torch.tensor([0.5, -2.0])})
    assert batch.lengths == (6, 1)
    assert batch.targets_T.tolist() == [IGNORE, 0, 1, IGNORE, IGNORE, 4, 0]
    assert batch.beside["old"].tolist() == [0.0, -1.0, -2.0, 0.0, 0.0, -5.0, -1.0]
    assert batch.beside["advantage"].tolist() == [0.5] * 6 + [-2.0]


def test_every_epoch_goes_through_every_answer_once_with_its_own_tokens() -> None:
    batch = pack([rolled("m" * n, prompt=1) for n in range(1, 8)])
    parts = list(parts_of(batch, 2, 3, key=5))
    for epoch in (parts[:3], parts[3:]):
        assert sorted(length for part in epoch for length in part.lengths) == list(batch.lengths)
        for part in epoch:
            assert [float(x) for x in part.beside["old"]] == [-1.0 - n for size in part.lengths for n in range(size)]
    assert parts[0].lengths != parts[3].lengths or parts[1].lengths != parts[4].lengths


def test_one_step_is_told_of_the_optimizer_steps_that_were_done() -> None:
    def did(skipped: str | None = None, **figures: float) -> Step:
        return Step(loss=1.0, targets=3, lr=0.1, grad_norm=2.0, skipped=skipped, figures=figures)

    steps = [did(kl=0.0, clipped=0.0), did("spike", kl=9.0, clipped=9.0), did(kl=4.0, clipped=1.0, explained=0.5)]
    told = Told(steps).one({"reward": 1.0, "gone": math.nan}, 7)
    assert told.figures == {"reward": 1.0, "kl": 0.0, "clipped": 0.5, "explained": 0.5}
    assert (told.targets, told.tokens, told.skipped) == (9, 7, None)
    assert Told([did("spike")]).one({"reward": 1.0}, 7).skipped == "spike"


@pytest.mark.parametrize(
    ("rollout", "correction", "asked"),
    [
        (RolloutConfig(), CorrectionConfig(), False),
        (RolloutConfig(exact=False), CorrectionConfig(), False),
        (RolloutConfig(exact=False), TOKEN, True),
        (RolloutConfig(top_p=0.9), TOKEN, True),
        (RolloutConfig(top_p=0.9, exact=False), CorrectionConfig(), True),
    ],
)
def test_the_trainer_is_asked_first_where_tokens_may_be_anothers(
    rollout: RolloutConfig, correction: CorrectionConfig, asked: bool
) -> None:
    assert suspect(rollout, correction) is asked


def recipe(tmp_path: Path, algorithm: str, **tables: object) -> AlignRecipe:
    data = tables.pop("data", AlignData(train=("x.jsonl",)))
    played = {"rewards": (RewardConfig(kind="length", most=3),)} if algorithm in ("ppo", "grpo") else {}
    return AlignRecipe(
        algorithm=algorithm,
        model=ModelConfig(from_=tmp_path),
        data=data,
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(steps=1),
        run=RunConfig(output=tmp_path),
        **played,
        **tables,
    )


def test_tables_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on-policy to the bit"):
        recipe(tmp_path, "grpo", correction=TOKEN)
    recipe(tmp_path, "grpo", correction=TOKEN, rollout=RolloutConfig(exact=False))
    recipe(tmp_path, "grpo", correction=TOKEN, rollout=RolloutConfig(top_p=0.9))
    with pytest.raises(ConfigError, match=r"data\.text"):
        recipe(tmp_path, "ppo", data=AlignData(train=("x.jsonl",), text=("y.txt",)))
    with pytest.raises(ConfigError, match="cannot"):
        recipe(tmp_path, "reward", sample=SampleConfig(prompts=("hello",)))


def test_numbers_that_are_not_finite_are_null_in_the_record(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    journal = Journal(tmp_path, keep_to=1)
    journal.add(2, reward=math.nan, eval={"loss": math.inf, "n": 3}, rollouts=[{"reward": -math.inf}])
    journal.close()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = read_rows(tmp_path / "log.jsonl")
    assert first["loss"] is None and second["reward"] is None
    assert second["eval"] == {"loss": None, "n": 3} and second["rollouts"] == [{"reward": None}]


def test_where_nothing_teaches_the_shortest_answer_stays() -> None:
    batch = pack([rolled("mmm"), rolled("m")], {"advantage": torch.zeros(2)})
    assert teaching(batch).lengths == (2,)
    assert teaching(pack([rolled("mm")], {"advantage": torch.ones(1)})).lengths == (3,)
