"""Rotary settings in every spelling that checkpoints have, as one Rope.

`rope_parameters` (transformers 5, one table or one for each type of layer), `rope_scaling` with `rope_theta` beside it
(before), and the older `rotary_pct`, `rope_pct`, `rotary_emb_base`.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import CheckpointError, unknown
from ..reader import Reader
from ..spec import DynamicNtk, LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling, Yarn

LAYER_TYPES = {"full_attention", "sliding_attention"}
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_from(
    hf: Reader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> Rope:
    """Read a model's rotary settings.

    `theta` and `partial` are the family's defaults for absent keys; without `partial` only whole heads rotate.
    `layer_type` is for families that may have a table for each type of layer.

    Raises:
        CheckpointError: an unknown kind of scaling, an unread key in its table, or two tables that disagree.
    """
    theta = hf.get(float, "rope_theta", "rotary_emb_base", default=theta)
    if partial is not None:
        partial = hf.get(float, "partial_rotary_factor", "rotary_pct", "rope_pct", default=partial)
    else:
        hf.expect("partial_rotary_factor", 1, None)
    tables = [(key, hf.get(dict, key, default=None)) for key in ("rope_parameters", "rope_scaling")]
    ropes = []
    for key, table in tables:
        if table is None:
            continue
        where = key + "."
        if any(isinstance(value, dict) for value in table.values()):
            if layer_type is None or not set(table) <= LAYER_TYPES:
                raise CheckpointError(f"config.json: this family has one rope for all layers, not one for each: {key}")
            table, where = table.get(layer_type) or {}, f"{where}{layer_type}."
        ropes.append(_rope(hf, Reader(table, where), head_dim, theta, partial, interleaved))
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise CheckpointError("config.json: rope_parameters and rope_scaling disagree; keep one of them")
    return ropes[0] if ropes else _rope(hf, Reader({}), head_dim, theta, partial, interleaved)


def _rope(hf: Reader, table: Reader, head_dim: int, theta: float, partial: float | None, interleaved: bool) -> Rope:
    kind = table.get(str, "rope_type", "type", default="default")
    theta = table.get(float, "rope_theta", default=theta)
    if partial is None:
        table.expect("partial_rotary_factor", 1, None)
        partial = 1.0
    partial = table.get(float, "partial_rotary_factor", default=partial)
    table.ignore("finetuned", "original_max_position_embeddings")
    scaling = _scaling(hf, table, kind)
    table.finish()
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise CheckpointError(
            f"config.json: rotary positions need an even number of dimensions up to head_dim {head_dim}, not {dim} "
            f"(partial_rotary_factor {partial})"
        )
    if isinstance(scaling, LongRope) and not len(scaling.short) == len(scaling.long) == dim // 2:
        raise CheckpointError(f"config.json: longrope needs {dim // 2} short and {dim // 2} long factors")
    return Rope(theta=theta, dim=dim, interleaved=interleaved, scaling=scaling)


def _scaling(hf: Reader, table: Reader, kind: str) -> RopeScaling | None:
    if kind == "default":
        return None
    limit = hf.size("max_position_embeddings", "n_positions", default=2048)
    if kind == "linear":
        return LinearScaling(factor=table.get(float, "factor"))
    if kind == "dynamic":
        return DynamicNtk(factor=table.get(float, "factor"), original=limit)
    # Phi-3 keeps the original length beside the table, and that one wins.
    original = hf.get(int, "original_max_position_embeddings", default=None) or table.size(
        "original_max_position_embeddings", default=limit
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=table.get(float, "factor"),
            low=table.get(float, "low_freq_factor"),
            high=table.get(float, "high_freq_factor"),
            original=original,
        )
    factor = table.get(float, "factor", default=limit / original)
    attention_factor = table.get(float, "attention_factor", default=None)
    if kind == "yarn":
        return Yarn(
            factor=factor,
            original=original,
            beta_fast=table.get(float, "beta_fast", default=32.0),
            beta_slow=table.get(float, "beta_slow", default=1.0),
            attention_factor=attention_factor,
            mscale=table.get(float, "mscale", default=None),
            mscale_all_dim=table.get(float, "mscale_all_dim", default=None),
            truncate=table.get(bool, "truncate", default=True),
        )
    if kind in ("longrope", "su"):
        return LongRope(
            short=_numbers(table, "short_factor"),
            long=_numbers(table, "long_factor"),
            original=original,
            factor=factor,
            attention_factor=attention_factor,
        )
    raise CheckpointError("config.json: " + unknown("rope_type", kind, KINDS))


def _numbers(table: Reader, key: str) -> tuple[float, ...]:
    values: list[Any] = table.get(list, key)
    if not all(isinstance(v, int | float) and v > 0 for v in values):
        raise CheckpointError(f"config.json: '{key}' must be a list of positive numbers")
    return tuple(float(v) for v in values)
