"""Offload: where a run's optimizer states, gradients and weights are while nobody works on them, and their ways.

                    in use                              kept, in a HostPool
    weights         a layer's, and the next one's       a file, mapped                        offload_weights.py
    gradients       the one that autograd just made     fp32 sums                             offload_gradients.py
    states          a tile, and those read ahead        masters and what the rule keeps       here

    thread   | bring 0 | bring 1 | bring 2 |     | bring 3 |
    step               | tile 0  | tile 1  | tile 2  | ...         a tile that was worked on is let go: the system
    system                       | write 0 | write 1 | ...         writes it behind the step's back

ZeRO-Offload (Ren et al. 2021) and ZeRO-Infinity (Rajbhandari et al. 2021), for one process. All of it is about where
numbers lie: the same kernels work on them in the same order, so a run has the bits of one that keeps all in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..core import ConfigError
from ..kernels.optimizer import PIECE, Shard
from ..models.decoder import Decoder
from ..platforms.host import HostPool
from .offload_config import OffloadConfig, Place
from .offload_gradients import KeptGradients
from .offload_weights import Visits, place_weights


class Offload:
    """The pools of one run; with the default settings there are none, and every move is nothing.

    Raises:
        ConfigError: something is to be on disk, and there is no directory for it.
        CapacityError: what is to be kept does not fit.
    """

    def __init__(self, config: OffloadConfig | None = None, directory: Path | None = None) -> None:
        self.config = config or OffloadConfig()
        folder = self.config.directory or directory
        self._pools: dict[Place, HostPool] = {}
        if "host" in self.config.places:
            self._pools["host"] = HostPool("host")
        if "disk" in self.config.places:
            self._pools["disk"] = HostPool("disk", folder)
        self._visits: Visits | None = None

    # ---------------------------------------------------------------------------------------- what is kept
    def place_weights(self, decoder: Decoder) -> None:
        """Memory for the weights of a decoder that was built on the meta device, and hooks that bring them."""
        pool = self._pools[self.config.parameters]
        weights = place_weights(decoder, pool)
        self._visits = Visits(decoder, weights, pool)

    def gradients(self, weights: Mapping[str, Tensor]) -> KeptGradients | None:
        """Where the gradients of these weights are summed; None: where autograd leaves them."""
        pool = self._pools.get(self.config.gradients)
        return pool and KeptGradients(weights, pool, limit=self.config.tile * self.config.buffers)

    def zeros(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """An fp32 tensor of zeros for the optimizer."""
        pool = self._pools.get(self.config.optimizer)
        if pool is None:
            return torch.zeros(*shape, device=device)
        return pool.allocate({name: (tuple(shape), torch.float32)})[name]

    # ---------------------------------------------------------------------------------------- their ways
    def tiles(self, shards: Sequence[Shard], whole: bool = False) -> Iterator[list[Shard]]:
        """The shards a group at a time, in order: those that lie on disk cut into tiles, read ahead and let go after.

        With nothing on disk that is all of them at once. `whole` cuts none, for rules that need whole tensors.
        """
        disk = self._pools.get("disk")
        if disk is None:
            yield list(shards)
            return
        todo = self._cut(shards, disk, whole)
        coming: deque[tuple[list[Shard], Future[None]]] = deque()
        for group in islice(todo, self.config.buffers):
            coming.append((group, _bring(disk, group)))
        while coming:
            here, arrived = coming.popleft()
            arrived.result()
            yield here
            disk.let_go(*(tensor for shard in here for tensor in tensors_of(shard)))
            for group in islice(todo, 1):
                coming.append((group, _bring(disk, group)))

    def let_go(self, *tensors: Tensor) -> None:
        """Nobody works on these now."""
        for pool in self._pools.values():
            pool.let_go(*tensors)

    def settle(self) -> None:
        """Between steps: nothing is worked on."""
        for pool in self._pools.values():
            pool.let_go(*pool.tensors.values())
            if not self.config.cache:
                pool.drop()
        if self._visits:
            self._visits.forget()

    def close(self) -> None:
        """Give all room back."""
        for pool in self._pools.values():
            pool.close()

    def _cut(self, shards: Sequence[Shard], disk: HostPool, whole: bool) -> Iterator[list[Shard]]:
        group: list[Shard] = []
        room = self.config.tile
        for shard in shards:
            each = sum(tensor.element_size() for tensor in tensors_of(shard) if disk.holds(tensor))
            start, count = 0, shard.weight.numel()
            while start < count:
                stop = count if whole or not each else min(count, start + max(room // each // PIECE, 1) * PIECE)
                if group and (stop - start) * each > room:
                    yield group
                    group, room = [], self.config.tile
                    continue
                group.append(shard if stop - start == count else part_of(shard, start, stop))
                room -= (stop - start) * each
                start = stop
        if group:
            yield group


def tensors_of(shard: Shard) -> tuple[Tensor, ...]:
    """All that an update of it touches."""
    narrow = () if shard.narrow is None else (shard.narrow,)
    return shard.weight, shard.grad, *shard.states, *narrow


def part_of(shard: Shard, start: int, stop: int) -> Shard:
    """Numbers [start, stop) of a shard, flat. Cuts fall where kernels cut, so sums over pieces keep their bits."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(-1)[start:stop]

    return replace(
        shard,
        weight=cut(shard.weight),
        grad=cut(shard.grad),
        states=tuple(map(cut, shard.states)),
        narrow=None if shard.narrow is None else cut(shard.narrow),
    )


def _bring(disk: HostPool, group: Sequence[Shard]) -> Future[None]:
    return disk.bring(*(tensor for shard in group for tensor in tensors_of(shard)), write=True)
