"""Quantized checkpoints: strict both ways, written as compressed-tensors has them, rounded while loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twofold.core import CheckpointError, ConfigError
from twofold.engine.capacity import forecast, weight_bytes
from twofold.engine.config import EngineConfig
from twofold.engine.llm import LLM
from twofold.models import (
    Decoder,
    PackedContext,
    decoder_tensors,
    load,
    load_tensors,
    read_formats,
    read_spec,
    save,
    spec_from,
)
from twofold.models.quantized import formats, formats_of, quantize_weights
from twofold.quant import QuantLinear, named
from twofold.quant.compressed import Compressed

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 31}
LLAMA: dict[str, Any] = SIZES | {"architectures": ["LlamaForCausalLM"], "intermediate_size": 70}
TIED = LLAMA | {"tie_word_embeddings": True}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_key_value_heads": 1}
QWEN_MOE = LLAMA | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 34,
    "num_key_value_heads": 1,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 40,
    "vocab_size": 31,
}
FAMILIES = {
    "llama": LLAMA,
    "tied": TIED,
    "mixtral": MIXTRAL,
    "qwen2-moe": QWEN_MOE,
    "gpt2": GPT2,
    "neox": SIZES | {"architectures": ["GPTNeoXForCausalLM"], "intermediate_size": 70},
    "opt": SIZES | {"architectures": ["OPTForCausalLM"], "ffn_dim": 70, "max_position_embeddings": 40},
}
NAMES = ("int8", "int4-asym", "int4-g64-weight-only", "int8-g32-asym-weight-only")
IDS = torch.arange(20)


def floats(config: dict[str, Any], path: Path) -> Decoder:
    decoder = Decoder(spec_from(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    save(decoder, path, config=config)
    return decoder


def edit(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)


def reconfigure(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def assert_equal(a: Decoder, b: Decoder) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(IDS, PackedContext([len(IDS)])))


# ------------------------------------------------------------------------------------------------ there and back
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_while_loading_saving_and_loading_are_one(family: str, name: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    floats(config, tmp_path / "float")
    decoder = load(tmp_path / "float", quantization=name)
    afterwards = load(tmp_path / "float")
    quantize_weights(afterwards, formats(afterwards, name))
    assert_equal(afterwards, decoder)
    save(decoder, tmp_path / "small", config=config)
    again = load(tmp_path / "small")
    assert_equal(again, decoder)
    assert torch.equal(logits(again), logits(decoder))
    torch.testing.assert_close(logits(decoder), logits(load(tmp_path / "float")), atol=2.0, rtol=0.5)
    assert read_formats(tmp_path / "small") == read_formats(tmp_path / "float", name) == formats_of(decoder)


@pytest.mark.parametrize("family", ["tied", "mixtral", "neox"])
def test_tensors_stream_into_a_quantized_decoder(family: str, tmp_path: Path) -> None:
    source = floats(FAMILIES[family], tmp_path)
    decoder = load(tmp_path, quantization="int4")
    target = load(tmp_path, quantization="int4")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(-2.0)
    load_tensors(target, decoder_tensors(source))  # floats, rounded as they come
    assert not torch.equal(logits(target), logits(decoder))
    load_tensors(target, decoder_tensors(decoder))  # codes
    assert_equal(target, decoder)
    with pytest.raises(CheckpointError, match="lacks"):
        load_tensors(target, list(decoder_tensors(decoder))[:-1])
    with pytest.raises(CheckpointError, match="twice, or under two names"):
        load_tensors(target, [*decoder_tensors(decoder), next(iter(decoder_tensors(source)))])


def test_what_stays_float(tmp_path: Path) -> None:
    floats(QWEN_MOE, tmp_path)
    decoder = load(tmp_path, quantization="int4")
    held = formats_of(decoder)
    assert held["layers.1.experts.gate_up"] == named("int4") and held["layers.0.shared.down"] == named("int4")
    assert held["head"] == named("int8") and "embed" not in held
    assert {name for name, _ in decoder.named_parameters() if name.endswith("weight") and "norm" not in name} == {
        "embed.weight",
        *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("router", "shared_gate")),
    }
    without = formats(Decoder(read_spec(tmp_path), device="meta"), "int4", table=False)
    assert "head" not in without and len(without) == len(held) - 1


def test_scales_of_another_dtype_are_kept(tmp_path: Path) -> None:
    floats(LLAMA, tmp_path / "a")
    decoder = load(tmp_path / "a", quantization="int8")
    save(decoder, tmp_path / "b", config=LLAMA)
    edit(tmp_path / "b", lambda t: {n: x.float() * 1.01 if n.endswith("_scale") else x for n, x in t.items()})
    again = load(tmp_path / "b")
    assert {format.scale for format in formats_of(again).values()} == {"float32"}
    assert again.layers[0].qkv.scales.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ what is written
def test_names_and_bits_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    source = floats(LLAMA, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int4-asym"), tmp_path / "q", config=LLAMA)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj.weight"
    quantized = named("int4-asym").quantize(source.layers[1].down.weight.detach())
    assert quantized.zero is not None
    packed, zeros = tensors[f"{stem}_packed"], tensors[f"{stem}_zero_point"]
    assert packed.dtype == zeros.dtype == torch.int32
    assert packed.shape == (24, 9) and zeros.shape == (3, 3) and tensors[f"{stem}_shape"].tolist() == [24, 70]
    assert torch.equal(tensors[f"{stem}_scale"], quantized.scale)
    for n, k in ((0, 0), (5, 13), (23, 69)):
        assert int(packed[n, k // 8]) >> (4 * (k % 8)) & 15 == int(quantized.codes[n, k])
        assert int(zeros[n // 8, k // 32]) >> (4 * (n % 8)) & 15 == int(quantized.zero[n, k // 32])
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "compressed-tensors" and told["format"] == "pack-quantized"
    layers, head = told["config_groups"]["group_0"], told["config_groups"]["group_1"]
    assert layers["targets"] == ["Linear"] and head["targets"] == ["lm_head"]
    assert (layers["weights"]["num_bits"], layers["weights"]["group_size"], layers["weights"]["symmetric"]) == (
        4,
        32,
        False,
    )
    assert head["weights"]["num_bits"] == 8 and head["weights"]["strategy"] == "channel"
    assert layers["input_activations"]["strategy"] == "group" and head["input_activations"]["strategy"] == "token"


def test_int8_with_int8_activations_lies_plain(tmp_path: Path) -> None:
    source = floats(LLAMA, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int8"), tmp_path / "q", config=LLAMA)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    codes = tensors["model.layers.0.self_attn.o_proj.weight"]
    assert codes.dtype == torch.int8
    assert torch.equal(codes, named("int8").quantize(source.layers[0].out.weight.detach()).codes)
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "int-quantized" and told["ignore"] == [] and len(told["config_groups"]) == 1


def test_a_quantized_embedding_is_told_and_cannot_be_mistaken(tmp_path: Path) -> None:
    floats(TIED, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int8"), tmp_path / "q", config=TIED)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert "model.embed_tokens.weight" not in tensors and "model.embed_tokens.weight_packed" in tensors
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert told["quantized_embedding"]["weights"]["num_bits"] == 8 and told["ignore"] == ["lm_head"]


def test_routers_are_listed_as_ignored(tmp_path: Path) -> None:
    floats(QWEN_MOE, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int8"), tmp_path / "q", config=QWEN_MOE)
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    parts = ("gate", "shared_expert_gate")
    assert told["ignore"] == sorted(f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in parts)


@pytest.mark.parametrize("name", ["int8-g32-asym", "int4-asym"])
@pytest.mark.parametrize("packed", [True, False])
def test_parts_there_and_back(name: str, packed: bool) -> None:
    quantized = named(name).quantize(torch.randn(21, 75))
    stored = Compressed(quantized.format, packed)
    parts = {key: part for key, part in stored.parts("x.weight", 21, 75).items() if part.needed}
    written = {key: stored.encode(key, quantized, 21) for key in parts}
    for key, part in parts.items():
        assert tuple(written[key].shape) == part.shape and written[key].dtype == part.dtypes[0]
    again = stored.decode(written, 21, 75)
    assert quantized.zero is not None and again.zero is not None
    assert torch.equal(again.codes, quantized.codes) and torch.equal(again.scale, quantized.scale)
    assert torch.equal(again.zero, quantized.zero)


# ------------------------------------------------------------------------------------------------ other tools' files
def test_targets_by_name_and_pattern_and_layers_that_stay_float(tmp_path: Path) -> None:
    """As llm-compressor writes: a pattern for one kind of layer, another left alone."""
    source = floats(LLAMA, tmp_path / "float")
    decoder = load(tmp_path / "float")
    chosen = {name: f for name, f in formats(decoder, "int4-weight-only").items() if "down" not in name}
    quantize_weights(decoder, chosen)
    save(decoder, tmp_path / "q", config=LLAMA)

    def rewrite(told: dict[str, Any]) -> None:
        told["config_groups"]["group_0"]["targets"] = [r"re:.*(self_attn|gate_proj|up_proj).*"]
        told["config_groups"]["group_0"]["weights"] |= {"observer": "minmax", "observer_kwargs": {}, "actorder": None}
        told["ignore"] = [r"re:.*down_proj$"]
        told["version"] = "0.13.0"

    reconfigure(tmp_path / "q", rewrite)
    again = load(tmp_path / "q")
    assert_equal(again, decoder)
    assert torch.equal(again.layers[1].down.weight, source.layers[1].down.weight)


@pytest.mark.parametrize(
    ("change", "named_key"),
    [
        (lambda told: told.update(quant_method="quip"), "quant_method"),
        (lambda told: told.update(kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme"),
        (lambda told: told.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (lambda told: told.update(desc_act=True), "desc_act"),
        (lambda told: told.update(quantization_status="frozen"), "quantization_status"),
        (lambda told: told["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"), "format"),
        (lambda told: told["config_groups"]["group_0"]["weights"].update(type="float"), "type"),
        (lambda told: told["config_groups"]["group_0"]["weights"].update(num_bits=3), "num_bits"),
        (lambda told: told["config_groups"]["group_0"]["weights"].update(actorder="dynamic"), "actorder"),
        (lambda told: told["config_groups"]["group_0"]["weights"].update(group_size=48), "group_size"),
        (lambda told: told["config_groups"]["group_0"]["weights"].update(strategy="tensor_group"), "strategy"),
        (lambda told: told["config_groups"]["group_0"]["input_activations"].update(dynamic=False), "dynamic"),
        (lambda told: told["config_groups"]["group_0"].update(targets=["re:("]), "targets"),
    ],
)
def test_what_cannot_be_read_is_named(change: Callable[[dict[str, Any]], None], named_key: str, tmp_path: Path) -> None:
    floats(LLAMA, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int4"), tmp_path / "q", config=LLAMA)
    reconfigure(tmp_path / "q", change)
    with pytest.raises(CheckpointError, match=rf"quantization_config has '{named_key}'"):
        load(tmp_path / "q")


# ------------------------------------------------------------------------------------------------ strictness
@pytest.fixture
def small(tmp_path: Path) -> Path:
    floats(LLAMA, tmp_path / "float")
    save(load(tmp_path / "float", quantization="int4"), tmp_path / "q", config=LLAMA)
    return tmp_path / "q"


Q = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_part_is_named(small: Path) -> None:
    edit(small, lambda t: {name: x for name, x in t.items() if name != f"{Q}_scale"})
    with pytest.raises(CheckpointError, match=f"lacks '{Q}_scale'"):
        load(small)


def test_a_left_over_part_is_named(small: Path) -> None:
    edit(small, lambda t: t | {f"{Q}_g_idx": torch.zeros(24, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=f"left-over tensor '{Q}_g_idx'"):
        load(small)


def test_floats_where_codes_are_promised(small: Path) -> None:
    def back(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in tensors.items() if not name.startswith(Q)} | {Q: torch.zeros(24, 24)}

    edit(small, back)
    with pytest.raises(CheckpointError, match=rf"'{Q}' is torch\.float32, but config\.json says that it is quantized"):
        load(small)


def test_parts_of_another_shape_or_kind(small: Path) -> None:
    edit(small, lambda t: t | {f"{Q}_packed": torch.zeros(24, 4, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=rf"'{Q}_packed' has shape \[24, 4\].*\[24, 3\]"):
        load(small)
    edit(small, lambda t: t | {f"{Q}_packed": torch.zeros(24, 3, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=rf"'{Q}_packed' is torch\.int64.*torch\.int32"):
        load(small)
    edit(
        small,
        lambda t: t | {f"{Q}_packed": torch.zeros(24, 3, dtype=torch.int32), f"{Q}_shape": torch.tensor([24, 23])},
    )
    with pytest.raises(CheckpointError, match=rf"around tensor '{Q}_.*': says \[24, 23\]"):
        load(small)


def test_parts_of_one_product_must_be_quantized_alike(small: Path) -> None:
    reconfigure(small, lambda told: told.update(ignore=["model.layers.0.self_attn.k_proj"]))
    with pytest.raises(
        CheckpointError, match=r"q_proj' and 'model\.layers\.0\.self_attn\.k_proj' are multiplied as one"
    ):
        load(small)


def test_whole_numbers_without_a_config_are_refused(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="left-over tensor"):
        load(small)


def test_a_tied_head_in_the_file_is_compared(tmp_path: Path) -> None:
    source = floats(TIED, tmp_path)
    table = source.embed.weight.detach().clone()
    edit(tmp_path, lambda t: t | {"lm_head.weight": table})
    load(tmp_path, quantization="int8")
    edit(tmp_path, lambda t: t | {"lm_head.weight": table + 0.1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load(tmp_path, quantization="int8")


# ------------------------------------------------------------------------------------------------ settings and bytes
def test_another_format_than_the_files_is_refused(small: Path) -> None:
    assert read_formats(small, "int4") == read_formats(small)
    for wrong in (load, read_formats):
        with pytest.raises(ConfigError, match="is quantized already"):
            wrong(small, quantization="int8")
    with pytest.raises(ConfigError, match="did you mean 'int4-g64'"):
        EngineConfig(quantization="int4-g46")


@pytest.mark.parametrize("family", ["tied", "qwen2-moe"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_counted_exactly(family: str, name: str, tmp_path: Path) -> None:
    floats(FAMILIES[family], tmp_path)
    decoder = load(tmp_path, quantization=name)
    held = sum(t.numel() * t.element_size() for t in (*decoder.parameters(), *decoder.buffers()))
    assert weight_bytes(decoder.spec, torch.float32, name) == held
    assert weight_bytes(decoder.spec, torch.float32, formats_of(decoder)) == held
    packed = sum(m.packed.nbytes for m in decoder.modules() if isinstance(m, QuantLinear))
    assert held == packed + sum(p.nbytes for p in decoder.parameters())
    found = forecast(decoder.spec, EngineConfig(quantization=name, dtype="float32"), 2**34)
    assert found.weights == held


def test_what_does_not_fit_may_fit_quantized() -> None:
    spec = spec_from(
        LLAMA | {"hidden_size": 1536, "intermediate_size": 4096, "vocab_size": 32_000, "num_hidden_layers": 8}
    )
    config = EngineConfig(dtype="bfloat16", max_model_len=64, max_num_batched_tokens=16, max_num_seqs=1)
    enough = forecast(spec, config, 2**40)
    free = enough.total - enough.kv_bytes - enough.weights // 4
    refused = forecast(spec, config, free)
    assert not refused.fits and "--quantization int8" in refused.fix
    assert forecast(spec, replace(config, quantization="int8"), free).fits


def test_llm_takes_the_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown number format"):
        LLM(tmp_path, quantization="int9")
