"""Adapters against PEFT: what either writes, the other loads, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.parity import zoo
from twofold.core import CheckpointError, ConfigError
from twofold.models import Decoder, LoraConfig, PackedContext, load, load_adapter, save, save_adapter
from twofold.models.lora import adapt, loras, merge, off, pair_parameters, trained_parameters
from twofold.models.peft import CONFIG, WEIGHTS
from twofold.models.scoring import as_critic, as_reward
from twofold.models.weights import read_config

TOLERANCE = 2e-4
VARIANTS = ["llama", "gpt2", "gpt-neox", "falcon-40b", "qwen2-moe", "gemma2"]
"""Fused weights cut by rows, turned, ordered by heads, by groups of heads; a shared expert; four norms a layer."""


@pytest.fixture(scope="module", params=VARIANTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    zoo.save(zoo.ZOO[request.param], path)
    (path / "variant").write_text(request.param)
    return path


def theirs_of(base: Path):
    return zoo.build(zoo.ZOO[(base / "variant").read_text()])


def adapted(base: Path, **settings) -> Decoder:
    """The decoder of a directory with adapters that say something."""
    decoder = load(base)
    adapt(decoder, LoraConfig(**({"rank": 3, "alpha": 7.0} | settings)), seed=1)
    source = torch.Generator().manual_seed(2)
    for name, parameter in pair_parameters(decoder).items():
        if name.endswith(".b"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return decoder


@torch.no_grad()
def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.logits(decoder(ids, PackedContext([len(ids)])))


IDS = torch.arange(3, 43)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours(base: Path, tmp_path: Path, rslora: bool) -> None:
    ours = adapted(base, rslora=rslora)
    save_adapter(ours, tmp_path, str(base))
    theirs = peft.PeftModel.from_pretrained(theirs_of(base), str(tmp_path)).eval()
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    found = logits(ours, IDS)
    assert (found - expected).abs().max() < TOLERANCE
    with off(ours):
        assert (logits(ours, IDS) - expected).abs().max() > 0.05, "the adapters say something"
        assert torch.equal(logits(ours, IDS), logits(load(base), IDS))
    loaded = {key for key, _ in theirs.named_parameters() if "lora_" in key}
    assert len(loaded) == len(load_file(tmp_path / WEIGHTS)), "each of ours is one of theirs"


def test_ours_loads_pefts(base: Path, tmp_path: Path) -> None:
    names = {name.rpartition(".")[2] for name in ("self_attn.q_proj", "self_attn.v_proj")}
    variant = (base / "variant").read_text()
    names = {"gpt2": {"c_attn"}, "gpt-neox": {"query_key_value"}, "falcon-40b": {"query_key_value"}}.get(variant, names)
    config = peft.LoraConfig(r=5, lora_alpha=8, target_modules=sorted(names), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs_of(base), config)
    torch.manual_seed(0)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    ours = load(base)
    told = load_adapter(ours, tmp_path)
    assert (told.rank, told.scale) == (5, 8 / 5)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    assert (logits(ours, IDS) - expected).abs().max() < TOLERANCE
    merge(ours)
    assert (logits(ours, IDS) - expected).abs().max() < TOLERANCE and not loras(ours)


def test_a_round_trip_keeps_every_bit_and_a_merged_model_its_logits(base: Path, tmp_path: Path) -> None:
    ours, again = adapted(base), load(base)
    save_adapter(ours, tmp_path / "adapter", str(base))
    load_adapter(again, tmp_path / "adapter")
    expected = logits(ours, IDS)
    assert torch.equal(logits(again, IDS), expected)
    with pytest.raises(CheckpointError, match="merge them"):
        save(again, tmp_path / "merged", config=read_config(base))
    merge(again)
    assert all(parameter.requires_grad for parameter in again.parameters())
    spread = expected.abs().max()
    assert (logits(again, IDS) - expected).abs().max() < 1e-5 * max(1.0, float(spread))
    save(again, tmp_path / "merged", config=read_config(base))
    assert torch.equal(logits(load(tmp_path / "merged"), IDS), logits(again, IDS))


def test_a_score_head_is_trained_in_full_and_goes_with_the_adapters(tmp_path: Path) -> None:
    """Zeros that were frozen would let no gradient through; PEFT has the head as one of `modules_to_save`."""
    zoo.save(zoo.ZOO["llama"], tmp_path / "base")
    config = as_reward(read_config(tmp_path / "base"))
    ours = load(tmp_path / "base", wanted=config)
    adapt(ours, LoraConfig(rank=3), seed=1)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {*pair_parameters(ours), "score.weight"}
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained_parameters(ours).values():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    save_adapter(ours, tmp_path / "adapter")
    again = load(tmp_path / "base", wanted=config)
    load_adapter(again, tmp_path / "adapter")
    hidden_TD = ours(IDS, PackedContext([len(IDS)]))
    assert torch.equal(again.scores(again(IDS, PackedContext([len(IDS)]))), ours.scores(hidden_TD))
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["modules_to_save"] == ["score"]
    labelled = {"num_labels": 1, "pad_token_id": 0}
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **labelled)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    assert (ours.scores(hidden_TD)[-1] - expected).abs().max() < TOLERANCE and expected.abs().max() > 0.01


# --------------------------------------------------------------------------------------------- what is refused
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter for it."""
    path = tmp_path_factory.mktemp("llama")
    zoo.save(zoo.ZOO["llama"], path / "base")
    save_adapter(adapted(path / "base"), path / "adapter")
    return path / "base", path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "'use_dora' is True, which is not built"),
        ({"rank_pattern": {"q_proj": 2}}, "'rank_pattern' is .*not built"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is .*not built"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, "'pissa' has changed the base"),
        ({"r": "eight"}, "r 'eight'"),
        ({"r": 0}, "rank must be 1 or more"),
        ({"r": 4}, r"lora_A.weight' has shape \[3, 40\]; this model asks for \[4, 40\]"),
        ({"brand_new": 3}, "'brand_new' is 3"),
    ],
)
def test_settings_that_are_not_built_are_named(llama, tmp_path: Path, change: dict, message: str) -> None:
    table = json.loads((llama[1] / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps(table))
    (tmp_path / WEIGHTS).write_bytes((llama[1] / WEIGHTS).read_bytes())
    decoder = load(llama[0])
    with pytest.raises(CheckpointError, match=message):
        load_adapter(decoder, tmp_path)
    assert not loras(decoder) and all(parameter.requires_grad for parameter in decoder.parameters())


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST.replace("lora_A", "lora_B")), "lacks '.*q_proj.lora_B.weight'"),
        (lambda t: t.update({FIRST.replace("layers.0", "layers.9"): t[FIRST]}), "layers.9.self_attn.q_proj"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[FIRST]}), "lm_head.* has no adapters here"),
        (lambda t: t.update({FIRST.replace("lora_A", "lora_C"): t[FIRST]}), "left-over tensor '.*lora_C"),
        (lambda t: t.update({FIRST: t[FIRST].int()}), "is torch.int32; floats are needed"),
        (lambda t: t.clear(), "no tensor called"),
    ],
)
def test_tensors_are_read_strictly(llama, tmp_path: Path, change, message: str) -> None:
    tensors = load_file(llama[1] / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((llama[1] / CONFIG).read_text())
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load(llama[0]), tmp_path)


