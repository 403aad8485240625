"""Working: the memory that a program's stages work in, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels.grouped import Places
from ..kernels.moe import Mixing
from ..kernels.panels import Rounding
from .beside import Beside
from .spec import Mixture


class Working:
    """For at most `tokens` tokens of a model that is `hidden` wide."""

    def __init__(self, tokens: int, hidden: int) -> None:
        self._rows, self._hidden = tokens, hidden
        self._kept: list[object] = []
        self._named: dict[tuple[str, int], Tensor] = {}
        self._mixings: dict[tuple[int, int, int], Mixing] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that the stages work in; weights are not among it."""
        every = {id(x): x for x in _tensors({name: held for name, held in vars(self).items() if name != "decoder"})}
        return sum(x.nbytes for x in every.values())

    def _mixing(self, ffn: Mixture) -> Mixing:
        """What mixtures of one size work in, one after another."""
        key = (ffn.experts, ffn.top_k, ffn.width)
        if key not in self._mixings:
            self._mixings[key] = Mixing(self._rows, *key, self._hidden)
        return self._mixings[key]

    def _shared(self, name: str, width: int) -> Tensor:
        """Memory [T, width] that layers use one after another."""
        if (name, width) not in self._named:
            self._named[name, width] = torch.empty(self._rows, width)
        return self._named[name, width]

    def _keep(self, x: Tensor) -> Tensor:
        self._kept.append(x)
        return x

    def _kept_tensor(self, *shape: int) -> Tensor:
        return self._keep(torch.empty(shape))


def _tensors(held: object) -> Iterator[Tensor]:
    """The tensors in a value of plain containers and of what the stages work in; parameters are not among them."""
    if isinstance(held, Tensor):
        if not isinstance(held, nn.Parameter) and held._base is None:
            yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif isinstance(held, Beside | Mixing | Places | Rounding):
        yield from _tensors(vars(held))
