"""Layout: which rank stands where. Plain Python, so that a mesh can be reasoned about before anything starts.

rank = (((pp * replicate + r) * shard + s) * sp + q) * tp + t          tp is innermost: neighbours talk most

data   replicate x shard      ranks that read different sequences
zero   shard x sp             ranks that parameters, gradients and optimizer states are divided among
ep     the inner part of zero: ranks with different experts; edp, the outer part, has the same ones
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from ..core import ConfigError
from .config import ParallelConfig

Axis = Literal["pp", "replicate", "shard", "sp", "tp", "data", "zero", "ep", "edp", "tokens", "loss", "norm", "world"]

_INNER = ("pp", "replicate", "edp", "ep", "tp")
_OUTER = ("pp", "replicate", "shard", "sp", "tp")
_MADE_OF: dict[str, tuple[str, ...]] = {
    "data": ("replicate", "shard"),
    "zero": ("shard", "sp"),
    "tokens": ("replicate", "shard", "sp"),
    "loss": ("pp", "replicate", "shard", "sp"),
    "norm": ("pp", "shard", "sp", "tp"),
    "world": _OUTER,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes; their product is the number of ranks.

    `loss` spans the ranks whose losses add up, `tokens` those of them that have the same layers, `norm` those whose
    shards make up the whole model once.
    """

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    stage: Literal[0, 1, 2, 3] = 0
    why: tuple[str, ...] = field(default=(), compare=False)
    """What "auto" chose, and why: one line a choice."""

    def __post_init__(self) -> None:
        if self.zero % self.ep:
            raise ConfigError(
                f"parallel.ep is {self.ep}, but {self.zero} ranks share the parameters: ep must divide them "
                f"(here {_near(self.ep, _divisors(self.zero))})"
            )

    @property
    def world(self) -> int:
        return self.pp * self.replicate * self.shard * self.sp * self.tp

    @property
    def data(self) -> int:
        return self.replicate * self.shard

    @property
    def zero(self) -> int:
        return self.shard * self.sp

    @property
    def edp(self) -> int:
        return self.zero // self.ep

    def size(self, axis: Axis) -> int:
        """Ranks along an axis."""
        size = 1
        for part in _MADE_OF.get(axis, (axis,)):
            size *= getattr(self, part)
        return size

    def groups(self, axis: Axis) -> list[list[int]]:
        """The ranks of every group along an axis, each in order."""
        parts = _MADE_OF.get(axis, (axis,))
        names = _INNER if axis in ("ep", "edp") else _OUTER
        together: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(product(*(range(getattr(self, name)) for name in names))):
            apart = tuple(at for name, at in zip(names, place) if name not in parts)
            together.setdefault(apart, []).append(rank)
        return list(together.values())

    def place(self, rank: int, axis: Axis) -> int:
        """Where a rank stands in its group along an axis."""
        return next(group.index(rank) for group in self.groups(axis) if rank in group)

    def __str__(self) -> str:
        sizes = [f"{name} {getattr(self, name)}" for name in ("pp", "replicate", "shard", "sp", "tp", "ep")]
        wanted = [text for text in sizes if not text.endswith(" 1")]
        return ", ".join([*wanted, f"ZeRO {self.stage}"]) if self.world > 1 else "one process"


def lay_out(config: ParallelConfig, world: int, node: int | None = None) -> Layout:
    """Divide `world` ranks, `node` of them on each machine, as a recipe asks.

    Raises:
        ConfigError: the axes do not multiply to the ranks there are; it says which numbers would.
    """
    fixed = config.tp * config.sp * config.pp
    if world % fixed:
        raise ConfigError(
            f"parallel.pp x sp x tp is {config.pp} x {config.sp} x {config.tp} = {fixed}, which does not divide the "
            f"{world} ranks of this run: start {_near(world, range(fixed, 2 * world + fixed, fixed))} ranks, or "
            f"make one of them smaller"
        )
    dp = world // fixed if config.dp == "auto" else config.dp
    if dp * fixed != world:
        raise ConfigError(
            f"parallel.dp is {config.dp}, but {world} ranks over pp x sp x tp = {fixed} leave {world // fixed}: "
            f'set dp = {world // fixed} or "auto", or start {dp * fixed} ranks'
        )
    why: list[str] = []
    stage = config.zero
    if stage == "auto":
        stage = 0 if dp * config.sp == 1 else 2
        if world > 1:
            why.append(
                f"ZeRO {stage}: " + ("nothing to share" if stage == 0 else "no more traffic than copies, less memory")
            )
    replicate = 1
    if stage == "hybrid":
        replicate, stage = _nodes(config, dp, node, fixed), 3
    elif stage == 0:
        replicate = dp
    return Layout(
        pp=config.pp, replicate=replicate, shard=dp // replicate, sp=config.sp, tp=config.tp, ep=config.ep,
        stage=stage, why=tuple(why),
    )  # fmt: skip


def _nodes(config: ParallelConfig, dp: int, node: int | None, fixed: int) -> int:
    """How many copies "hybrid" keeps: one a node."""
    ranks = config.node or node
    if ranks is None:
        raise ConfigError('parallel.zero = "hybrid" needs parallel.node, the ranks of one machine')
    within = max(1, ranks // fixed)
    if dp % within:
        raise ConfigError(
            f'parallel.zero = "hybrid" divides parameters within a node of {ranks} ranks ({within} along dp), '
            f"which does not divide dp = {dp}: set parallel.node to {_near(ranks, [fixed * n for n in _divisors(dp)])}"
        )
    return dp // within


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _near(wanted: int, allowed: Iterable[int]) -> int:
    return min(allowed, key=lambda n: (abs(n - wanted), n))
