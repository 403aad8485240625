"""The words for recomputation: one for each layer, and errors that name the nearest."""

from __future__ import annotations

import pytest

from twofold.core import ConfigError
from twofold.train.config import ModelConfig
from twofold.train.policies import per_layer


def test_a_policy_for_each_layer() -> None:
    assert per_layer("none", 2) == ["none", "none"]
    assert per_layer("every-3", 7) == ["full", "none", "none", "full", "none", "none", "full"]
    assert per_layer("every-1", 2) == ["full", "full"]
    changed = per_layer("full", 6, {"0-2": "selective", "1": "none", "5": "ffn"})
    assert changed == ["selective", "none", "selective", "full", "full", "ffn"]
    assert per_layer("none", 4, {"1-3": "every-2"}) == ["none", "none", "full", "none"]


@pytest.mark.parametrize(
    ("policy", "changes", "said"),
    [
        ("selectiv", {}, "model.recompute: unknown policy 'selectiv': did you mean 'selective'"),
        ("every-0", {}, "every-K with K of 1 or more"),
        ("everything", {}, "every-K with K of 1 or more"),
        ("full", {"2": "atention"}, r"model.recompute_layers.2: .*did you mean 'attention'"),
        ("full", {"3-1": "none"}, "'3-1' must be a layer or a range"),
        ("full", {"first": "none"}, "'first' must be a layer or a range"),
        ("full", {"0": True}, "must be a policy"),
    ],
)
def test_wrong_words_are_refused_when_the_recipe_is_read(policy: str, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelConfig(config={}, tokenizer=".", recompute=policy, recompute_layers=changes)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="the last of the model's 4 is 3"):
        per_layer("full", 4, {"2-4": "none"})
