"""Loading is strict, safe and lean; other spellings of names are understood; saving can be repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.core.errors import CheckpointError
from twofold.models import Decoder, decoder_tensors, load, load_tensors, save, spec_from

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 31}
LLAMA: dict[str, Any] = SIZES | {"architectures": ["LlamaForCausalLM"], "intermediate_size": 29}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 40,
    "vocab_size": 31,
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_key_value_heads": 1}
QWEN = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "num_key_value_heads": 1,
}
OPT = SIZES | {"architectures": ["OPTForCausalLM"], "ffn_dim": 29, "max_position_embeddings": 40}
NEOX = SIZES | {"architectures": ["GPTNeoXForCausalLM"], "intermediate_size": 29}

Tensors = dict[str, torch.Tensor]


def make(config: dict[str, Any], path: Path, **how: Any) -> Decoder:
    decoder = Decoder(spec_from(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    save(decoder, path, config=config, **how)
    return decoder


def edit(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)


def assert_equal(a: Decoder, b: Decoder) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------ strictness
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    gone = "model.layers.1.self_attn.k_proj.weight"
    edit(tmp_path, lambda t: {name: x for name, x in t.items() if name != gone})
    with pytest.raises(CheckpointError, match=gone):
        load(tmp_path)


@pytest.mark.parametrize("extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_a_left_over_tensor_is_named(tmp_path: Path, extra: str) -> None:
    make(LLAMA, tmp_path)
    edit(tmp_path, lambda t: t | {extra: torch.zeros(24)})
    with pytest.raises(CheckpointError, match=f"left-over tensor '{extra}'"):
        load(tmp_path)


def test_another_shape_is_named(tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    edit(tmp_path, lambda t: t | {"model.norm.weight": torch.zeros(25)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \[25\].*\[24\]"):
        load(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    edit(tmp_path, lambda t: t | {"model.norm.weight": torch.zeros(24, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        load(tmp_path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    make(GPT2, tmp_path)
    edit(tmp_path, lambda t: t | {"wte.weight": t["transformer.wte.weight"].clone()})
    with pytest.raises(CheckpointError, match="twice, or under two names"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ other spellings
def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    decoder = make(GPT2, tmp_path)
    edit(tmp_path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    assert_equal(load(tmp_path), decoder)
    edit(tmp_path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load(tmp_path)


@pytest.mark.parametrize(("config", "prefix"), [(GPT2, "transformer."), (OPT, "model.")])
def test_the_bare_models_names(tmp_path: Path, config: dict[str, Any], prefix: str) -> None:
    decoder = make(config, tmp_path)
    edit(tmp_path, lambda t: {name.removeprefix(prefix): x for name, x in t.items()})
    assert all(not name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    assert_equal(load(tmp_path), decoder)


def test_old_buffers_are_no_weights(tmp_path: Path) -> None:
    decoder = make(GPT2, tmp_path)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    edit(tmp_path, lambda t: t | masks)
    assert_equal(load(tmp_path), decoder)


def test_a_head_under_its_newer_name(tmp_path: Path) -> None:
    decoder = make(NEOX, tmp_path)
    edit(tmp_path, lambda t: {name.replace("embed_out", "lm_head"): x for name, x in t.items()})
    assert_equal(load(tmp_path), decoder)


def fuse(tensors: Tensors, old: str, new: str, gate: str, up: str, down: str) -> Tensors:
    out = {name: x for name, x in tensors.items() if ".experts." not in name}
    out = {name.replace(old + ".gate.", new + ".gate."): x for name, x in out.items()}
    for i in range(2):

        def stack(part: str, i: int = i) -> torch.Tensor:
            return torch.stack([tensors[f"model.layers.{i}.{old}.experts.{e}.{part}.weight"] for e in range(3)])

        base = f"model.layers.{i}.{new}.experts."
        out[base + "gate_up_proj"] = torch.cat([stack(gate), stack(up)], 1)
        out[base + "down_proj"] = stack(down)
    return out


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (MIXTRAL, ("block_sparse_moe", "mlp", "w1", "w3", "w2")),
        (QWEN, ("mlp", "mlp", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_stored_as_one_tensor(tmp_path: Path, config: dict[str, Any], names: tuple[str, ...]) -> None:
    decoder = make(config, tmp_path)
    single = load_file(tmp_path / "model.safetensors")
    edit(tmp_path, lambda t: fuse(t, *names))
    assert_equal(load(tmp_path), decoder)
    both = next(name for name in single if ".experts.1." in name)
    edit(tmp_path, lambda t: t | {both: single[both]})
    with pytest.raises(CheckpointError, match="twice, or under two names"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ files
def test_shards_and_their_index(tmp_path: Path) -> None:
    decoder = make(LLAMA, tmp_path, shard_bytes=6000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert_equal(load(tmp_path), decoder)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in decoder.parameters())


def test_saving_again_leaves_no_old_shards(tmp_path: Path) -> None:
    make(LLAMA, tmp_path, shard_bytes=6000)
    (tmp_path / "tokenizer.json").write_text("{}")
    decoder = make(LLAMA, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_equal(load(tmp_path), decoder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", "x.bin"]
)
def test_an_index_stays_in_its_directory(tmp_path: Path, file: str) -> None:
    make(LLAMA, tmp_path / "model")
    make(LLAMA, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, file)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors files beside it"):
        load(tmp_path / "model")


def test_an_index_that_disagrees_with_its_files(tmp_path: Path) -> None:
    make(LLAMA, tmp_path, shard_bytes=6000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"left-over tensor 'model\.norm\.weight'"):
        load(tmp_path)
    index["weight_map"]["model.norm.weight"] = moved
    index["weight_map"]["nothing.weight"] = moved
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'nothing\.weight'"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make(LLAMA, tmp_path, shard_bytes=6000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load(tmp_path)


def test_a_truncated_file_is_named_before_any_memory_is_taken(tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "not a JSON table"), (None, "cannot be read")])
def test_a_broken_config(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load(tmp_path / "nowhere")


def test_more_positions_than_the_table_has(tmp_path: Path) -> None:
    make(GPT2, tmp_path)
    assert load(tmp_path, max_len=40).max_len == 40
    with pytest.raises(CheckpointError, match="40 position vectors"):
        load(tmp_path, max_len=41)


# ------------------------------------------------------------------------------------------------ in place
@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTRAL, NEOX])
def test_weights_travel_by_the_checkpoints_names(tmp_path: Path, config: dict[str, Any]) -> None:
    source = make(config, tmp_path)
    target = Decoder(spec_from(config))
    storage = [parameter.data_ptr() for parameter in target.parameters()]
    load_tensors(target, decoder_tensors(source))
    assert_equal(target, source)
    assert [parameter.data_ptr() for parameter in target.parameters()] == storage
    stored = load_file(tmp_path / "model.safetensors")
    named = dict(decoder_tensors(source))
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[name], stored[name]) for name in stored)


def test_an_update_must_be_whole(tmp_path: Path) -> None:
    source = make(LLAMA, tmp_path)
    pairs = list(decoder_tensors(source))
    with pytest.raises(CheckpointError, match="lacks"):
        load_tensors(Decoder(source.spec), pairs[:-1])
    with pytest.raises(CheckpointError, match="twice"):
        load_tensors(Decoder(source.spec), [*pairs, pairs[0]])


def test_save_wants_the_config_of_its_decoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        save(Decoder(spec_from(LLAMA)), tmp_path, config=LLAMA | {"rms_norm_eps": 0.1})


def test_bfloat16_there_and_back(tmp_path: Path) -> None:
    make(LLAMA, tmp_path / "a")
    half = load(tmp_path / "a", dtype=torch.bfloat16)
    save(half, tmp_path / "b", config=LLAMA)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert_equal(load(tmp_path / "b", dtype=torch.bfloat16), half)


# ------------------------------------------------------------------------------------------------ memory
PEAK = """
import sys, torch
from pathlib import Path
from twofold.models import load

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

load(sys.argv[1])  # what torch imports on first use is not the weights'
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
sizes = [parameter.nbytes for parameter in load(sys.argv[2]).parameters()]
print(status("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_the_weights_and_one_tensor(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 2560,
        "vocab_size": 8192,
    }
    make(LLAMA, tmp_path / "small")
    make_large(config, tmp_path / "large")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    peak, weights, largest = map(int, run.stdout.split())
    assert weights > 200_000_000
    assert weights * 0.9 < peak < weights + largest + (4 << 20)


def make_large(config: dict[str, Any], path: Path) -> None:
    decoder = Decoder(spec_from(config))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(0.5)
    save(decoder, path, config=config)
