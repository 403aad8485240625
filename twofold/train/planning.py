"""Planning: what a recipe would take of its machines, whether it fits, and which single change would make it fit.

recipe, ranks ─▶ layout ─▶ load of a rank ─▶ memory (forecast.py), traffic (traffic.py), FLOPs (meter.py)
                    ▲                              │
                    └── zero = "auto": 2, then 3 ◀─┘ the least that fits; of those that fit, the least traffic
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..core import ConfigError
from ..models.decoder import Decoder
from ..models.spec import ModelSpec
from ..models.weights import read_spec, spec_from
from ..parallel import Layout
from ..parallel.layout import lay_out
from . import adapters
from .build import hf_config
from .config import Recipe
from .forecast import Cut, Load, Memory, memory
from .meter import forward_flops, passes
from .policies import per_layer
from .traffic import traffic

RUNTIME = 320 << 20
"""Interpreter, torch and its collectives, resident in each process before any weight; measured."""
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
STATES = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1, "adagrad": 1, "muon": 2}
"""Numbers that a rule keeps of each weight, at most: Muon keeps one of a matrix, and two of what it leaves to AdamW."""
MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank may take: `available` bytes of its machine, on which there are `node` ranks."""

    available: int
    node: int

    def room(self) -> int:
        """Bytes of one rank, its runtime taken off."""
        return self.available // self.node - RUNTIME


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on so many ranks."""

    layout: Layout
    load: Load
    memory: Memory
    sent: dict[str, int]
    """Bytes that a rank sends in a step, by axis."""
    flops: int
    """Of one rank's share of a step."""
    fits: bool
    fixes: tuple[str, ...] = ()
    """What would make it fit, each alone; all of it together where nothing alone does; empty when it fits."""


def plan(recipe: Recipe, spec: ModelSpec, ranks: int, machine: Machine) -> Plan:
    """What a run of `ranks` would take.

    Raises:
        ConfigError: the recipe cannot be laid out on so many ranks.
    """
    layout = laid_out(recipe, spec, ranks, machine)
    load = load_of(recipe, spec, layout)
    found = held(recipe, spec, layout, load)
    fits = found.peak.total <= machine.room()
    again = sum(policy == "full" for policy in load.policies) / len(load.policies)
    tokens, longest = recipe.data.tokens_per_step, recipe.data.seq_len
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    return Plan(
        layout=layout,
        load=load,
        memory=found,
        sent=traffic(spec, layout, recipe.parallel, load),
        flops=int((passes(recipe.lora is not None) + again) * forward_flops(spec, lengths, tokens)) // ranks,
        fits=fits,
        fixes=() if fits else tuple(fixes(recipe, spec, ranks, machine)),
    )


def laid_out(recipe: Recipe, spec: ModelSpec, ranks: int, machine: Machine) -> Layout:
    """The recipe's layout; `zero = "auto"` is 2, and 3 where 2 does not fit and 3 takes less.

    Every rank must be given the same numbers, for all must choose the same.
    """
    layout = lay_out(recipe.parallel, ranks, machine.node)
    if recipe.parallel.zero != "auto" or layout.zero == 1:
        return layout
    first, room = _peak(recipe, spec, layout), machine.room()
    if first <= room:
        why = f"ZeRO {layout.stage}: no more traffic than copies, and it fits"
        return replace(layout, why=(why,))
    other = lay_out(replace(recipe.parallel, zero=3), ranks, machine.node)
    last = _peak(recipe, spec, other)
    if last >= first:
        return replace(layout, why=(f"ZeRO {layout.stage}: it does not fit, and neither does 3, which takes as much",))
    which = "fits" if last <= room else "takes the least, though it does not fit either"
    return replace(other, why=(f"ZeRO 3: ZeRO 2 lacks {(first - room) / 2**20:.0f} MiB a rank; 3 {which}",))


