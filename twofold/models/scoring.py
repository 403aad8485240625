"""Score heads: in place of the language head (a reward model) or beside it (a critic that shares the policy's layers).

    config.json                                                          head         score
    "architectures": ["LlamaForCausalLM"]                                vocabulary   none
    "architectures": ["LlamaForSequenceClassification"], "id2label"      none         a number for each label
    "architectures": ["LlamaForCausalLM"], "value_head": true            vocabulary   one value for each token

The first two are transformers' own. The third is ours: transformers reads it as the causal model that it is too. The
tensor is `score.weight` [labels, width] in both, without a bias. What a reward model says of a text is what it says of
the last token.

A head that a checkpoint does not have yet starts as zeros, in both. A critic then values everything at 0, so that its
first advantages are the returns; a reward model is undecided, a loss of ln 2 exactly. Neither moves the layers below by
noise in the first step, and nothing hangs on a seed (Hu et al. 2021 start LoRA's B so for the same reasons).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import CheckpointError, ConfigError
from .families import FAMILIES
from .families.labels import labels_of
from .reader import Reader
from .spec import ModelSpec

VALUE = "value_head"
TENSOR = "score.weight"
"""The name of a score head's weight, in every checkpoint and in the decoder."""

_LABELS = ("num_labels", "id2label", "label2id", "problem_type")
_OTHERS = {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}
"""Reward models whose name does not follow from the causal model's."""


def reward_architecture(causal: str) -> str:
    """What transformers calls a family with a score head in place of the language head."""
    stem = causal.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return _OTHERS.get(causal, f"{stem}ForSequenceClassification")


CAUSAL: dict[str, str] = {reward_architecture(name): name for name in FAMILIES}
"""The causal model of each reward model. Of Cohere, ERNIE and Granite transformers has the first alone."""


def as_reward(config: Mapping[str, Any], labels: int = 1) -> dict[str, Any]:
    """The config.json of a reward model with the layers of the model that `config` describes."""
    names = {str(i): f"LABEL_{i}" for i in range(labels)}
    kept = {key: value for key, value in config.items() if key not in (*_LABELS, VALUE)}
    told = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    return kept | told | {"architectures": [reward_architecture(_causal(config))]}


def as_critic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a causal model, with a value head beside its language head.

    Raises:
        ConfigError: `config` describes a reward model, which has no language head to stand beside.
    """
    return {**as_causal(config), VALUE: True}


def as_causal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a causal model, without its value head.

    Raises:
        ConfigError: `config` describes a reward model.
    """
    if _causal(config) != config["architectures"][0]:
        raise ConfigError(f"{config['architectures'][0]} is a reward model: it has no language head to go on with")
    return {key: value for key, value in config.items() if key != VALUE}


def _causal(config: Mapping[str, Any]) -> str:
    name = str(config["architectures"][0])
    return CAUSAL.get(name, name)


def scored(spec: ModelSpec, hf: Reader, architecture: str) -> ModelSpec:
    """A family's spec with the score head that config.json asks for.

    Raises:
        CheckpointError: two counts of labels that differ, or a value head on a reward model.
    """
    beside = hf.get(bool, VALUE, default=False)
    if architecture == spec.architecture:
        return _with_score(spec, 1) if beside else spec
    if beside:
        raise CheckpointError(f"config.json: {architecture} is a score head already: take '{VALUE}' out")
    return replace(_with_score(spec, labels_of(hf)), architecture=architecture, head=None)


def _with_score(spec: ModelSpec, labels: int) -> ModelSpec:
    names = replace(spec.names, table=spec.names.table | {"score": TENSOR.removesuffix(".weight")})
    return replace(spec, score=labels, names=names)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Tensors that may be `spare` and parameters that may be `lacking` when layers get other heads than they had."""

    spare: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()

    @classmethod
    def of(cls, stored: ModelSpec, wanted: ModelSpec) -> Exchange:
        """When a checkpoint of `stored` fills a decoder of `wanted`."""
        spare, lacking = set[str](), set[str]()
        if wanted.head is None and stored.head is not None:
            heads = {table["head"] for table in (stored.names.table, stored.names.also) if "head" in table}
            spare |= {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
        if stored.score != wanted.score:
            spare |= {TENSOR} if stored.score else set()
            lacking |= {TENSOR} if wanted.score else set()
        return cls(frozenset(spare), frozenset(lacking))


SAME = Exchange()
"""The heads that a checkpoint has are those that are wanted."""
