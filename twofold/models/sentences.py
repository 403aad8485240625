"""Sentences: how a checkpoint makes one vector of a text, as sentence-transformers writes it beside the model.

    modules.json                       the steps, in order: Transformer, Pooling, perhaps Dense, perhaps Normalize
    1_Pooling/config.json              which tokens: the first, the last, or the mean of all
    2_Dense/config.json, .safetensors  a matrix behind it, and an activation
    sentence_bert_config.json          how long a text the model was made for
    config_sentence_transformers.json  what stands before each text by default, and how two vectors are compared

Without modules.json: an encoder's first token, a decoder's last, normalised. What would make another vector than we do
is an error that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import CheckpointError, unknown
from .shards import Shard
from .weights import read_json

How = Literal["last", "mean", "cls"]
Similarity = Literal["cosine", "dot"]

MODULES = "modules.json"
_MODES: dict[str, How] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, How] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}
_SIMILARITIES: dict[str, Similarity] = {"cosine": "cosine", "cos_sim": "cosine", "dot": "dot", "dot_score": "dot"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """A matrix behind the pooled vector: weight [outputs, inputs], bias, and an activation's name ("none")."""

    weight: Tensor
    bias: Tensor | None
    act: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentences:
    """How a text becomes a vector. `prompt` stands before each text; `max_len` is the longest in tokens, if told."""

    pooling: How
    normalize: bool = True
    dense: tuple[Dense, ...] = ()
    max_len: int | None = None
    prompt: str = ""
    similarity: Similarity = "cosine"

    def width(self, hidden: int) -> int:
        """Numbers of a vector."""
        return int(self.dense[-1].weight.shape[0]) if self.dense else hidden


def read_sentences(folder: str | Path, *, encoder: bool, pooling: str = "auto") -> Sentences:
    """What the checkpoint says; `pooling` other than "auto" overrides which tokens are pooled.

    Raises:
        CheckpointError: a step, a way to pool or an activation that Twofold does not do.
    """
    folder = Path(folder)
    found = Sentences(pooling="cls" if encoder else "last")
    if (folder / MODULES).is_file():
        found = _steps(folder, found)
    told = _table(folder / "config_sentence_transformers.json")
    prompts, name = told.get("prompts") or {}, told.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise CheckpointError(f"{folder}: default_prompt_name: " + unknown("prompt", str(name), list(prompts)))
    similarity = str(told.get("similarity_fn_name") or "cosine")
    if similarity not in _SIMILARITIES:
        raise CheckpointError(f"{folder}: similarity_fn_name: " + unknown("similarity", similarity, _SIMILARITIES))
    found = replace(
        found,
        prompt=str(prompts[name]) if name is not None else "",
        similarity=_SIMILARITIES[similarity],
        max_len=longest(folder),
    )
    return found if pooling == "auto" else replace(found, pooling=pooling)  # type: ignore[arg-type]


def longest(folder: str | Path) -> int | None:
    """The longest text in tokens that sentence_bert_config.json tells of."""
    value = _table(Path(folder) / "sentence_bert_config.json").get("max_seq_length")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _steps(folder: Path, found: Sentences) -> Sentences:
    pooled, dense, normalize = False, list[Dense](), False
    for step in _list(folder / MODULES):
        kind, place = str(step.get("type", "")).rpartition(".")[2], str(step.get("path", ""))
        if place and not re.fullmatch(r"[\w-]+", place):
            raise CheckpointError(f"{folder / MODULES}: path {place!r:.80} is not a folder beside it")
        if kind == "Pooling" and not (pooled or dense or normalize):
            found, pooled = replace(found, pooling=_pooling(folder / place / "config.json")), True
        elif kind == "Dense" and pooled and not normalize:
            dense.append(_dense(folder / place))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer" or pooled:
            raise CheckpointError(
                f"{folder / MODULES}: {kind!r:.80} stands where Twofold does none: it does Transformer, Pooling, Dense "
                "and Normalize, in that order"
            )
    return replace(found, normalize=normalize, dense=tuple(dense))


def _pooling(path: Path) -> How:
    table = read_json(path)
    named = table.get("pooling_mode")
    asked = [named] if isinstance(named, str) else named or []
    asked += [key for key, on in table.items() if key.startswith("pooling_mode_") and on is True]
    known = _NAMES | _MODES
    if len(asked) != 1 or asked[0] not in known:
        raise CheckpointError(f"{path}: pooled are the first token, the last or the mean of all, not {asked}")
    if table.get("include_prompt") is False:
        raise CheckpointError(f"{path}: include_prompt false is not done: the prompt is pooled with the text")
    return known[asked[0]]


def _dense(folder: Path) -> Dense:
    table = read_json(folder / "config.json")
    act = str(table.get("activation_function", "Tanh")).rpartition(".")[2]
    if act not in _ACTIVATIONS:
        raise CheckpointError(f"{folder / 'config.json'}: " + unknown("activation_function", act, _ACTIVATIONS))
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors; pickled weights are not read: convert them")
    shard = Shard(file)
    shapes = {name: entry.shape for name, entry in shard.entries.items()}
    sizes = table.get("out_features"), table.get("in_features")
    wanted = {"linear.weight": sizes} | ({"linear.bias": sizes[:1]} if table.get("bias", True) else {})
    if shapes != wanted:
        raise CheckpointError(f"{file} holds {shapes}, and its config.json asks for {wanted}")
    weight, bias = (
        shard.tensor(name).to(torch.float32) if name in shapes else None for name in ("linear.weight", "linear.bias")
    )
    assert weight is not None
    return Dense(weight=weight, bias=bias, act=_ACTIVATIONS[act])


def _table(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _list(path: Path) -> list[dict[str, Any]]:
    found = read_json(path, list)
    if not all(isinstance(step, dict) for step in found):
        raise CheckpointError(f"{path} is not a list of tables")
    return found
