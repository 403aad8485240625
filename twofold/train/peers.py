"""Peers: the ranks that hold the other slices of a rank's tensors, for the few rules that must see tensors whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..models.parallel import TensorParallel
from ..parallel import comm


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


class Divided:
    """Tensors that tensor parallel ranks divide, each rank's part as `inner` has it."""

    def __init__(self, tensor: TensorParallel, inner: Peers) -> None:
        self.tensor, self.inner = tensor, inner

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        out = self.inner.sum(names, values).clone()
        cut = [row for row, name in enumerate(names) if self.tensor.cut(name).segments]
        part = out[cut]
        dist.all_reduce(part, group=self.tensor.group)
        out[cut] = part
        return out

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """The parts of each fused piece end to end; parts are of one size, as those of a layer's matrices are."""
        mine, cut, ranks = self.inner.gather(name, shard), self.tensor.cut(name), self.tensor.ranks
        if not cut.segments:
            return mine
        joined = comm.together(mine, self.tensor.group, 0).view(ranks, *mine.shape)
        parts = [part.split([size // ranks for size in cut.segments], cut.dim) for part in joined]
        return torch.cat([piece for pieces in zip(*parts, strict=True) for piece in pieces], cut.dim)

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        return self.inner.scatter(name, self.tensor.part(name, whole))


def peers_of(weights: Mapping[str, Tensor], tensor: TensorParallel | None = None) -> Peers:
    """Those that the parameters' own meshes name, and the ranks of tensor parallel."""
    sliced = any(isinstance(weight, DTensor) for weight in weights.values())
    inner: Peers = Sliced(weights) if sliced else Alone()
    return inner if tensor is None else Divided(tensor, inner)
