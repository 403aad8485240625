"""Traffic: the bytes that one rank sends in a step, by the axis they travel along, from shapes alone.

    zero       gathers and reductions of parameters, by stage      (zero.py), narrower with parallel.comm
    replicate  sums of gradients between copies                    once a reduction
    tp         two sums a layer forward, two back                  of the hidden states, and at each end one
    sp         ulysses: q, k, v and the output exchanged, twice    ring: keys and values passed on, twice
    pp         hidden states to the next stage, gradients back
    ep         tokens to their experts and back, twice

"sent" is counted as in `collectives.py`: a gather of B bytes sends B · (N - 1) / N, a sum twice that.
"""

from __future__ import annotations

from ..models.cuts import local_spec
from ..models.spec import Mixture, ModelSpec
from ..parallel import Layout, ParallelConfig
from ..parallel.compress import BLOCK
from .forecast import FULL, Group, Load, groups_of

_SCALE = 4 / BLOCK
_GATHERED = {"int8": 1 + _SCALE, "int4": 1 + _SCALE}
_REDUCED = {"int8": 1 + _SCALE, "int4": 0.5 + _SCALE, "onebit": 0.125 + _SCALE}
"""Bytes of a number on the wire, where parallel.comm makes it narrower."""


def traffic(spec: ModelSpec, layout: Layout, config: ParallelConfig, load: Load) -> dict[str, int]:
    """Bytes that one rank sends in a step, by axis; axes of one rank are left out."""
    own = local_spec(spec, layout.tp, 0) if layout.tp > 1 else spec
    each = range(-(-len(spec.layers) // layout.pp))  # the first stage of a pipeline stands for all
    *layers, root = groups_of(own, layout.zero, each)
    numbers = load.tokens * load.parts  # tokens of a step on this rank
    hidden = numbers * spec.hidden * load.act
    found = {
        "zero": _zero(layers, root, layout, config, load),
        "replicate": _copies([*layers, root], layout, load),
        "tp": (4 * len(layers) + 2) * 2 * hidden * (layout.tp - 1) // layout.tp,
        "sp": sum(_sequence(own, index, layout, config, numbers * load.act) for index in each),
        "pp": 2 * hidden if layout.pp > 1 else 0,
        "ep": sum(_experts(spec, index, layout, hidden) for index in each),
    }
    return {axis: sent for axis, sent in found.items() if sent}


def volume(layers: list[Group], root: Group, layout: Layout, load: Load) -> tuple[int, int]:
    """Numbers gathered and reduced in a step along `zero`, each rank's slices padded to one size."""
    ranks, parts = layout.zero, load.parts
    inner, outer = sum(group.shard for group in layers) * ranks, root.shard * ranks
    if layout.stage == 3:  # the root stays until its backward pass: the loss reads its weights
        return parts * (2 * inner + outer), parts * (inner + outer)
    return inner + outer, (parts if layout.stage == 2 else 1) * (inner + outer)


def _zero(layers: list[Group], root: Group, layout: Layout, config: ParallelConfig, load: Load) -> int:
    ranks = layout.zero
    if ranks == 1:
        return 0
    gathered, reduced = volume(layers, root, layout, load)
    reduced = int(reduced * load.trained)
    total = gathered * _GATHERED.get(config.comm, load.size) + reduced * _REDUCED.get(config.comm, FULL)
    return int(total * (ranks - 1) / ranks)


def _copies(groups: list[Group], layout: Layout, load: Load) -> int:
    times = load.parts if layout.stage >= 2 else 1
    slices = int(sum(group.shard for group in groups) * load.trained) * FULL * times
    return 2 * slices * (layout.replicate - 1) // layout.replicate


def _sequence(spec: ModelSpec, index: int, layout: Layout, config: ParallelConfig, each: int) -> int:
    mixer = spec.layers[index].mixer
    if config.sp_kind == "ring":
        hops = (
            2 * (layout.sp - 1) + 4 * layout.sp
        )  # keys and values; back they have their gradients with them, and go home
        return hops * mixer.kv_width * each
    return 2 * (2 * mixer.q_width + 2 * mixer.kv_width) * each * (layout.sp - 1) // layout.sp


def _experts(spec: ModelSpec, index: int, layout: Layout, hidden: int) -> int:
    ffn = spec.layers[index].ffn
    chosen = ffn.top_k if isinstance(ffn, Mixture) else 0
    return 4 * chosen * hidden * (layout.ep - 1) // layout.ep
