"""Storages: every byte of tensors that is alive, counted exactly, op by op.

Entered before a model is built, it meets each tensor's storage when an op reads or makes it, holds it weakly, and adds
up `nbytes` of those still alive whenever one is new or has another size. Asking the storage, and not remembering its
size, is what makes it exact for FSDP2, which lets gathered parameters go by resizing their storages to nothing and
calls no op for it. What autograd saves, a collective's buffers and an optimizer's states are tensors like all others;
views share a storage and count once. Memory that a kernel takes and gives back by itself within one op is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """`now` bytes, and the most there were at once inside of each `during`; on one device and thread."""

    def __init__(self) -> None:
        super().__init__()
        self._held: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its work is done on plain ones, and comes by again
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        grown = False
        for item in tree_iter((args, kwargs, out)):
            if type(item) in (Tensor, Parameter) and item.device.type != "meta":
                storage = item.untyped_storage()
                size = storage.nbytes()
                if self._held.get(storage) != size:
                    self._held[storage], grown = size, True
        if grown:
            self._most = max(self._most, self.now())
        return out

    def now(self) -> int:
        """Bytes that are alive."""
        return sum(storage.nbytes() for storage in self._held)

    def sizes(self) -> list[int]:
        """Bytes of each storage that is alive, the largest first."""
        return sorted((storage.nbytes() for storage in self._held), reverse=True)

    @contextmanager
    def during(self) -> Iterator[list[int]]:
        """A list that has the peak of the block when it has ended."""
        self._most, found = self.now(), list[int]()
        yield found
        found.append(self._most)
