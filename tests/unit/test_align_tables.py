"""The tables of align's losses: what a variant chooses, what is refused, and that no torch is needed to read them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from twofold.align.policy_config import GRPO, VARIANTS, CorrectionConfig, GrpoConfig, PpoConfig
from twofold.align.preference_config import ONLY, DpoConfig, RewardModelConfig
from twofold.core import ConfigError, build, flatten

TABLES = (GrpoConfig, PpoConfig, CorrectionConfig, DpoConfig, RewardModelConfig)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("grpo", {"scale": "group", "aggregate": "sequence", "clip_low": 0.2, "clip_high": 0.2, "ratio": "token"}),
        ("dr_grpo", {"scale": "none", "aggregate": "constant", "dynamic_sampling": False}),
        ("dapo", {"aggregate": "token", "clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": True}),
        ("rloo", {"baseline": "leave_one_out", "scale": "none", "ratio": "trajectory", "aggregate": "sequence"}),
        ("gspo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence"}),
        ("cispo", {"loss": "cispo", "aggregate": "token", "clip_high": 4.0}),
        ("reinforce", {"baseline": "whiten", "scale": "none"}),
    ],
)
def test_a_variant_chooses_what_is_left_out(variant: str, expected: dict[str, Any]) -> None:
    config = build(GrpoConfig, {"variant": variant})
    assert {name: getattr(config, name) for name in expected} == expected
    assert build(GrpoConfig, flatten(config)) == config  # a written-out table reads as the same


def test_what_is_given_wins_over_the_variant() -> None:
    config = build(GrpoConfig, {"variant": "dapo", "clip_high": "0.3", "dynamic_sampling": "false"})
    assert (config.clip_high, config.dynamic_sampling, config.aggregate) == (0.3, False, "token")


def test_every_variant_is_known_and_sets_only_what_variants_decide() -> None:
    assert set(get_args(get_type_hints(GrpoConfig)["variant"])) == set(VARIANTS)
    assert all(set(values) <= set(GRPO) for values in VARIANTS.values())
    assert {f.name for f in fields(GrpoConfig) if f.default is None} == set(GRPO) | {"dual_clip", "length"}


def test_the_estimator_of_ppo_follows_its_place() -> None:
    assert PpoConfig().kl == "k1"
    assert PpoConfig(kl_in="loss").kl == "k3"
    assert PpoConfig(kl_in="loss", kl="k2").kl == "k2"


REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (GrpoConfig, {"group": 0}, "grpo.group must be 1 or more"),
    (GrpoConfig, {"group": 1}, "nothing to compare"),
    (GrpoConfig, {"variant": "reinforce", "group": 1, "dynamic_sampling": True}, "nothing to compare"),
    (GrpoConfig, {"variant": "rloo", "scale": "group"}, "needs baseline = 'group'"),
    (GrpoConfig, {"variant": "rloo", "aggregate": "token"}, "needs aggregate = 'sequence'"),
    (GrpoConfig, {"variant": "cispo", "dual_clip": 9.0}, "dual_clip"),
    (GrpoConfig, {"dual_clip": 1.1}, "dual_clip must be more than"),
    (GrpoConfig, {"clip_low": 0.0}, "lower clip"),
    (GrpoConfig, {"clip_low": 1.5}, "lower clip"),
    (GrpoConfig, {"clip_high": 0.0}, "upper clip"),
    (GrpoConfig, {"beta": -0.1}, "grpo.beta must be 0 or more"),
    (GrpoConfig, {"kl_unbiased": True}, "grpo.beta is 0"),
    (GrpoConfig, {"overlong_penalty": 0.5}, "overlong_buffer is 0"),
    (GrpoConfig, {"length": 100}, "grpo.length is for"),
    (GrpoConfig, {"variant": "dr_grpo", "length": 0}, "grpo.length must be"),
    (GrpoConfig, {"epochs": 0}, "grpo.epochs"),
    (GrpoConfig, {"variant": "dap"}, "did you mean 'dapo'"),
    (PpoConfig, {"gamma": 1.1}, "ppo.gamma must be in"),
    (PpoConfig, {"lam": -0.1}, "ppo.lam must be in"),
    (PpoConfig, {"clip": 0.0}, "clip"),
    (PpoConfig, {"value_clip": 0.0}, "ppo.value_clip must be more than 0"),
    (PpoConfig, {"kl_in": "loss", "kl": "k1"}, "gradient of mean 0"),
    (PpoConfig, {"kl": "k3+"}, "a reward has none"),
    (PpoConfig, {"kl_coef": 0.0, "kl_target": 6.0}, "steers ppo.kl_coef"),
    (PpoConfig, {"kl_target": 0.0}, "ppo.kl_target must be more than 0"),
    (PpoConfig, {"ema_decay": 1.0}, "ppo.ema_decay"),
    (PpoConfig, {"missing_eos_penalty": -1.0}, "ppo.missing_eos_penalty"),
    (CorrectionConfig, {"low": 1.5}, "low <= 1 <= high"),
    (CorrectionConfig, {"high": 0.5}, "low <= 1 <= high"),
    (CorrectionConfig, {"reject_high": 0.9}, "reject_low <= 1 <= reject_high"),
    (CorrectionConfig, {"reject_low": 1.1}, "reject_low <= 1 <= reject_high"),
    (DpoConfig, {"beta": 0.0}, "dpo.beta must be more than 0"),
    (DpoConfig, {"label_smoothing": 0.5}, "dpo.label_smoothing"),
    (DpoConfig, {"loss": "ipo", "label_smoothing": 0.1}, "does nothing with dpo.loss = 'ipo'"),
    (DpoConfig, {"gamma": 0.5}, "choose from simpo"),
    (DpoConfig, {"loss": "orpo", "nll": 1.0}, "does nothing"),
    (DpoConfig, {"desirable_weight": 2.0}, "choose from kto"),
    (DpoConfig, {"nll": -1.0}, "dpo.nll must be 0 or more"),
    (RewardModelConfig, {"centring": -0.1}, "reward.centring"),
]


@pytest.mark.parametrize(("table", "given", "says"), REFUSED, ids=lambda x: str(x))
def test_what_cannot_be_is_refused(table: type[Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(table, given)
    assert says in str(error.value)


def test_the_fields_of_some_losses_only_are_fields() -> None:
    by_name = {f.name: f.default for f in fields(DpoConfig)}
    losses = set(get_args(get_type_hints(DpoConfig)["loss"]))
    for name, (default, readers) in ONLY.items():
        assert by_name[name] == default
        assert set(readers) <= losses


def test_what_a_loss_needs() -> None:
    needs = {loss: DpoConfig(loss=loss) for loss in get_args(get_type_hints(DpoConfig)["loss"])}
    assert {loss for loss, config in needs.items() if not config.reference} == {"orpo", "simpo"}
    assert {loss for loss, config in needs.items() if not config.paired} == {"kto"}
    assert CorrectionConfig().plain
    assert not CorrectionConfig(reject_high=1.01).plain


def test_tables_are_read_without_torch() -> None:
    program = "import sys, twofold.align.policy_config, twofold.align.preference_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
