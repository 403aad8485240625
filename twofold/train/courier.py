"""Courier: brings what ranks hold of weights to the ranks that write them, one whole tensor at a time.

held         rank 0  rank 1  rank 2
written by      │       │       │       each sends its boxes of a tensor to the rank that writes it, all at once;
rank 0     ◄────┴───────┴───────┘       a writer takes them as its files come to them, one whole tensor at a time
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.shards import DTYPES
from ..parallel.comm import Group
from .pieces import Box, Pieces, Whole, full, view


class Courier:
    """All ranks send the same list in the same order; each then asks for `whole` tensors of its own in that order."""

    def __init__(self, pieces: Pieces, wholes: Mapping[str, Whole], rank: int, group: Group) -> None:
        self._pieces, self._wholes, self._rank, self._group = pieces, wholes, rank, group
        self._sent: list[tuple[Tensor, Any]] = []
        self._due: deque[str] = deque()
        self._last: tuple[str, Tensor] | None = None

    def send(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Send what others want: (name, the rank that writes it); the same once for a writer."""
        for name, writer in dict.fromkeys(wanted):
            if writer == self._rank:
                self._due.append(name)
                continue
            for box, giver in self._wholes[name].givers:
                if giver == self._rank:
                    data = _bytes(self._pieces[name].at(box))
                    self._sent.append((data, dist.isend(data, group=self._group, group_dst=writer)))

    def whole(self, name: str) -> Tensor:
        """A tensor that is this rank's to write; those before it that nobody asked for are let go."""
        while self._last is None or self._last[0] != name:
            self._last = None
            due = self._due.popleft()
            self._last = due, self._receive(due)
        return self._last[1]

    def finish(self) -> None:
        """Take what is still on its way here, and see what was sent arrive."""
        self._last = None
        while self._due:
            self._receive(self._due.popleft())
        for _, sending in self._sent:
            sending.wait()
        self._sent = []

    def _receive(self, name: str) -> Tensor:
        whole = self._wholes[name]
        dtype = DTYPES[whole.dtype]
        if whole.givers == ((full(whole.shape), self._rank),):
            return self._pieces[name].at(full(whole.shape))
        out = torch.empty(whole.shape, dtype=dtype)
        for box, giver in whole.givers:
            place = view(out, box)
            place.copy_(self._pieces[name].at(box) if giver == self._rank else self._from(giver, box, dtype))
        return out

    def _from(self, giver: int, box: Box, dtype: torch.dtype) -> Tensor:
        part = torch.empty([last - first for first, last in box], dtype=dtype)
        dist.recv(_bytes(part), group=self._group, group_src=giver)
        return part


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
