"""Writes a checkpoint quantized as vLLM reads it (compressed-tensors), by rounding to nearest.

    python benchmarks/peers/make_vllm.py --model DIR --into DIR --format w8a8|w4a16

w8a8: int8 weights with a scale for each output, activations quantized for each token as they come. w4a16: int4 in
groups of 128, eight to a word. The table and head stay bf16, as is usual in both. Needs torch and safetensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 128
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    },
    "w4a16": {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "dynamic": False,
        },
        "input_activations": None,
    },
}


def int8(name: str, w_NK: Tensor) -> dict[str, Tensor]:
    scale_N1 = w_NK.abs().amax(1, keepdim=True) / 127
    codes_NK = (w_NK / scale_N1).round().clamp(-127, 127).to(torch.int8)
    return {name: codes_NK, name + "_scale": scale_N1.to(torch.bfloat16)}


def int4(name: str, w_NK: Tensor) -> dict[str, Tensor]:
    outputs, inputs = w_NK.shape
    w_NGk = w_NK.view(outputs, inputs // GROUP, GROUP)
    scale_NG1 = w_NGk.abs().amax(2, keepdim=True) / 7
    codes = ((w_NGk / scale_NG1).round().clamp(-8, 7) + 8).to(torch.int32).view(outputs, inputs // 8, 8)
    packed = torch.zeros(outputs, inputs // 8, dtype=torch.int32)
    for place in range(8):
        packed |= codes[..., place] << (4 * place)
    shape = torch.tensor(w_NK.shape, dtype=torch.int64)
    scales = scale_NG1.squeeze(2).to(torch.bfloat16)
    return {name + "_packed": packed, name + "_scale": scales, name + "_shape": shape}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--format", choices=SCHEMES, required=True)
    args = parser.parse_args()
    pack = int8 if args.format == "w8a8" else int4
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(args.model / "model.safetensors").items():
        tensors |= pack(name, tensor.float()) if name.endswith("_proj.weight") else {name: tensor}
    save_file(tensors, args.into / "model.safetensors", metadata={"format": "pt"})
    scheme = dict(SCHEMES[args.format])
    config = json.loads((args.model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme.pop("format"),
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "output_activations": None, **scheme}},
    }
    (args.into / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(args.model / file, args.into)


if __name__ == "__main__":
    main()
