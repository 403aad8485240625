"""Checkpoints that other tools write: every weight bit-equal to a plain reader's, what is not understood refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import LLAMA, Packer, Tensors, awq, awq_told, checkpoint, fp8, gptq, gptq_told
from safetensors.torch import load_file, save_file

from twofold.core import CheckpointError
from twofold.engine.capacity import weight_bytes
from twofold.engine.paged import KVCache, PagedContext, Span
from twofold.kernels import native
from twofold.models import Decoder, PackedContext, load, read_formats, read_spec, save
from twofold.models.compile import Program, Spans
from twofold.models.layout import Layouts
from twofold.models.quantized import formats_of
from twofold.quant import QuantLinear

IDS = torch.arange(20)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(IDS, PackedContext([len(IDS)])))


def weights_of(decoder: Decoder) -> Tensors:
    """Every matrix of a decoder by the checkpoint's name, codes widened."""
    out = {}
    for slot in Layouts(decoder).weights():
        module = decoder.get_submodule(slot.inner.removesuffix(".weight"))
        whole = module.floats() if isinstance(module, QuantLinear) else module.weight
        out[slot.name] = slot.read(whole.detach())
    return out


def assert_means(path: Path, meant: Tensors) -> Decoder:
    """The checkpoint loads, each weight is what was meant, and it computes what those floats compute."""
    decoder = load(path)
    found = weights_of(decoder)
    assert any(isinstance(module, QuantLinear) for module in decoder.modules())
    for name, weight in found.items():
        assert torch.equal(weight.float(), meant[name].float()), name
    floats = path.parent / "floats"
    floats.mkdir()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (floats / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, floats / "model.safetensors")
    torch.testing.assert_close(logits(decoder), logits(load(floats)), atol=1e-4, rtol=1e-4)
    held = sum(t.numel() * t.element_size() for t in (*decoder.parameters(), *decoder.buffers()))
    assert weight_bytes(read_spec(path), torch.float32, read_formats(path)) == held
    return decoder


def assert_written_again(path: Path, decoder: Decoder) -> None:
    """What we write of it loads with the same numbers."""
    config = json.loads((path / "config.json").read_text())
    save(decoder, path.parent / "again", config=config)
    again = load(path.parent / "again")
    assert formats_of(again) == formats_of(decoder)
    assert torch.equal(logits(again), logits(decoder))


GPTQ: dict[str, dict[str, Any]] = {
    "usual": {},
    "with zeros": {"sym": False},
    "second version": {"sym": False, "version": 2},
    "second version, symmetric": {"version": 2},
    "one group": {"group": -1},
    "groups of 64": {"group": 64, "sym": False},
    "groups of 16": {"group": 16},
    "eight bits": {"bits": 8},
    "eight bits with zeros": {"bits": 8, "sym": False, "group": 64},
    "eight bits, second version": {"bits": 8, "sym": False, "version": 2},
    "in order of energy": {"ordered": True},
    "in order of energy, with zeros": {"ordered": True, "sym": False, "bits": 8},
}


@pytest.mark.parametrize("name", GPTQ)
def test_gptq(name: str, tmp_path: Path) -> None:
    meant = checkpoint(tmp_path / "q", gptq(**GPTQ[name]), gptq_told(**GPTQ[name]))
    decoder = assert_means(tmp_path / "q", meant)
    ordered = any(format.ordered for format in formats_of(decoder).values())
    assert ordered == GPTQ[name].get("ordered", False)
    assert_written_again(tmp_path / "q", decoder)


def test_gptq_whose_groups_are_in_order_although_it_says_otherwise(tmp_path: Path) -> None:
    meant = checkpoint(tmp_path / "q", gptq(), gptq_told(ordered=True))
    decoder = assert_means(tmp_path / "q", meant)
    assert not any(format.ordered for format in formats_of(decoder).values())


@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq(group: int, tmp_path: Path) -> None:
    meant = checkpoint(tmp_path / "q", awq(group), awq_told(group))
    assert_written_again(tmp_path / "q", assert_means(tmp_path / "q", meant))


