"""FP8 checkpoints: e4m3 numbers, and scales for a whole tensor, for each output, or for blocks (DeepSeek, Qwen).

    X.weight            float8_e4m3fn [N, K]
    X.weight_scale      [] or [1], or [N, 1] or [N]      one number, or one an output
    X.weight_scale_inv  [N/128, K/128]                   one a block; what numbers are multiplied by, like the others

A weight is number · scale in fp32, as all of these say. Activations stay float here, which is finer than any scale for
them: `input_scale` and its like are passed over.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format
from .names import READ_GROUPS
from .stored import FLOATS, Find, Part, nothing_to_say, refused

READS = "of e4m3, one scale a tensor, an output, or a block of any number of outputs by 16, 32, 64 or 128 inputs"
NOT_A_NUMBER = 0x7F

_SAYS_NOTHING = (
    "activation_scheme",
    "ignored_layers",
    "modules_to_not_convert",
    "modules_to_convert",
    "activation_scale_ub",
    "dequantize",
)


@dataclass(frozen=True, slots=True)
class Fp8:
    """A weight of e4m3 numbers; `scale_name` and `scale_shape` are its scales' (-1: all outputs), `rows` a block's
    outputs.
    """

    format: Format
    scale_name: str = "weight_scale"
    scale_shape: tuple[int, ...] = (1,)
    rows: int = 0

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        stem = name.removesuffix("weight")
        one = tuple(n if size < 0 else size for size in self.scale_shape)
        shape = (-(-n // self.rows), self.format.groups(k)) if self.rows else one
        spare = {
            f"{what}_scale{inverse}": Part(f"{stem}{what}_scale{inverse}", (), FLOATS, needed=False)
            for what in ("input", "activation", "output")
            for inverse in ("", "_inv")
        }
        return spare | {
            "codes": Part(name, (n, k), (torch.float8_e4m3fn,)),
            "scale": Part(stem + self.scale_name, shape, FLOATS),
        }

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        return Quantized(numbers(parts["codes"]), self._scales(parts["scale"], n), None, self.format)

    def _scales(self, scale: Tensor, n: int) -> Tensor:
        if self.rows:
            return scale.repeat_interleave(self.rows, 0)[:n].contiguous()
        return scale.reshape(-1, 1).expand(n, 1).contiguous()

    spare = staticmethod(nothing_to_say)


def numbers(codes_NK: Tensor) -> Tensor:
    """e4m3 codes as they are. Raises CheckpointError: one that is not a number."""
    if bool(((codes_NK.view(torch.uint8) & NOT_A_NUMBER) == NOT_A_NUMBER).any()):
        raise CheckpointError("an e4m3 weight is not a number: the checkpoint is damaged")
    return codes_NK


def block_of(told: Any) -> bool:
    """Whether these are the outputs and inputs of a block that we read."""
    return (
        isinstance(told, list)
        and len(told) == 2
        and all(type(size) is int and size > 0 for size in told)
        and told[1] in READ_GROUPS
    )


def fp8_config(told: Mapping[str, Any], modules: Iterable[str], find: Find) -> dict[str, Fp8]:
    """Each of these modules whose weight is e4m3.

    Raises:
        CheckpointError: a setting that Twofold does not read, named, or a weight without scales.
    """
    block = told.get("weight_block_size")
    allowed = {
        "quant_method": ("fp8", "fbgemm_fp8"),
        "fmt": ("e4m3", "float8_e4m3fn", None),
        "scale_fmt": ("float", "ue8m0", None),
        "kv_cache_scheme": (None,),
        "expert_dtype": ("fp8", None),
        "weight_block_size": (block,),
    }
    for key, value in told.items():
        if value not in allowed.get(key, (value,) if key in _SAYS_NOTHING else ()):
            raise refused("FP8", key, value, READS)
    if block is not None and not block_of(block):
        raise refused("FP8", "weight_block_size", block, READS)
    found = {}
    for module in modules:
        weight = find(f"{module}.weight")
        if weight is None or weight.dtype != torch.float8_e4m3fn:
            continue
        found[module] = _stored(module, block, find)
    return found


def _stored(module: str, block: list[int] | None, find: Find) -> Fp8:
    for name in ("weight_scale_inv", "weight_scale"):
        scale = find(f"{module}.{name}")
        if scale is None:
            continue
        blocks = block is not None and scale.dim() == 2
        format = Format(
            bits=8,
            group=block[1] if block and blocks else 0,
            numbers="fp8",
            activations="float",
            scale="float32",
            tensor=not blocks and scale.numel() == 1,
        )
        if block and blocks:
            return Fp8(format, name, rows=block[0])
        if scale.numel() != 1 and (scale.dim() > 2 or scale.numel() != len(scale)):
            raise CheckpointError(
                f"'{module}.{name}' has shape {list(scale.shape)}: one scale, or one an output is read"
            )
        return Fp8(format, name, tuple(-1 if size > 1 else size for size in scale.shape))
    raise CheckpointError(f"the checkpoint lacks '{module}.weight_scale', which its e4m3 weight needs")
