"""Quantized weights on disk, as compressed-tensors writes them, so that other tools read ours and we read theirs.

    pack-quantized    X.weight_packed      int32 [N, K·bits/32], the first code in the lowest bits, codes from 0
                      X.weight_shape       int64 [2]
    int-quantized     X.weight             int8  [N, K], signed codes
    both              X.weight_scale       [N, G]
                      X.weight_zero_point  when there are zeros: int8 [N, G], or packed along N

`quantization_config` in config.json says which module has which format. A quantized tied embedding, which that cannot
say, is written like the others (packed) and told by the key EMBEDDING beside them; who does not know the key finds no
embedding and says so, rather than taking codes for weights.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format
from .names import GROUPS

EMBEDDING = "quantized_embedding"
PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"

Part = Literal["codes", "scale", "zero", "shape"]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one weight of [n, k] lies on disk: its format, and whether its codes are `packed` into int32."""

    format: Format
    packed: bool

    def parts(self) -> dict[Part, str]:
        """Each part of the weight, and what it is called behind the weight's own name."""
        named: dict[Part, str] = {"codes": "_packed" if self.packed else "", "scale": "_scale"}
        if not self.format.symmetric:
            named["zero"] = "_zero_point"
        return named | ({"shape": "_shape"} if self.packed else {})

    def shape(self, part: Part, n: int, k: int) -> tuple[int, ...]:
        each = 32 // self.format.bits
        groups = self.format.groups(k)
        shapes: dict[Part, tuple[int, ...]] = {
            "codes": (n, -(-k // each) if self.packed else k),
            "scale": (n, groups),
            "zero": (-(-n // each) if self.packed else n, groups),
            "shape": (2,),
        }
        return shapes[part]

    def dtype(self, part: Part) -> torch.dtype:
        if part == "scale":
            return self.format.scale_dtype
        return torch.int64 if part == "shape" else torch.int32 if self.packed else torch.int8

    def encode(self, part: Part, logical: Tensor) -> Tensor:
        """A part as it is written, from its numbers [N, ...]; `shape` takes the codes."""
        if part == "scale":
            return logical
        if part == "shape":
            return torch.tensor(logical.shape)
        if not self.packed:
            return logical if self.format.bits == 8 else logical.to(torch.int8) - 8
        raised = logical ^ -128 if self.format.bits == 8 else logical
        return _pack(raised, self.format.bits) if part == "codes" else _pack(raised.t(), self.format.bits).t()

    def decode(self, part: Part, stored: Tensor, n: int, k: int) -> Tensor:
        """The way back, for all parts but `shape`."""
        format = self.format
        if part == "scale":
            return stored
        if not self.packed:
            return stored if format.bits == 8 else (stored + 8).to(torch.uint8)
        if part == "codes":
            raised = _unpack(stored, format.bits)[:, :k]
        else:
            raised = _unpack(stored.t(), format.bits)[:, :n].t()
        return raised.view(torch.int8) ^ -128 if format.bits == 8 else raised


def _pack(codes_NK: Tensor, bits: int) -> Tensor:
    """Unsigned codes [N, K], a byte each, into words: the first code in the lowest bits, as memory is little-endian."""
    n, k = codes_NK.shape
    each = 8 // bits
    raw = torch.zeros(n, k + -k % (4 * each), dtype=codes_NK.dtype)
    raw[:, :k] = codes_NK
    raw = raw.view(torch.uint8)
    if bits == 4:
        raw = (raw[:, 0::2] | raw[:, 1::2] << 4).reshape(n, -1)
    return raw.view(torch.int32)


def _unpack(words_NW: Tensor, bits: int) -> Tensor:
    """The way back, a byte each."""
    raw = words_NW.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return raw if bits == 8 else torch.stack((raw & 15, raw >> 4), -1).flatten(-2)


def part_of(quantized: Quantized, part: Part) -> Tensor:
    """The numbers of a part; `shape` is the codes'."""
    chosen = {"scale": quantized.scale, "zero": quantized.zero}.get(part, quantized.codes)
    assert chosen is not None, "a symmetric weight has no zeros to write"
    return chosen


# -------------------------------------------------------------------------------------------------- config.json
def write_config(modules: Mapping[str, Format], ignore: Iterable[str], embedding: Format | None) -> dict[str, Any]:
    """`quantization_config` for these linear modules; `ignore` lists those that stay float."""
    packed = is_packed(modules.values())
    usual = [format for format, _ in Counter(modules.values()).most_common()]
    groups: dict[str, Any] = {}
    for number, format in enumerate(usual):
        targets = ["Linear"] if number == 0 else [name for name, its in modules.items() if its == format]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(format),
            "input_activations": _activations(format),
            "output_activations": None,
            "format": PACKED if packed else PLAIN,
        }
    told: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": PACKED if packed else PLAIN,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if embedding is not None:
        told[EMBEDDING] = {"weights": _weights(embedding), "input_activations": _activations(embedding)}
    return told


def is_packed(formats: Iterable[Format]) -> bool:
    """Whether a model of these formats is written packed: all but 8-bit weights with 8-bit activations is."""
    return not all(format.bits == 8 and format.dynamic for format in formats)


def _weights(format: Format) -> dict[str, Any]:
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "group" if format.group else "channel",
        "group_size": format.group or None,
        "dynamic": False,
    }


def _activations(format: Format) -> dict[str, Any] | None:
    if not format.dynamic:
        return None
    strategy = "group" if format.group else "token"
    told = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": True}
    return told | {"group_size": format.group or None}


def read_config(told: Mapping[str, Any], modules: Iterable[str]) -> tuple[dict[str, Stored], Stored | None]:
    """What `quantization_config` says of each of these linear modules that it quantizes, and of the embedding.

    Scale dtypes are not told there; the formats have the default.

    Raises:
        CheckpointError: another method, or a setting that Twofold does not build, named.
    """
    _expect(told, "quant_method", "compressed-tensors")
    _expect(told, "quantization_status", "compressed")
    _expect(told, "kv_cache_scheme", None)
    known = {"format", "config_groups", "ignore", "global_compression_ratio", "version", EMBEDDING}
    empty: dict[str, tuple[Any, ...]] = {
        "sparsity_config": ({}, None),
        "transform_config": ({}, None),
        "moe_sparsity_config": (None,),
    }
    for key, value in told.items():
        if key not in known | {"quant_method", "quantization_status", "kv_cache_scheme"} and (
            key not in empty or value not in empty[key]
        ):
            raise _refused(key, value)
    groups = told.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _refused("config_groups", groups)
    parsed = [
        (group.get("targets") or [], _stored(group, group.get("format") or told.get("format")))
        for group in groups.values()
    ]
    ignore = told.get("ignore") or []
    found = {}
    for module in modules:
        if not any(_matches(module, pattern) for pattern in ignore):
            hits = [(_matches(module, target), stored) for targets, stored in parsed for target in targets]
            rank, stored = max(hits, key=lambda hit: hit[0], default=(0, None))
            if rank and stored is not None:
                found[module] = stored
    table = told.get(EMBEDDING)
    return found, _stored(table, PACKED) if table is not None else None


def _matches(module: str, pattern: Any) -> int:
    """How closely a target means a module: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
    if not isinstance(pattern, str) or len(pattern) > 300:
        raise _refused("targets", pattern)
    if pattern.startswith("re:"):
        try:
            return 2 if re.match(pattern[3:], module) else 0
        except re.error:
            raise _refused("targets", pattern) from None
    return 3 if pattern == module else 1 if pattern == "Linear" else 0


def _stored(group: Mapping[str, Any], style: Any) -> Stored:
    if style not in (PACKED, PLAIN, "naive-quantized"):
        raise _refused("format", style)
    weights, acts = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or group.get("output_activations") is not None:
        raise _refused("config_groups", dict(group))
    _expect(weights, "type", "int")
    _expect(weights, "num_bits", 8, 4)
    _expect(weights, "dynamic", False)
    _expect(weights, "actorder", None, False, "weight", "static")
    _expect(weights, "block_structure", None)
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    if strategy not in ("channel", "group"):
        raise _refused("strategy", strategy)
    group_size = weights.get("group_size") if strategy == "group" else 0
    if group_size not in GROUPS:
        raise _refused("group_size", group_size)
    if acts is not None:
        for key, value in (("type", "int"), ("num_bits", 8), ("symmetric", True), ("dynamic", True)):
            _expect(acts, key, value)
        _expect(acts, "strategy", "token", *(("group",) if group_size else ()))
        _expect(acts, "group_size", None, -1, group_size)
    format = Format(
        bits=weights["num_bits"],
        group=group_size,
        symmetric=bool(weights.get("symmetric", True)),
        activations="float" if acts is None else "int8",
    )
    return Stored(format, style == PACKED)


def _expect(table: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if table.get(key, allowed[0]) not in allowed:
        raise _refused(key, table.get(key))


def _refused(key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config has '{key}': {value!r}; Twofold reads int8 and int4 weights of "
        "compressed-tensors, by output or by groups of 32, 64 or 128, with float or dynamic int8 activations"
    )
