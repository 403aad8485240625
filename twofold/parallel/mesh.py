"""Mesh: the process groups of a layout, made once and asked for by the name of an axis."""

from __future__ import annotations

from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .layout import Axis, Layout
from .watch import Group

_TELLING: tuple[Axis, ...] = ("zero", "tp", "sp", "pp", "ep", "edp", *get_args(Axis))


class Mesh:
    """Where this rank stands in a Layout. Alone it has no groups, and every sum is what was put in.

    Making one is a collective: all ranks make the same.
    """

    def __init__(self, layout: Layout | None = None, rank: int = 0, device: str = "cpu") -> None:
        self.layout = layout or Layout()
        self.rank_in_world, self.device = rank, device
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._known: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if self.layout.world > 1:
            for axis in get_args(Axis):
                self._make(axis)

    def _make(self, axis: Axis) -> None:
        for ranks in self.layout.groups(axis):
            if len(ranks) == 1 and axis not in ("replicate", "zero", "edp"):
                continue  # fully_shard asks for a group even of one
            key = tuple(ranks)
            if key not in self._known:
                self._known[key] = dist.new_group(ranks)
            if self.rank_in_world in ranks:
                self._groups[axis] = self._known[key]

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank_in_world == 0

    @property
    def alone(self) -> bool:
        return self.layout.world == 1

    def size(self, axis: Axis) -> int:
        return self.layout.size(axis)

    def rank(self, axis: Axis) -> int:
        """This rank's place along an axis."""
        return self.layout.place(self.rank_in_world, axis)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The group along an axis; None where this rank is alone on it."""
        return self._groups.get(axis) if self.size(axis) > 1 else None

    def groups(self) -> dict[str, Group]:
        """This rank's groups by torch's names: the axis that each stands for (the most telling), and its ranks."""
        found: dict[str, Group] = {}
        for axis in _TELLING:
            if axis in self._groups:
                ranks = next(group for group in self.layout.groups(axis) if self.rank_in_world in group)
                found.setdefault(self._groups[axis].group_name, Group(name=axis, ranks=tuple(ranks)))
        return found

    def sharded(self, *, experts: bool = False) -> DeviceMesh:
        """What FSDP2 divides parameters over: (zero) or (replicate, zero); for experts edp in place of zero."""
        inner: Axis = "edp" if experts else "zero"
        mine = next(group for group in self.layout.groups(inner) if self.rank_in_world in group)
        if self.layout.replicate == 1:
            return DeviceMesh.from_group(self._groups[inner], self.device, mine, mesh_dim_names=(inner,))
        copies = {rank: group for group in self.layout.groups("replicate") for rank in group}
        block = [[copies[rank][copy] for rank in mine] for copy in range(self.layout.replicate)]
        groups = [self._groups["replicate"], self._groups[inner]]
        return DeviceMesh.from_group(groups, self.device, torch.tensor(block), mesh_dim_names=("replicate", inner))

    def sum(self, axis: Axis, *values: float) -> tuple[float, ...]:
        """Numbers added up along an axis, in double; the same on every rank of it."""
        group = self.group(axis)
        if group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=group)
        return tuple(total.tolist())

    def total(self, axis: Axis, tensor: Tensor) -> Tensor:
        """A tensor with what all ranks of an axis have in it added up, in place."""
        group = self.group(axis)
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor

    def broadcast(self, tensor: Tensor, axis: Axis = "world") -> Tensor:
        """A tensor of the axis's first rank, on all of it."""
        group = self.group(axis)
        if group is not None:
            dist.broadcast(tensor, group=group, group_src=0)
        return tensor

    def wait(self) -> None:
        """Until every rank is here."""
        if not self.alone:
            dist.barrier(group=self.group("world"))
