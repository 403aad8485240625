"""Quantized weights on disk, as compressed-tensors writes them, so that other tools read ours and we read theirs.

    pack-quantized    X.weight_packed      int32 [N, K·bits/32], the first code in the lowest bits, codes from 0
                      X.weight_shape       int64 [2]
    int-quantized     X.weight             int8  [N, K], signed codes
    float-quantized   X.weight             float8_e4m3fn [N, K]
    all of these      X.weight_scale       [N, G]; [1] for a whole tensor; [N/rows, G] for blocks
                      X.weight_zero_point  when there are zeros: int8 [N, G], or packed along N
                      X.weight_g_idx       int32 [K], the group of each input, where they are out of order

`quantization_config` in config.json says which module has which format. A quantized tied embedding, which that cannot
say, is written like the others (packed) and told by the key EMBEDDING beside them; who does not know the key finds no
embedding and says so, rather than taking codes for weights.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format
from .fp8 import block_of, numbers
from .names import READ_GROUPS
from .stored import (
    FLOATS,
    Find,
    Part,
    in_order,
    lowered,
    nothing_to_say,
    order_of,
    pack_words,
    raised,
    refused,
    unpack_words,
)

EMBEDDING = "quantized_embedding"
PACKED, PLAIN, FLOAT, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
READS = (
    "int8, int4 and e4m3 weights, by tensor, by output, by blocks or by groups of 16, 32, 64 or 128, with float or "
    "dynamic int8 activations"
)


@dataclass(frozen=True, slots=True)
class Compressed:
    """How one weight of [n, k] lies on disk: its format, whether its codes are `packed` into int32, and the outputs of
    a block (`rows`) where scales are those of blocks.
    """

    format: Format
    packed: bool
    rows: int = 0

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        format = self.format
        each, groups, words = 32 // format.bits, format.groups(k), (torch.int32,)
        plain = (torch.float8_e4m3fn if format.numbers == "fp8" else torch.int8,)
        width = -(-k // each) if self.packed else k
        scales = (1,) if format.tensor else (-(-n // self.rows) if self.rows else n, groups)
        found = {
            "codes": Part(name + ("_packed" if self.packed else ""), (n, width), words if self.packed else plain),
            "scale": Part(name + "_scale", scales, (format.scale_dtype,)),
        }
        if not format.symmetric:
            zeros = (-(-n // each), groups) if self.packed and not format.tensor else scales
            found["zero"] = Part(name + "_zero_point", zeros, words if self.packed and not format.tensor else plain)
        if self.packed:
            found["shape"] = Part(name + "_shape", (2,), (torch.int64, torch.int32))
        if format.ordered:
            found["g_idx"] = Part(name + "_g_idx", (k,), words)
        stem = name.removesuffix("weight")
        for what in ("input", "output", *(() if format.numbers == "int" else ("weight",))):
            for number in ("scale", "zero_point"):
                if f"{what}_{number}" != "weight_scale":
                    dtypes = (*FLOATS, *plain)
                    found[f"{what}_{number}"] = Part(f"{stem}{what}_{number}", (), dtypes, needed=False)
        return found

    def encode(self, part: str, quantized: Quantized, n: int) -> Tensor:
        """A part as it is written."""
        codes_NK, scale_NG, zero_NG, format = quantized.codes, quantized.scale, quantized.zero, self.format
        if part == "scale":
            return scale_NG[:1, 0] if format.tensor else scale_NG
        if part == "shape":
            return torch.tensor(codes_NK.shape)
        if part == "g_idx":
            assert quantized.order is not None
            of_place_K = torch.arange(len(quantized.order)) // (format.group or len(quantized.order))
            return of_place_K[quantized.order.argsort()].to(torch.int32)
        if part == "codes":
            own_NK = codes_NK if quantized.order is None else codes_NK[:, quantized.order.argsort()]
            return pack_words(raised(own_NK, format.bits), format.bits) if self.packed else _signed(own_NK, format)
        assert zero_NG is not None, "a symmetric weight has no zeros to write"
        if format.tensor:
            return _signed(zero_NG[:1, 0], format)
        if self.packed:
            return pack_words(raised(zero_NG, format.bits).t(), format.bits).t()
        return _signed(zero_NG, format)

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        format, bits = self.format, self.format.bits
        if self.packed and parts["shape"].tolist() != [n, k]:
            raise CheckpointError(f"says {parts['shape'].tolist()}; config.json asks for {[n, k]}")
        codes_NK = lowered(unpack_words(parts["codes"], bits)[:, :k], bits) if self.packed else self._codes(parts)
        scale_NG, zero_NG = self._spread(parts["scale"], n), None
        if not format.symmetric:
            if self.packed and not format.tensor:
                zero_NG = lowered(unpack_words(parts["zero"].t(), bits)[:, :n].t(), bits)
            else:
                zero_NG = self._spread(_unsigned(parts["zero"], format), n)
        order_K = order_of(parts["g_idx"], format.group, "g_idx") if format.ordered else None
        return Quantized(in_order(codes_NK, order_K), scale_NG, zero_NG, format, order_K)

    def _codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes_NK = parts["codes"]
        return numbers(codes_NK) if self.format.numbers == "fp8" else _unsigned(codes_NK, self.format)

    def _spread(self, x: Tensor, n: int) -> Tensor:
        """One number a tensor or a block of outputs to one an output."""
        if self.format.tensor:
            return x.reshape(1, 1).expand(n, 1).contiguous()
        return x.repeat_interleave(self.rows, 0)[:n].contiguous() if self.rows else x

    spare = staticmethod(nothing_to_say)


def _signed(codes: Tensor, format: Format) -> Tensor:
    return codes.to(torch.int8) - 8 if format.bits == 4 else codes


def _unsigned(codes: Tensor, format: Format) -> Tensor:
    return (codes + 8).to(torch.uint8) if format.bits == 4 else codes


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
            "format": style_of(format, packed),
        }
    styles = {style_of(format, packed) for format in usual}
    told: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": styles.pop() if len(styles) == 1 else MIXED,
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


def style_of(format: Format, packed: bool) -> str:
    """How a weight of this format is written, in a model that is `packed` or not."""
    return FLOAT if format.numbers == "fp8" else PACKED if packed else PLAIN


def written(format: Format, packed: bool) -> Compressed:
    """How a weight is written."""
    return Compressed(format, style_of(format, packed) == PACKED)


def check_written(formats: Iterable[Format]) -> None:
    """Refuse what cannot be written. Raises CheckpointError: offsets, which compressed-tensors has no word for."""
    for format in formats:
        if format.offset:
            raise CheckpointError(
                f"weights of {format.name} cannot be written again: keep the GGUF file they came from"
            )


def _weights(format: Format) -> dict[str, Any]:
    told = {
        "num_bits": format.bits,
        "type": "float" if format.numbers == "fp8" else "int",
        "symmetric": format.symmetric,
        "strategy": "group" if format.group else "tensor" if format.tensor else "channel",
        "group_size": format.group or None,
        "dynamic": False,
    }
    return told | ({"actorder": "group"} if format.ordered else {})


def _activations(format: Format) -> dict[str, Any] | None:
    if not format.dynamic:
        return None
    strategy = "group" if format.group else "token"
    told = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": True}
    return told | {"group_size": format.group or None}


def compressed_config(
    told: Mapping[str, Any], modules: Iterable[str], find: Find
) -> tuple[dict[str, Compressed], Compressed | None]:
    """What `quantization_config` says of each of these linear modules that it quantizes, and of the embedding.

    Scale dtypes are not told there; the formats have the default.

    Raises:
        CheckpointError: another method, or a setting that Twofold does not build, named.
    """
    _expect(told, "quantization_status", "compressed")
    known = {"format", "config_groups", "ignore", "global_compression_ratio", "version", "kv_cache_scheme", EMBEDDING}
    empty: dict[str, tuple[Any, ...]] = {
        "sparsity_config": ({}, None),
        "transform_config": ({}, None),
        "moe_sparsity_config": (None,),
    }
    for key, value in told.items():
        if key not in known | {"quant_method", "quantization_status"} and (key not in empty or value not in empty[key]):
            raise _refused(key, value)
    _check_cache(told.get("kv_cache_scheme"))
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
                found[module] = _in_turn(stored, f"{module}.weight_g_idx", find)
    table = told.get(EMBEDDING)
    return found, _stored(table, PACKED) if table is not None else None


def _in_turn(stored: Compressed, name: str, find: Find) -> Compressed:
    """The same without an order, where inputs are in their own."""
    if not stored.format.ordered:
        return stored
    g_idx_K = find(name)
    if g_idx_K is None or order_of(g_idx_K, stored.format.group, name) is not None:
        return stored
    return replace(stored, format=stored.format.in_turn)


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


def _stored(group: Mapping[str, Any], style: Any) -> Compressed:
    if style not in (PACKED, PLAIN, FLOAT, "naive-quantized"):
        raise _refused("format", style)
    weights, acts = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or group.get("output_activations") is not None:
        raise _refused("config_groups", dict(group))
    floats = style == FLOAT or (style != PACKED and weights.get("type") == "float")
    _expect(weights, "type", "float" if floats else "int")
    _expect(weights, "num_bits", 8, *(() if floats else (4,)))
    _expect(weights, "dynamic", False)
    _expect(weights, "actorder", None, False, "weight", "static", "group", True)
    rows, group_size, tensor = _reach(weights)
    dynamic = isinstance(acts, dict) and not floats
    if isinstance(acts, dict) and not floats:
        for key, value in (("type", "int"), ("num_bits", 8), ("symmetric", True), ("dynamic", True)):
            _expect(acts, key, value)
        _expect(acts, "strategy", "token", *(("group",) if group_size else ()))
        _expect(acts, "group_size", None, -1, group_size)
        if group_size == 16:
            raise _refused("group_size", group_size)
    if floats:
        _expect(weights, "symmetric", True)
    format = Format(
        bits=weights["num_bits"],
        group=group_size,
        symmetric=bool(weights.get("symmetric", True)),
        activations="int8" if dynamic else "float",
        numbers="fp8" if floats else "int",
        tensor=tensor,
        ordered=weights.get("actorder") in ("group", True) and bool(group_size),
    )
    return Compressed(format, style == PACKED, rows)


def _reach(weights: Mapping[str, Any]) -> tuple[int, int, bool]:
    """What shares a scale: outputs of a block, inputs of a group, and whether all of a tensor does."""
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    block: Any = weights.get("block_structure")
    if strategy == "block":
        if not block_of(block):
            raise _refused("block_structure", block)
        return block[0], block[1], False
    if strategy not in ("tensor", "channel", "group"):
        raise _refused("strategy", strategy)
    _expect(weights, "block_structure", None)
    group_size = weights.get("group_size") if strategy == "group" else 0
    if group_size not in READ_GROUPS or (strategy == "group" and not group_size):
        raise _refused("group_size", group_size)
    return 0, int(group_size or 0), strategy == "tensor"


def _check_cache(scheme: Any) -> None:
    """Of a scheme for keys and values nothing is needed: ours are scaled token by token, as they come."""
    if scheme is not None and not (isinstance(scheme, dict) and scheme.get("num_bits") == 8):
        raise _refused("kv_cache_scheme", scheme)


def _expect(table: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if table.get(key, allowed[0]) not in allowed:
        raise _refused(key, table.get(key))


def _refused(key: str, value: Any) -> CheckpointError:
    return refused("compressed-tensors:", key, value, READS)