def load_of(recipe: Recipe, spec: ModelSpec, layout: Layout) -> Load:
    """How a rank's share of a step is divided (`share.py`), and how it keeps its numbers."""
    data, model = recipe.data, recipe.model
    mine = -(-data.tokens_per_step // layout.data)
    if layout.pp > 1:
        mine = -(-mine // layout.pp) * layout.pp
    micro = min(data.micro_tokens or mine, mine // layout.pp)
    parts = -(-mine // max(1, micro))
    parts = -(-parts // layout.pp) * layout.pp
    states = STATES.get(recipe.optimizer.name, 1 if recipe.optimizer.momentum else 0)
    return Load(
        tokens=-(-micro // layout.sp) * (recipe.draft_head.depth if recipe.draft_head else 1),
        parts=parts,
        size=SIZES[model.dtype],
        states=states,
        policies=tuple(per_layer(model.recompute, len(spec.layers), model.recompute_layers)),
        flight=parts if recipe.parallel.pp_schedule == "gpipe" else min(layout.pp, parts),
        feedback=recipe.parallel.comm == "onebit",
        trained=adapters.share(spec, recipe.lora) if recipe.lora else 1.0,
        beside=_beside(recipe),
    )


def _beside(recipe: Recipe) -> int:
    """Bytes of the model that a draft head learns beside, whole on every rank."""
    if recipe.draft_head is None or recipe.model.from_ is None:
        return 0
    return sum(map(math.prod, _shapes(read_spec(recipe.model.from_)))) * SIZES[recipe.model.dtype]


def _shapes(spec: ModelSpec) -> Iterator[tuple[int, ...]]:
    return (tuple(parameter.shape) for parameter in Decoder(spec, device="meta").parameters())


def held(recipe: Recipe, spec: ModelSpec, layout: Layout, load: Load) -> Memory:
    """Bytes of the fullest rank: of a pipeline the first holds most activations, the last the logits."""
    plain = recipe.model.dtype == "fp32" and recipe.parallel.comm == "plain"
    cut = Cut.of(layout, in_place=plain and recipe.offload.gradients == "none")
    found = []
    for rank in range(layout.pp):
        count = layout.pp * recipe.parallel.pp_stages
        ends = [len(spec.layers) * (stage + 1) // count for stage in range(count)]
        spans = [range(start, end) for start, end in zip([0, *ends], ends)]
        own = [layer for stage in range(rank, count, layout.pp) for layer in spans[stage]]
        flight = min(load.flight, layout.pp - rank) if recipe.parallel.pp_schedule != "gpipe" else load.flight
        found.append(memory(spec, cut, replace(load, flight=flight), tp=layout.tp, layers=own))
    return _offloaded(recipe, max(found, key=lambda it: it.peak.total))


def _offloaded(recipe: Recipe, found: Memory) -> Memory:
    """With [offload] optimizer on disk: states and masters are read a tile at a time."""
    if recipe.offload.optimizer != "disk":
        return found
    tiles, peak = min(found.peak.optimizer, recipe.offload.tile * recipe.offload.buffers), found.peak
    masters = found.built - peak.weights
    return Memory(
        built=found.built - masters, kept=found.kept - peak.optimizer + tiles, peak=replace(peak, optimizer=tiles)
    )


def fixes(recipe: Recipe, spec: ModelSpec, ranks: int, machine: Machine) -> Iterator[str]:
    """Each single change that makes it fit; where there is none, what all of them together come to."""
    found = False
    for kind in (_stages, _recompute, _micro, _offload, _ranks):
        for said, changed, count in kind(recipe, ranks):
            try:
                layout = laid_out(changed, spec, count, machine)
            except ConfigError:
                continue
            if _peak(changed, spec, layout) <= machine.room():
                found = True
                yield said
                break
    if found:
        return
    least = recipe
    for kind in (_stages, _recompute, _micro, _offload):
        least = [least, *(changed for _, changed, _ in kind(least, ranks))][-1]  # the last saves most
    lacks = _peak(least, spec, laid_out(least, spec, ranks, machine)) - machine.room()
    together = "ZeRO 3, recompute, the smallest micro_tokens and offload together"
    if lacks <= 0:
        yield f"no single change; {together} fit"
    else:
        yield f"nothing on {ranks} ranks: {together} still lack {lacks / 2**20:.0f} MiB a rank; take more machines"


Change = tuple[str, Recipe, int]


def _stages(recipe: Recipe, ranks: int) -> Iterator[Change]:
    now = recipe.parallel.zero
    if ranks > 1 and now in (0, 1, 2):
        for stage in (1, 2, 3):
            if stage > now:
                yield f"parallel.zero = {stage}", replace(recipe, parallel=replace(recipe.parallel, zero=stage)), ranks


def _recompute(recipe: Recipe, ranks: int) -> Iterator[Change]:
    for policy in ("selective", "full"):
        if recipe.model.recompute not in (policy, "full"):
            model = replace(recipe.model, recompute=policy, recompute_layers={})
            yield f'model.recompute = "{policy}"', replace(recipe, model=model), ranks


def _micro(recipe: Recipe, ranks: int) -> Iterator[Change]:
    data = recipe.data
    tokens = data.micro_tokens or data.tokens_per_step
    while tokens > data.seq_len:
        tokens = max(data.seq_len, tokens // 2)
        yield f"data.micro_tokens = {tokens}", replace(recipe, data=replace(data, micro_tokens=tokens)), ranks


def _offload(recipe: Recipe, ranks: int) -> Iterator[Change]:
    if recipe.offload.optimizer == "none":
        offload = replace(recipe.offload, optimizer="disk")
        yield 'offload.optimizer = "disk"', replace(recipe, offload=offload), ranks


def _ranks(recipe: Recipe, ranks: int) -> Iterator[Change]:
    more = 2 * ranks
    while more <= MOST_RANKS:
        yield f"{more} ranks, as many on each machine as now", recipe, more
        more *= 2


def _peak(recipe: Recipe, spec: ModelSpec, layout: Layout) -> int:
    return held(recipe, spec, layout, load_of(recipe, spec, layout)).peak.total


def spec_of(recipe: Recipe) -> ModelSpec:
    """What the recipe trains; a directory's config.json alone is read."""
    return spec_from(hf_config(recipe))
