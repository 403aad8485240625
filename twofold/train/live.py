"""What is alive: bytes of every tensor that is made while entered, until its storage is let go, and who made it.

Counted from torch's own calls, so that it holds for whatever keeps a tensor alive: autograd, a checkpoint's arguments,
a recipe, a cache. Memory that kernels map by themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Enter it, and ask: `bytes()` now, by maker; `peak()` over all the time, without the storages of some tensors.

    `maker` names who is at work when a tensor is made. `known` are tensors that were there before.
    """

    def __init__(self, known: Iterable[Tensor] = (), maker: Callable[[], str] = str) -> None:
        super().__init__()
        self._maker = maker
        self._number: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._makers: dict[int, str] = {}
        self._events: list[tuple[int, int]] = []  # (number of a storage, bytes that came or went)
        for tensor in known:
            self._number[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not Tensor and kind is not Parameter for kind in types):
            return NotImplemented  # a sharded tensor's work is done on plain ones, and comes by again
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            if isinstance(item, Tensor):
                self._meet(item.untyped_storage())
        return out

    def bytes(self, without: Iterable[Tensor] = ()) -> Counter[str]:
        """Bytes that are alive now, by who made them, the storages of `without` left out."""
        found: Counter[str] = Counter()
        hidden = {self._number.get(tensor.untyped_storage()) for tensor in without}
        for storage, number in list(self._number.items()):
            if number >= 0 and number not in hidden:
                found[self._makers[number]] += storage.nbytes()
        return found

    def total(self) -> int:
        """Bytes that are alive now."""
        return sum(self.bytes().values())

    def peak(self, without: Iterable[Tensor | None] = ()) -> int:
        """The most bytes that were alive at once, the storages of `without` left out."""
        hidden = {self._number.get(x.untyped_storage()) for x in without if x is not None}
        now = most = 0
        for number, change in self._events:
            if number not in hidden:
                now += change
                most = max(most, now)
        return most

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._number:
            return
        number, size = len(self._makers), storage.nbytes()
        self._number[storage] = number
        self._makers[number] = self._maker()
        self._events.append((number, size))
        weakref.finalize(storage, self._events.append, (number, -size)).atexit = False
