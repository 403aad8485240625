"""Recomputation: what of each layer is kept for the backward pass, and where (see `policies.py` for the words).

    layer.forward ──── keeper's hooks ──── checkpoint (full) ──┬─ attention ── checkpoint (attention)
                       or recipes (selective)                  └─ ffn ──────── checkpoint (ffn)

Methods of the layers are replaced on the instance: no module is wrapped, so parameters keep their names, and a sharded
layer gathers its weights around all of it. The forward is deterministic, so every policy gives the same bits.

What is run again ends before its last product: a product keeps its inputs alone, and nobody reads what it makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.op import Op, watch
from ..models.decoder import Decoder, Layer
from .kept import Keeper, OnDevice
from .policies import per_layer
from .selective import CHEAP, Recipes

KEEPS = {"_LinearBackward": (0, 1), "_ExpertsBackward": (0, 1, 2, 3, 4)}
"""Products by their node in the graph: which of the op's arguments they keep, and nothing else, in order."""


def recompute_layers(
    decoder: Decoder, policy: str = "full", changes: Mapping[str, str] | None = None, keeper: Keeper | None = None
) -> None:
    """Give every layer its policy, in place; `changes` says which layers have another ("0-3": "full").

    `keeper` holds the activations that remain; without one they stay where autograd leaves them.

    Raises:
        ConfigError: a policy or a layer that there is not.
    """
    for layer, own in zip(decoder.layers, per_layer(policy, len(decoder.layers), changes), strict=True):
        if not isinstance(layer, Layer):
            continue  # it is on another stage of a pipeline
        target: Any = layer  # whose methods are hidden by attributes of the same name
        if own in ("attention", "ffn"):
            setattr(target, own, functools.partial(_again, getattr(target, own)))
        elif own == "full":
            target.forward = functools.partial(_again, target.forward)
        if own == "selective" or keeper is not None:
            cheap = CHEAP if own == "selective" else ()
            target.forward = functools.partial(_held, target.forward, keeper or OnDevice(), cheap)


def _again(run: Callable[..., Tensor], *args: Any) -> Tensor:
    """`run`, whose backward pass runs it once more and keeps its arguments alone (Chen et al. 2016)."""
    last = LastProduct()
    out: Tensor = checkpoint(
        run,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (last.sought(), Sparing(last)),
    )
    return out


def _held(run: Callable[..., Tensor], keeper: Keeper, cheap: Collection[str], *args: Any) -> Tensor:
    """`run`, what it saves in the keeper's care, and what `cheap` ops make kept as recipes."""
    if not torch.is_grad_enabled():
        return run(*args)
    with Recipes(keeper, cheap).entered():
        return run(*args)


class LastProduct:
    """The op that a region ends with. Run again, it is spared when it is a product: its arguments are all it keeps."""

    def __init__(self) -> None:
        self._calls = 0
        self._keeps: tuple[int, ...] | None = None

    @contextmanager
    def sought(self) -> Iterator[None]:
        """The region runs for the first time: the last op called is the one."""
        with watch(self._seek):
            yield

    def spare(self) -> Callable[..., Any]:
        """A watcher of the region's second run."""
        left = self._calls

        def watcher(op: Op[..., Any], args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
            nonlocal left
            left -= 1
            if left or self._keeps is None:
                return call()
            return _Kept.apply(*(args[place] for place in self._keeps))

        return watcher

    def _seek(self, op: Op[..., Any], args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        out = call()
        self._calls += 1
        self._keeps = KEEPS.get(type(getattr(out, "grad_fn", None)).__name__)
        return out


class Sparing(ExitStack):
    """Entered whenever a region runs again: twice where gradients of inputs and weights are apart (zero bubble)."""

    def __init__(self, last: LastProduct) -> None:
        super().__init__()
        self._last = last

    def __enter__(self) -> Sparing:
        self.enter_context(watch(self._last.spare()))
        return super().__enter__()


class _Kept(torch.autograd.Function):
    """Keeps what a product keeps, and makes nothing. Not a number, so that whoever reads it would be seen."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.full((), torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the graph of a region that ran again is not followed")
