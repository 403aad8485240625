"""What passes through a layer: its inputs seen on real text, as the figures that rounding its weight well needs.

Shapes: T tokens, K inputs, S sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 512
"""Rows of each layer's inputs that are kept as they are, evenly over the batches."""


@dataclass(slots=True)
class Inputs:
    """One matrix's inputs: how many, squares, magnitudes and maxima by channel, some rows, and XᵀX when `gram`."""

    gram: bool
    share: int
    count: int = 0
    square_K: Tensor | None = None
    magnitude_K: Tensor | None = None
    top_K: Tensor | None = None
    gram_KK: Tensor | None = None
    _rows: list[Tensor] = field(default_factory=list)

    def add(self, x_TK: Tensor) -> None:
        if not len(x_TK):
            return
        x_TK = x_TK.detach().float()
        self.count += len(x_TK)
        size = x_TK.abs()
        self.square_K = _plus(self.square_K, x_TK.square().sum(0))
        self.magnitude_K = _plus(self.magnitude_K, size.sum(0))
        top_K = size.amax(0)
        self.top_K = top_K if self.top_K is None else torch.maximum(self.top_K, top_K)
        if self.gram:
            self.gram_KK = _plus(self.gram_KK, x_TK.t() @ x_TK)
        step = max(1, len(x_TK) // self.share)
        self._rows.append(x_TK[::step][: self.share].clone())

    @property
    def rows(self) -> Tensor:
        """The kept rows [S, K]; none when nothing came."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, 0)

    @property
    def importance(self) -> Tensor | None:
        """Mean square of each input; None when nothing came."""
        return self.square_K / self.count if self.square_K is not None else None


def _plus(whole: Tensor | None, part: Tensor) -> Tensor:
    return part if whole is None else whole.add_(part)


def together(parts: Sequence[Inputs]) -> Inputs:
    """The inputs of several matrices as of one, without XᵀX: experts that read the same channels."""
    whole = Inputs(gram=False, share=ROWS)
    for part in parts:
        if part.square_K is None or part.magnitude_K is None or part.top_K is None:
            continue
        whole.count += part.count
        whole.square_K = _plus(whole.square_K, part.square_K.clone())
        whole.magnitude_K = _plus(whole.magnitude_K, part.magnitude_K.clone())
        whole.top_K = part.top_K if whole.top_K is None else torch.maximum(whole.top_K, part.top_K)
        whole._rows.append(part.rows[:: max(1, len(parts) * len(part.rows) // ROWS)])
    return whole


class Reached(Exception):
    """A module was called: what with."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.args_given = args


def arguments(model: nn.Module, module: nn.Module, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `model(*batch)` calls `module` with; nothing behind it is computed."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args)

    handle = module.register_forward_pre_hook(stop)
    try:
        model(*batch)
    except Reached as reached:
        return reached.args_given
    finally:
        handle.remove()
    raise RuntimeError(f"the model never called its {type(module).__name__}")


Taps = Mapping[str, tuple[nn.Module, Callable[[tuple[Any, ...]], Sequence[Tensor]]]]
"""By name: a module to listen at, and how its call's arguments become the inputs of each of its matrices."""


@contextmanager
def listening(taps: Taps, batches: int, gram: bool) -> Iterator[dict[str, list[Inputs]]]:
    """Collect, for each tap, the inputs of its matrices over the calls made inside."""
    heard: dict[str, list[Inputs]] = {name: [] for name in taps}
    handles = []
    for name, (module, inputs) in taps.items():

        def hear(_: nn.Module, args: tuple[Any, ...], name: str = name, inputs: Any = inputs) -> None:
            given = inputs(args)
            if not heard[name]:
                heard[name] = [Inputs(gram, max(1, -(-ROWS // batches))) for _ in given]
            for one, x_TK in zip(heard[name], given, strict=True):
                one.add(x_TK)

        handles.append(module.register_forward_pre_hook(hear))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