def test_pickled_adapters_are_not_opened(llama, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text((llama[1] / CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run code when opened"):
        load_adapter(load(llama[0]), tmp_path)


def test_a_target_that_is_none_of_the_models_is_named(llama) -> None:
    with pytest.raises(
        ConfigError, match="'c_attn' is none of this model's; the linear layers are down_proj, gate_proj"
    ):
        adapt(load(llama[0]), LoraConfig(targets=("q_proj", "c_attn")))
    with pytest.raises(ConfigError, match="'lm_head' has no adapters here"):
        adapt(load(llama[0]), LoraConfig(targets=("lm_head",)))
    decoder = adapted(llama[0], targets=("self_attn.q_proj", "down_proj"))
    assert set(loras(decoder)) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("qkv", "down")}
    with pytest.raises(ConfigError, match="adapters already"):
        adapt(decoder, LoraConfig())


# ------------------------------------------------------------------------------------------------ score heads
@pytest.mark.parametrize("heads", [as_reward, as_critic])
def test_a_score_head_is_trained_whole_and_kept_beside_the_adapters(heads, tmp_path: Path) -> None:
    zoo.save(zoo.ZOO["qwen2"], tmp_path / "base")
    config = heads(read_config(tmp_path / "base"))
    ours = load(tmp_path / "base", wanted=config)
    adapt(ours, LoraConfig(rank=3), seed=1)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == set(pair_parameters(ours)) | {"score.weight"}
    before = ours.scores(ours(IDS, PackedContext([len(IDS)]))).square().sum()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.2)
    save_adapter(ours, tmp_path / "adapter", "base")
    again = load(tmp_path / "base", wanted=config)
    load_adapter(again, tmp_path / "adapter")
    scores = [x.scores(x(IDS, PackedContext([len(IDS)]))) for x in (ours, again)]
    assert torch.equal(*scores) and scores[0].abs().max() > 0.05 and before == 0
    if heads is as_critic:
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")  # as the causal model that it is too
        return
    save(load(tmp_path / "base", wanted=config), tmp_path / "reward", config=config)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - scores[0][-1]).abs().max() < TOLERANCE
