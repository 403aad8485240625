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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.optimizer import PIECE, Shard
from ..models.decoder import Decoder
from ..platforms.host import HostPool
from .offload_config import OffloadConfig
from .offload_gradients import KeptGradients
from .offload_weights import Visits, move_weights, place_weights

Place = tuple[int, slice | None]
"""The number of a row of tensors, and which of their numbers; None: all."""


class Offload:
    """The pools of one run; with the default settings there are none, and every move is nothing.

    Raises:
        ConfigError: something is to be on disk, and there is no directory for it.
        CapacityError: what is to be kept does not fit.
    """

    def __init__(self, config: OffloadConfig | None = None, directory: Path | None = None) -> None:
        self.config = config or OffloadConfig()
        folder = self.config.directory or directory
        self._pools: dict[str, HostPool] = {}
        if "host" in self.config.places:
            self._pools["host"] = HostPool("host")
        if "disk" in self.config.places:
            self._pools["disk"] = HostPool("disk", folder)
        self._visits: Visits | None = None

    # ---------------------------------------------------------------------------------------- what is kept
    @property
    def keeps_weights(self) -> bool:
        """Whether weights get their memory here, and a decoder is to be built without."""
        return self.config.parameters != "none"

    @property
    def keeps_states(self) -> bool:
        """Whether the optimizer's states are kept by the host, which then works on them."""
        return self.config.optimizer != "none"

    def place_weights(self, decoder: Decoder) -> None:
        """Memory for the weights of a decoder that was built on the meta device, and hooks that bring them."""
        pool = self._pools[self.config.parameters]
        weights = place_weights(decoder, pool)
        self._visits = Visits(decoder, weights, pool)

    def move_weights(self, decoder: Decoder) -> None:
        """The same for a decoder whose weights FSDP2 has divided; nothing when they are kept where they are."""
        if self.keeps_weights:
            pool = self._pools[self.config.parameters]
            self._visits = Visits(decoder, move_weights(decoder, pool), pool)

    def gradients(
        self, weights: Mapping[str, Tensor], local: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> KeptGradients | None:
        """Where the gradients of these weights, this rank's slices of them, are summed; None: where they come up."""
        pool = self._pools.get(self.config.gradients)
        limit = self.config.tile * self.config.buffers
        return None if pool is None else KeptGradients(weights, pool, local, limit=limit)

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
        for group in self._walk([tensors_of(shard) for shard in shards], whole, write=True):
            yield [shards[at] if part is None else cut(shards[at], part) for at, part in group]

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
        """The same for tensors that are only looked at, by name."""
        named = list(tensors.items())
        for group in self._walk([(tensor,) for _, tensor in named], whole=False, write=False):
            yield [(named[at][0], named[at][1] if part is None else named[at][1].view(-1)[part]) for at, part in group]

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

    def _walk(self, rows: Sequence[Sequence[Tensor]], whole: bool, write: bool) -> Iterator[list[Place]]:
        """Groups of places whose tensors are in memory while the caller has them."""
        disk = self._pools.get("disk")
        if disk is None:
            yield [(at, None) for at in range(len(rows))]
            return
        todo = self._groups(rows, disk, whole)
        coming: deque[tuple[list[Place], list[Tensor], Future[None]]] = deque()

        def bring(groups: Iterable[list[Place]]) -> None:
            for group in groups:
                parts = [x if part is None else x.view(-1)[part] for at, part in group for x in rows[at]]
                coming.append((group, parts, disk.bring(*parts, write=write)))

        bring(islice(todo, self.config.buffers))
        while coming:
            group, parts, arrived = coming.popleft()
            arrived.result()
            yield group
            disk.let_go(*parts)
            bring(islice(todo, 1))

    def _groups(self, rows: Sequence[Sequence[Tensor]], disk: HostPool, whole: bool) -> Iterator[list[Place]]:
        """Places whose tensors on disk are of `tile` bytes together; cut where kernels cut, so sums keep their bits."""
        group: list[Place] = []
        room = self.config.tile
        for at, row in enumerate(rows):
            each = sum(tensor.element_size() for tensor in row if disk.holds(tensor))
            start, count = 0, row[0].numel()
            while start < count:
                fits = max(room // max(each, 1) // PIECE, 1) * PIECE
                stop = count if whole or not each else min(count, start + fits)
                if group and (stop - start) * each > room:
                    yield group
                    group, room = [], self.config.tile
                    continue
                group.append((at, slice(start, stop) if stop - start < count else None))
                room -= (stop - start) * each
                start = stop
        if group:
            yield group


def tensors_of(shard: Shard) -> tuple[Tensor, ...]:
    """All that an update of it touches."""
    narrow = () if shard.narrow is None else (shard.narrow,)
    return shard.weight, shard.grad, *shard.states, *narrow


def cut(shard: Shard, part: slice) -> Shard:
    """Some numbers of a shard, flat."""
    weight, grad, *states = (tensor.view(-1)[part] for tensor in tensors_of(shard))
    narrow = states.pop() if shard.narrow is not None else None
    return replace(shard, weight=weight, grad=grad, states=tuple(states), narrow=narrow)
