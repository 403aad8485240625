"""From a Rope spec to the angle of each position. An angle depends on the position alone, never on the batch.

Shapes: T tokens, R pairs of numbers that are turned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import DynamicNtk, LinearScaling, Llama3Scaling, LongRope, Rope, Yarn


class Angles:
    """cos and sin for any positions of one Rope, for a model built for `max_len` positions."""

    def __init__(self, rope: Rope, max_len: int) -> None:
        self.rope = rope
        self.temperature = 1.0
        exponent_R = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
        self._exponent_R = exponent_R
        self.frequency_R = 1.0 / (rope.theta**exponent_R)
        match rope.scaling:
            case LinearScaling(factor=factor):
                self.frequency_R = self.frequency_R / factor
            case Llama3Scaling() as how:
                self.frequency_R = _llama3(self.frequency_R, how)
            case Yarn() as how:
                self.frequency_R, self.temperature = _yarn(self.frequency_R, rope, how)
            case LongRope() as how:
                self.frequency_R, self.temperature = _longrope(self.frequency_R, how, max_len)
            case DynamicNtk() | None:
                pass

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R] in fp32."""
        angle_TR = positions_T[:, None].float() * self._frequencies(positions_T)
        return torch.cos(angle_TR) * self.temperature, torch.sin(angle_TR) * self.temperature

    def room(self, length: int) -> tuple[Tensor, Tensor]:
        """Tensors like those that a call with so many positions gives, with nothing computed."""
        return torch.empty(length, len(self.frequency_R)), torch.empty(length, len(self.frequency_R))

    def to(self, device: torch.device | str) -> None:
        """Keep the tables on a device, so that no step copies them there."""
        self._exponent_R, self.frequency_R = self._exponent_R.to(device), self.frequency_R.to(device)

    def _frequencies(self, positions_T: Tensor) -> Tensor:
        how = self.rope.scaling
        if not isinstance(how, DynamicNtk):
            return self.frequency_R.to(positions_T.device)
        # the base of a sequence that ends at this position, so that no later token changes an earlier key
        length_T = (positions_T + 1).clamp_min(how.original).double()
        power = self.rope.dim / (self.rope.dim - 2)
        base_T = self.rope.theta * ((how.factor * length_T / how.original) - (how.factor - 1)) ** power
        exponent_R = self._exponent_R.to(positions_T.device, torch.float64)
        return (1.0 / base_T[:, None] ** exponent_R).float()


def _llama3(frequency_R: Tensor, how: Llama3Scaling) -> Tensor:
    wavelength_R = 2 * math.pi / frequency_R
    smooth_R = (how.original / wavelength_R - how.low) / (how.high - how.low)
    between_R = (1 - smooth_R) * frequency_R / how.factor + smooth_R * frequency_R
    slow = torch.where(wavelength_R > how.original / how.low, frequency_R / how.factor, between_R)
    return torch.where(wavelength_R < how.original / how.high, frequency_R, slow)


def _yarn(frequency_R: Tensor, rope: Rope, how: Yarn) -> tuple[Tensor, float]:
    def turns_at(rotations: float) -> float:  # the pair that makes `rotations` full turns over the original context
        return rope.dim * math.log(how.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turns_at(how.beta_fast), turns_at(how.beta_slow)
    if how.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp_R = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (max(high - low, 1e-3))
    keep_R = 1 - ramp_R.clamp(0, 1)
    scaled = frequency_R / how.factor * (1 - keep_R) + frequency_R * keep_R
    return scaled, _yarn_temperature(how)


def _yarn_temperature(how: Yarn) -> float:
    if how.attention_factor is not None:
        return how.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if how.factor <= 1 else 0.1 * weight * math.log(how.factor) + 1.0

    if how.mscale and how.mscale_all_dim:
        return scale(how.mscale) / scale(how.mscale_all_dim)
    return scale(1.0)


def _longrope(frequency_R: Tensor, how: LongRope, max_len: int) -> tuple[Tensor, float]:
    divisors = how.long if max_len > how.original else how.short
    if how.attention_factor is not None:
        temperature = how.attention_factor
    elif how.factor <= 1.0:
        temperature = 1.0
    else:
        temperature = math.sqrt(1 + math.log(how.factor) / math.log(how.original))
    return frequency_R / torch.tensor(divisors, dtype=torch.float32), temperature