FP8: dict[str, tuple[Packer, dict[str, Any]]] = {
    "a scale a tensor, static activations": (fp8("scalar"), {"activation_scheme": "static"}),
    "a scale a tensor": (fp8("tensor"), {"activation_scheme": "dynamic", "fmt": "e4m3"}),
    "a scale an output": (fp8("channel"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "blocks of 128": (fp8("block128", "weight_scale_inv"), {"weight_block_size": [128, 128], "fmt": "e4m3"}),
    "blocks of 32": (fp8("block32", "weight_scale_inv"), {"weight_block_size": [32, 32], "scale_fmt": "float"}),
}


@pytest.mark.parametrize("name", FP8)
def test_fp8(name: str, tmp_path: Path) -> None:
    pack, told = FP8[name]
    meant = checkpoint(tmp_path / "q", pack, {"quant_method": "fp8"} | told)
    decoder = assert_means(tmp_path / "q", meant)
    assert {format.numbers for format in formats_of(decoder).values()} == {"fp8"}
    assert_written_again(tmp_path / "q", decoder)


def test_scales_of_keys_and_values_are_passed_over(tmp_path: Path) -> None:
    checkpoint(tmp_path / "q", fp8("tensor"), {"quant_method": "fp8"})
    change(tmp_path / "q", lambda t: t | {"model.layers.0.self_attn.k_scale": torch.tensor(0.5)})
    load(tmp_path / "q")


@pytest.mark.skipif(bool(native.missing()), reason="no CPU kernels: nothing is compiled")
@pytest.mark.parametrize("name", ["gptq", "awq", "fp8"])
def test_the_engine_serves_them_with_the_decoders_bits(name: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"ordered": True, "sym": False, "group": 16}
    pack, told = {
        "gptq": (gptq(**how), gptq_told(**how)),
        "awq": (awq(), awq_told()),
        "fp8": (fp8("block32", "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    }[name]
    checkpoint(tmp_path, pack, told)
    decoder, cache = load(tmp_path), KVCache(read_spec(tmp_path), 4)
    plain = KVCache(read_spec(tmp_path), 4)
    program = Program(decoder, [cache.panels_of(i).struct() for i in range(len(cache.layers))], tokens=32, rows=32)
    spans = Spans(ids=IDS.tolist(), starts=[0], counts=[len(IDS)], blocks=[(2, 3)])
    with torch.inference_mode():
        expected = decoder(IDS, PagedContext(plain, [Span(0, len(IDS), (2, 3))]))
    assert torch.equal(program.run(spans), expected)


# ------------------------------------------------------------------------------------------------ strictness
def change(path: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in edit(load_file(file)).items()}, file)


Q = "model.layers.1.self_attn.q_proj"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without(f"{Q}.qzeros"), rf"lacks '{Q}\.qzeros'"),
        (without(f"{Q}.scales"), rf"lacks '{Q}\.scales'"),
        (lambda t: t | {f"{Q}.extra": torch.zeros(3)}, rf"left-over tensor '{Q}\.extra'"),
        (lambda t: t | {f"{Q}.qzeros": torch.zeros(2, 8, dtype=torch.int32)}, r"'sym': true"),
        (lambda t: t | {f"{Q}.g_idx": torch.zeros(64, dtype=torch.int32)}, "groups of 32"),
        (lambda t: t | {f"{Q}.qweight": torch.zeros(8, 32, dtype=torch.int32)}, r"has shape \[8, 32\]"),
        (lambda t: t | {f"{Q}.scales": torch.zeros(2, 64, dtype=torch.float64)}, "float64"),
        (lambda t: t | {f"{Q}.bias": torch.ones(64)}, "has no bias"),
    ],
)
def test_a_damaged_gptq_checkpoint(edit: Callable[[Tensors], Tensors], says: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(), gptq_told())
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_biases_of_zeros_where_there_is_none(tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(), gptq_told())
    change(tmp_path, lambda t: t | {f"{Q}.bias": torch.zeros(64)})
    load(tmp_path)


def test_inputs_of_one_product_in_two_orders(tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(ordered=True), gptq_told(ordered=True))
    turned = torch.arange(64, dtype=torch.int32).flip(0) // 32
    change(tmp_path, lambda t: t | {f"{Q}.g_idx": turned})
    with pytest.raises(CheckpointError, match="inputs in different orders"):
        load(tmp_path)


def test_an_fp8_weight_that_is_not_a_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, fp8("tensor"), {"quant_method": "fp8"})
    broken = torch.full((64, 64), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    change(tmp_path, lambda t: t | {f"{Q}.weight": broken})
    with pytest.raises(CheckpointError, match=rf"around tensor '{Q}\.weight.*not a number"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("told", "key"),
    [
        (gptq_told() | {"bits": 3}, "bits"),
        (gptq_told() | {"group_size": 48}, "group_size"),
        (gptq_told() | {"checkpoint_format": "marlin"}, "checkpoint_format"),
        (gptq_told() | {"dynamic": {"-:.*down.*": {}}}, "dynamic"),
        (gptq_told() | {"rotation": "hadamard"}, "rotation"),
        (awq_told() | {"version": "gemv"}, "version"),
        (awq_told() | {"zero_point": False}, "zero_point"),
        (awq_told() | {"bits": 8}, "bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "fp8", "weight_block_size": [128, 48]}, "weight_block_size"),
        ({"quant_method": "fp8", "hidden": 1}, "hidden"),
        ({"quant_method": "bitsandbytes"}, "quant_method"),
    ],
)
def test_what_is_not_read_is_named(told: dict[str, Any], key: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(), told)
    for read in (read_spec, load):
        with pytest.raises(CheckpointError, match=rf"quantization_config has '{key}'"):
            read(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(), gptq_told())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load(tmp_path)


def test_a_quantized_checkpoint_says_its_formats(tmp_path: Path) -> None:
    checkpoint(tmp_path, gptq(sym=False, ordered=True), gptq_told(sym=False, ordered=True))
    found = read_formats(tmp_path)
    assert found["layers.0.qkv"].name == "int4-asym-weight-only" and found["layers.0.qkv"].ordered
    assert LLAMA["num_hidden_layers"] == 2 and "head" not in found
