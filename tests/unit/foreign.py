"""Tiny checkpoints as other tools write them, packed by hand from the published layouts, and plain readers of them.

The readers are slow and straightforward: a number at a time, in the order in which the layout is described.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twofold.models import Decoder, save, spec_from

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "intermediate_size": 128,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, Tensor]
Packer = Callable[[Tensor, torch.Generator], tuple[Tensors, Tensor]]
"""A float weight [N, K] to a module's tensors by their last names, and the weight that they mean, fp32."""


def checkpoint(path: Path, pack: Packer, told: dict[str, Any], config: dict[str, Any] = LLAMA) -> Tensors:
    """Write a tiny model whose projections are packed; returns what each of its weights means, by the float's name."""
    decoder = Decoder(spec_from(config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    save(decoder, path, config=config)
    file = path / "model.safetensors"
    out, meant = {}, {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight"):
            parts, meant[name] = pack(tensor.float(), generator)
            stem = name.removesuffix("weight")
            out |= {stem + part: value.contiguous() for part, value in parts.items()}
        else:
            out[name] = tensor
            meant[name] = tensor
    save_file(out, file)
    table = json.loads((path / "config.json").read_text()) | {"quantization_config": told}
    (path / "config.json").write_text(json.dumps(table))
    return meant


def words(codes: list[int], bits: int) -> int:
    """Codes into one signed 32-bit word, the first in the lowest bits."""
    word = sum(code << (bits * place) for place, code in enumerate(codes))
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_rows(codes_RC: Tensor, bits: int) -> Tensor:
    """Each row's codes into words."""
    each = 32 // bits
    return torch.tensor(
        [[words(row[at : at + each], bits) for at in range(0, len(row), each)] for row in codes_RC.tolist()],
        dtype=torch.int32,
    )


def gptq(*, bits: int = 4, group: int = 32, sym: bool = True, ordered: bool = False, version: int = 1) -> Packer:
    """As AutoGPTQ packs: w = scale[g_idx] · (code − zero[g_idx]); qweight along inputs, qzeros along outputs."""

    def pack(w_NK: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        n, k = w_NK.shape
        size, middle = (k if group == -1 else group), 1 << (bits - 1)
        groups = k // size
        g_idx = torch.arange(k) // size
        if ordered:  # one order for all matrices with as many inputs, as layers that read the same text have
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
        zeros = torch.full((n, groups), middle)
        if not sym:
            zeros = torch.randint(1, 1 << bits, (n, groups), generator=generator)
            if version == 2:
                zeros[0, 0] = 0
        scales = (torch.rand(n, groups, generator=generator) * 0.02 + 0.001).half()
        stored = zeros - 1 if version == 1 else zeros
        parts = {
            "qweight": pack_rows(codes, bits).t(),
            "qzeros": pack_rows(stored.t(), bits),
            "scales": scales.t(),
            "g_idx": g_idx.to(torch.int32),
        }
        meant = torch.stack([scales[:, g].float() * (codes[:, i] - zeros[:, g]) for i, g in enumerate(g_idx)], 1)
        return parts, meant

    return pack


def gptq_told(*, bits: int = 4, group: int = 32, sym: bool = True, ordered: bool = False, version: int = 1) -> Any:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": sym,
        "damp_percent": 0.01,
        "true_sequential": True,
        "static_groups": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }


def awq(group: int = 32) -> Packer:
    """As AutoAWQ's gemm packs: both along outputs, eight to a word in the order 0 2 4 6 1 3 5 7."""

    def along_outputs(codes_RN: Tensor) -> Tensor:
        rows = [
            [words([row[at + i] for i in AWQ_ORDER], 4) for at in range(0, len(row), 8)] for row in codes_RN.tolist()
        ]
        return torch.tensor(rows, dtype=torch.int32)

    def pack(w_NK: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        n, k = w_NK.shape
        size = k if group == -1 else group
        codes = torch.randint(0, 16, (k, n), generator=generator)
        zeros = torch.randint(0, 16, (k // size, n), generator=generator)
        scales = (torch.rand(k // size, n, generator=generator) * 0.02 + 0.001).half()
        parts = {"qweight": along_outputs(codes), "qzeros": along_outputs(zeros), "scales": scales}
        meant = torch.stack([scales[i // size].float() * (codes[i] - zeros[i // size]) for i in range(k)], 1)
        return parts, meant

    return pack


def awq_told(group: int = 32) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def fp8(kind: str, name: str = "weight_scale") -> Packer:
    """torch's float8 times scales: of a tensor, of each output, or of blocks of 128 by 128 (or 32 by 32)."""

    def pack(w_NK: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        n, k = w_NK.shape
        codes = (w_NK * 300).clamp(-448, 448).to(torch.float8_e4m3fn)
        if kind.startswith("block"):
            size = int(kind[5:])
            scale = torch.rand(-(-n // size), -(-k // size), generator=generator) * 0.01
            whole = scale.repeat_interleave(size, 0)[:n].repeat_interleave(size, 1)[:, :k]
        else:
            shape = {"scalar": (), "tensor": (1,), "channel": (n, 1)}[kind]
            scale = torch.rand(shape, generator=generator) * 0.01
            whole = scale
        parts = {"weight": codes, name: scale}
        if kind == "scalar":
            parts["input_scale"] = torch.tensor(0.02)
        return parts, codes.float() * whole

    return pack
