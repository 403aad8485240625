"""Peers: the ranks that hold the other slices of a rank's tensors, for the few rules that must see tensors whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


class Peers(Protocol):
    """What LAMB and Muon ask. Every rank asks for the same tensors in the same order."""

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        """Row i of `values` summed over the ranks that hold a slice of tensor `names[i]`, each slice once."""
        ...

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """The whole tensor, of which `shard` is this rank's slice."""
        ...

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice of a whole tensor."""
        ...


class Alone:
    """Every tensor is whole."""

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        return values

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return shard

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        return whole


class Sliced:
    """Tensors that are sliced as their parameters are, those that are DTensors; the others are whole."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.cut = {name: weight for name, weight in weights.items() if isinstance(weight, DTensor)}

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        """One all-reduce for all tensors that are sliced over the same ranks."""
        rows: dict[dist.ProcessGroup, list[int]] = {}
        for row, name in enumerate(names):
            for group in self._groups(name):
                rows.setdefault(group, []).append(row)
        out = values.clone()
        for group, mine in rows.items():
            part = out[mine]
            dist.all_reduce(part, group=group)
            out[mine] = part
        return out

    def gather(self, name: str, shard: Tensor) -> Tensor:
        weight = self.cut.get(name)
        if weight is None:
            return shard
        mesh, cut = weight.device_mesh, weight.placements
        parts = DTensor.from_local(shard, mesh, cut, run_check=False, shape=weight.shape, stride=weight.stride())
        return parts.full_tensor()

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        weight = self.cut.get(name)
        if weight is None:
            return whole
        return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()

    def _groups(self, name: str) -> list[dist.ProcessGroup]:
        weight = self.cut.get(name)
        if weight is None:
            return []
        cut = (axis for axis, how in enumerate(weight.placements) if isinstance(how, Shard))
        return [weight.device_mesh.get_group(axis) for axis in cut]


def peers_of(weights: Mapping[str, Tensor]) -> Peers:
    """Those that the parameters' own meshes name."""
    return Sliced(weights) if any(isinstance(weight, DTensor) for weight in weights.values()) else Alone()
