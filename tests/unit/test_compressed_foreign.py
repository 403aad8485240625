"""compressed-tensors' files in every style that is read: weights bit-equal to its own decompression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from foreign import LLAMA, Packer, Tensors, checkpoint
from safetensors.torch import load_file
from test_foreign_checkpoints import assert_means, assert_written_again, change, weights_of

from twofold.core import ConfigError
from twofold.models import Decoder, load, save, spec_from
from twofold.models.quantized import formats_of
from twofold.quant import named
from twofold.quant.config import Recipe
from twofold.quant.gptq import gptq

STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "packed, asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "packed, 8 bits": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "packed, groups of 16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
    "whole numbers": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "whole numbers, a scale a tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "whole numbers, asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "floats by output": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "floats by tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "floats by block": (
        "naive-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]},
    ),
    "naive": ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
}


def style(name: str) -> tuple[Packer, dict[str, Any]]:
    """A packer that compressed-tensors itself compresses and decompresses with, and what it says of itself."""
    format, told = STYLES[name]
    args = QuantizationArgs(**({"symmetric": True, "dynamic": False} | told))
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)

    def pack(w_NK: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        n, k = w_NK.shape
        block = told.get("block_structure")
        shape = {
            "tensor": (1,),
            "channel": (n, 1),
            "group": (n, k // told.get("group_size", 1)),
            "block": (-(-n // block[0]), -(-k // block[1])) if block else (),
        }[told["strategy"]]
        scale = torch.rand(shape, generator=generator) * 0.05 + 0.01
        state = {"weight": w_NK.clone(), "weight_scale": scale}
        if not args.symmetric:
            half = 1 << (args.num_bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
        packed = compressor.compress(state, scheme)
        return dict(packed), compressor.decompress(packed, scheme)["weight"].float()

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    }
    return pack, config


@pytest.mark.parametrize("name", STYLES)
def test_every_style(name: str, tmp_path: Path) -> None:
    pack, told = style(name)
    told = json.loads(json.dumps(told))
    for key in ("observer", "observer_kwargs", "scale_dtype", "zp_dtype"):
        told["config_groups"]["group_0"]["weights"].pop(key, None)
    meant = checkpoint(tmp_path / "q", pack, told)
    assert_written_again(tmp_path / "q", assert_means(tmp_path / "q", meant))


def test_groups_of_inputs_in_an_order_of_their_own(tmp_path: Path) -> None:
    """actorder "group": g_idx tells the group of each input (as compressed-tensors wrote until 0.19)."""
    pack, told = style("packed, asymmetric")
    told = json.loads(json.dumps(told))
    weights = told["config_groups"]["group_0"]["weights"]
    weights["actorder"] = "group"
    g_idx = torch.arange(64, dtype=torch.int32).flip(0) // 32
    wide = torch.arange(128, dtype=torch.int32).flip(0) // 32
    checkpoint(tmp_path, pack, told)

    def turn(tensors: Tensors) -> Tensors:
        names = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]
        return tensors | {f"{name}_g_idx": (wide if "down" in name else g_idx).clone() for name in names}

    change(tmp_path, turn)
    decoder = load(tmp_path)
    assert all(format.ordered for format in formats_of(decoder).values())
    stored, found = load_file(tmp_path / "model.safetensors"), weights_of(decoder)
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        shape = torch.Size(stored[f"{name}_shape"].tolist())
        scale, groups = stored[f"{name}_scale"], stored[f"{name}_g_idx"].long()
        codes = unpack_from_int32(stored[f"{name}_packed"], 4, shape)
        zeros = unpack_from_int32(stored[f"{name}_zero_point"], 4, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
        assert torch.equal(found[name], (codes - zeros[:, groups]).float() * scale[:, groups]), name


# ------------------------------------------------------------------------------------------------ one scale a matrix
@pytest.mark.parametrize("name", ["int8-tensor", "int8-tensor-asym-weight-only", "fp8-tensor", "fp8", "fp8-g64"])
def test_formats_of_ours_are_written_and_read(name: str, tmp_path: Path) -> None:
    source = Decoder(spec_from(LLAMA))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    save(source, tmp_path / "float", config=LLAMA)
    decoder = load(tmp_path / "float", quantization=name)
    assert formats_of(decoder)["layers.0.qkv"] == named(name)
    save(decoder, tmp_path / "q", config=LLAMA)
    again = load(tmp_path / "q")
    assert formats_of(again) == formats_of(decoder)
    for key, tensor in decoder.state_dict().items():
        other = again.state_dict()[key]
        same = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (tensor, other))
        assert torch.equal(*same), key


def test_one_scale_a_matrix_is_one() -> None:
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    for name in ("int8-tensor", "fp8-tensor", "int8-tensor-asym"):
        quantized = named(name).quantize(w)
        assert len(quantized.scale.unique()) == 1
        assert (quantized.dequantize() - w).abs().max() < 0.2
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.1, 3, 64)
        found = gptq(w, x.t() @ x, named(name))
        assert len(found.scale.unique()) == 1
        errors = [((q.dequantize() - w) @ x.t()).square().sum() for q in (found, quantized)]
        assert errors[0] < errors[1]
    assert Recipe(format="fp8", per_tensor=True).name == "fp8-tensor"
    assert Recipe(format="int8", per_tensor=True, asymmetric=True).name == "int8-tensor-asym"
    for wrong in ({"format": "int4"}, {"format": "int8", "group": 64}):
        with pytest.raises(ConfigError):
            Recipe(**wrong, per_tensor=True)  # type: ignore[arg-type]
