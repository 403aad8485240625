"""Stored: how one quantized weight lies in a checkpoint, whoever wrote it, and the way from there to `Quantized`.

    Compressed (compressed.py)    compressed-tensors, ours and others': the only one that is written
    Gptq, Awq (words.py)          codes in 32-bit words
    Fp8 (fp8.py)                  e4m3 numbers with a scale for a tensor, an output or a block
    Blocks (blocks.py)            GGUF's blocks

Shapes: N outputs, K inputs, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format

Find = Callable[[str], Tensor | None]
"""A checkpoint's tensor by its name, not read until it is looked into; None when there is none."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantized weight: its name in the checkpoint, its shape there, and the dtypes it may have.

    Not `needed`: it may be missing, and carries no weight; it is looked at all the same.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True


class Stored(Protocol):
    """How one weight of [n, k] lies on disk, and the format that its codes have when they are read."""

    @property
    def format(self) -> Format: ...

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        """The tensors of the weight `name`, which ends in ".weight"."""
        ...

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        """All needed parts, as they are in the file, into codes.

        Raises:
            CheckpointError: a part whose numbers contradict config.json or each other.
        """
        ...

    def spare(self, part: str, tensor: Tensor) -> str:
        """Why a part that is not needed cannot be passed over; empty when it can."""
        ...


def nothing_to_say(part: str, tensor: Tensor) -> str:
    """For parts that are not needed whatever they say: scales of activations, which here stay float or have others."""
    return ""


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unpack_words(words_RW: Tensor, bits: int) -> Tensor:
    """Codes of `bits`, a byte each, [R, W · 32 / bits]: the first in the lowest bits, as memory is little-endian."""
    raw = words_RW.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return raw if bits == 8 else torch.stack((raw & 15, raw >> 4), -1).flatten(-2)


def pack_words(codes_RC: Tensor, bits: int) -> Tensor:
    """The way back, each row filled up to whole words."""
    rows, columns = codes_RC.shape
    raw = torch.zeros(rows, columns + -columns % (32 // bits), dtype=codes_RC.dtype)
    raw[:, :columns] = codes_RC
    raw = raw.view(torch.uint8)
    if bits == 4:
        raw = (raw[:, 0::2] | raw[:, 1::2] << 4).reshape(rows, -1)
    return raw.view(torch.int32)


def lowered(raised: Tensor, bits: int) -> Tensor:
    """Codes from 0 as the kernels have them: of 8 bits signed, of 4 as they are."""
    return raised.view(torch.int8) ^ -128 if bits == 8 else raised


def raised(codes: Tensor, bits: int) -> Tensor:
    """The way back."""
    return (codes ^ -128).view(torch.uint8) if bits == 8 else codes


def order_of(g_idx_K: Tensor, group: int, name: str) -> Tensor | None:
    """The order in which inputs stand in their groups, from the group of each; None when that is their own order.

    Raises:
        CheckpointError: groups of other sizes than `group`.
    """
    g_idx_K = g_idx_K.long()
    k = len(g_idx_K)
    own_K = torch.arange(k) // (group or max(k, 1))
    if torch.equal(g_idx_K, own_K):
        return None
    order_K = torch.argsort(g_idx_K, stable=True)
    if not torch.equal(g_idx_K[order_K], own_K):
        raise CheckpointError(f"'{name}' does not divide {k} inputs into groups of {group}")
    return order_K.to(torch.int32)


def in_order(codes_NK: Tensor, order_K: Tensor | None) -> Tensor:
    return codes_NK if order_K is None else codes_NK[:, order_K.long()].contiguous()


def refused(method: str, key: str, value: Any, reads: str) -> CheckpointError:
    """A setting of `quantization_config` that would be another model than the one we read."""
    return CheckpointError(f"config.json: quantization_config has '{key}': {value!r}; Twofold reads {method} {reads}")
