"""Lora: low-rank adapters beside a decoder's frozen weights, trained and served by the same kernels.

    x [T, K] ──┬── W [N, K] ───────────────────▶ y [T, N]       q  k  v
               └── A of q, k, v, one product ──▶ h ── B of q ──▶ +
                                                  └── B of v ────────▶ +

A fused weight has a Pair for each tensor that the checkpoint makes of it, so that its adapters are PEFT's, name by
name. A row's bits are its own, as `linear`'s are. LoRA: Hu et al. 2021.

Shapes: T tokens, K inputs, N outputs of the fused weight, n of one pair's, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..kernels.linear import linear
from ..quant.linear import QuantLinear
from .decoder import Decoder
from .layout import Index, Layouts, Slot
from .lora_config import LoraConfig
from .quantized import PROJECTIONS
from .scoring import TENSOR
from .seeds import source
from .tensors import Weight


class Pair(nn.Module):
    """The adapter of one tensor of the checkpoint: `slot` says which rows of the fused weight that is."""

    def __init__(self, slot: Slot, outputs: int, inputs: int, rank: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.slot = slot
        self.rows = rows_of(slot, outputs)
        self.a = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(self.rows.stop - self.rows.start, rank, dtype=dtype, device=device))


class Lora(nn.Module):
    """The pairs beside one weight, by the last part of the checkpoint's name ("q_proj"), in the order of their rows."""

    def __init__(self, config: LoraConfig, slots: list[Slot], module: Weight | QuantLinear) -> None:
        super().__init__()
        self.config, self.on = config, True
        n, k = module.shape if isinstance(module, QuantLinear) else module.weight.shape
        self.outputs, self.inputs = n, k
        pairs = {target_of(slot): Pair(slot, n, k, config.rank, module.dtype, module.device) for slot in slots}
        for name, pair in sorted(pairs.items(), key=lambda item: item[1].rows.start):
            self.add_module(name.rpartition(".")[2], pair)

    @property
    def pairs(self) -> list[Pair]:
        """In the order of their rows."""
        return cast(list[Pair], list(self.children()))

    def forward(self, x_TK: Tensor, y_TN: Tensor) -> Tensor:
        """y with what the adapters make of x added; y itself while they are off."""
        if not self.on:
            return y_TN
        pairs = self.pairs
        shrunk = linear(x_TK, pairs[0].a if len(pairs) == 1 else torch.cat([pair.a for pair in pairs]))
        parts, at = [], 0
        for pair, h_TR in zip(pairs, shrunk.split(self.config.rank, -1), strict=True):
            if pair.rows.start > at:
                parts.append(y_TN[:, at : pair.rows.start])
            parts.append(y_TN[:, pair.rows] + linear(h_TR, pair.b) * self.config.scale)
            at = pair.rows.stop
        if at < self.outputs:
            parts.append(y_TN[:, at:])
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.no_grad()
    def delta(self, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
        """scale · B A as rows [N, K] of the fused weight, fp32; `whole` gives what this rank has a part of."""
        out_NK = torch.zeros(self.outputs, self.inputs)
        for pair in self.pairs:
            a_RK, b_NR = (whole(x.detach()).cpu().float() for x in (pair.a, pair.b))
            torch.matmul(b_NR, a_RK, out=out_NK[pair.rows])
        return out_NK.mul_(self.config.scale)


def rows_of(slot: Slot, outputs: int) -> slice:
    """Which rows of the decoder's weight, of `outputs` in all, a slot of the checkpoint is."""
    return slot.at[0] if slot.at and isinstance(slot.at[0], slice) else slice(0, outputs)


def target_of(slot: Slot) -> str:
    """The checkpoint's name of the module that a slot is the weight of."""
    return slot.name.removesuffix(".weight")


def adapt(decoder: Decoder, config: LoraConfig, seed: int = 0) -> None:
    """Freeze a decoder and put an adapter beside each weight that is targeted, in the weight's own dtype. A score head,
    where there is one, is trained whole: it begins as zeros, and what stays so teaches nothing.

    A is drawn as PEFT draws it, by `seed` and its name (on the meta device nothing is drawn); B is zero, so that
    nothing changes yet. An engine that has the decoder already must be told: `engine.load_weights(None, version)`.

    Raises:
        ConfigError: it has adapters already, or a target names no linear layer of this model.
    """
    if loras(decoder):
        raise ConfigError("the decoder has adapters already: merge them first")
    found = chosen(decoder, config)
    decoder.requires_grad_(False)
    if decoder.spec.score:
        decoder.score.requires_grad_(True)
    for place, slots in found.items():
        module = decoder.get_submodule(place)
        assert isinstance(module, Weight | QuantLinear)
        module.lora = Lora(config, slots, module)
    first = FirstPairs(decoder, seed)
    for name, parameter in pair_parameters(decoder).items():
        if not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(first[name])


class FirstPairs:
    """The first value of each adapter's tensor by name, fp32; the decoder needs no memory."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self._seed = seed
        self._shapes = {name: tuple(parameter.shape) for name, parameter in pair_parameters(decoder).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> Tensor:
        """Kaiming's uniform with a = √5, as PEFT's A: ±1/√K; B is zero."""
        out = torch.zeros(self._shapes[name])
        bound = out.shape[1] ** -0.5
        return out.uniform_(-bound, bound, generator=source(self._seed, name)) if name.endswith(".a") else out


def loras(decoder: nn.Module) -> dict[str, Lora]:
    """The adapters of a decoder, by the name of the weight that they stand beside; empty when it has none."""
    found = ((name, module) for name, module in decoder.named_modules() if isinstance(module, Lora))
    return {name.removesuffix(".lora"): module for name, module in found}


def pair_parameters(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B by the decoder's name."""
    return {f"{place}.lora.{name}": p for place, lora in loras(decoder).items() for name, p in lora.named_parameters()}


def trained_parameters(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B, and the score head where there is one, by the decoder's name."""
    score = {name: parameter for name, parameter in decoder.named_parameters() if name == TENSOR}
    return pair_parameters(decoder) | score


def matrices(decoder: nn.Module) -> dict[str, tuple[Index, ...]]:
    """Each A and B of more than one row and column as the matrix that it is, as `layout.matrices` has the weights."""
    return {name: ((slice(0, len(p)),),) for name, p in pair_parameters(decoder).items() if min(p.shape) > 1}


def config_of(decoder: nn.Module) -> LoraConfig | None:
    """What the decoder was adapted with, if it was."""
    return next((lora.config for lora in loras(decoder).values()), None)


@contextmanager
def off(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder is its base: the reference policy of a LoRA run, without a second copy of weights."""
    before = [(lora, lora.on) for lora in loras(decoder).values()]
    try:
        for lora, _ in before:
            lora.on = False
        yield
    finally:
        for lora, on in before:
            lora.on = on


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Add the adapters to the weights, in fp32 and rounded once, and take them away; the decoder is whole again.

    Raises:
        ConfigError: a weight is quantized.
    """
    found = loras(decoder)
    for place in found:
        if isinstance(decoder.get_submodule(place), QuantLinear):
            raise ConfigError(f"{place} is quantized: load the float checkpoint, then its adapter, then merge")
    for place, lora in found.items():
        module = decoder.get_submodule(place)
        assert isinstance(module, Weight)
        module.weight.copy_(module.weight.float() + lora.delta().to(module.device))
    take_away(decoder)


def take_away(decoder: Decoder) -> None:
    """Let the adapters go; the decoder is its base, and all of it can be trained again."""
    for place in loras(decoder):
        module = decoder.get_submodule(place)
        assert isinstance(module, Weight | QuantLinear)
        module.lora = None
    decoder.requires_grad_(True)


def chosen(decoder: Decoder, config: LoraConfig) -> dict[str, list[Slot]]:
    """The slots that get a pair, by the weight that they are rows of."""
    can, cannot = [], set[str]()
    for slot in Layouts(decoder).weights():
        place = slot.inner.removesuffix(".weight")
        wanted = place.startswith("layers.") and place.rpartition(".")[2] in PROJECTIONS
        if wanted and ".experts." not in place:
            can.append(slot)
        else:
            cannot.add(target_of(slot))
    for target in config.targets:
        if not any(named(target_of(slot), target) for slot in can):
            known = sorted({target_of(slot).rpartition(".")[2] for slot in can})
            why = "has no adapters here" if any(named(name, target) for name in cannot) else "is none of this model's"
            raise ConfigError(f"lora.targets: '{target}' {why}; the linear layers are {', '.join(known) or 'none'}")
    if not can:
        raise ConfigError(f"{decoder.spec.architecture} has no linear layer that takes an adapter")
    found: dict[str, list[Slot]] = {}
    for slot in can:
        if not config.targets or any(named(target_of(slot), target) for target in config.targets):
            found.setdefault(slot.inner.removesuffix(".weight"), []).append(slot)
    return found


def named(name: str, target: str) -> bool:
    """Whether a target means a module: its whole name, or the end of it."""
    return name == target or name.endswith("." + target)
