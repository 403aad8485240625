"""Adapters that PEFT wrote, several in one batch: each token's logits are those of its own PEFT model, and of the
checkpoint that its adapter was merged into."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from tests.parity import zoo
from tests.parity.test_adapters import logits_of
from twofold.core import CapacityError, CheckpointError, ConfigError
from twofold.models import Decoder, PackedContext, load, load_adapter
from twofold.models.adapters import Slots
from twofold.models.lora import adapt, merge
from twofold.models.lora_config import LoraConfig
from twofold.models.peft import CONFIG
from twofold.models.weights import read_config, save

IDS = torch.arange(3, 43)
VARIANTS = {
    "llama": ({"q_proj", "v_proj"}, {"gate_proj", "down_proj", "k_proj"}),
    "gpt2": ({"c_attn"}, {"c_attn", "c_proj", "c_fc"}),
    "falcon-40b": ({"query_key_value"}, {"dense", "query_key_value"}),
    "phi3": ({"qkv_proj"}, {"gate_up_proj", "o_proj"}),
    "qwen2-moe": ({"q_proj", "o_proj"}, {"v_proj"}),
}
"""Fused weights cut by rows, turned, ordered by groups of heads, fused in the checkpoint too; experts beside."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(variant)
    zoo.save(zoo.ZOO[variant], path)
    return path


def made(variant: str, path: Path, **settings) -> Tensor:
    """Write an adapter with PEFT; the logits that its model then has."""
    theirs = peft.get_peft_model(zoo.build(zoo.ZOO[variant]), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(settings["r"])
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(path)
    with torch.no_grad():
        return theirs(IDS[None]).logits[0]


def put(slots: Slots, slot: int, path: Path) -> None:
    slots.put(slot, slots.read(path, 1 << 30))


def test_a_mixed_batch_has_the_logits_of_each_peft_model(variant: str, base: Path, tmp_path: Path) -> None:
    few, many = VARIANTS[variant]
    expected = [
        made(variant, tmp_path / "a", r=3, lora_alpha=8, target_modules=sorted(few)),
        made(variant, tmp_path / "b", r=19, lora_alpha=6, target_modules=sorted(many), use_rslora=True),
    ]
    decoder = load(base)
    plain = logits_of(decoder, IDS)
    slots = Slots(decoder, 3, 32)
    put(slots, 2, tmp_path / "a")
    put(slots, 0, tmp_path / "b")
    count = len(IDS)
    with slots.step(decoder, [count] * 3, [3, 0, 1]), torch.no_grad():
        found = decoder.logits(decoder(IDS.repeat(3), PackedContext([count] * 3))).split(count)
    assert torch.equal(found[1], plain), "who has no adapter has the base's bits"
    for mine, theirs, name in zip((found[0], found[2]), expected, "ab", strict=True):
        assert (mine - theirs).abs().max() < 2e-4
        assert (mine - plain).abs().max() > 0.02, "it says something"
        whole = load(base)
        load_adapter(whole, tmp_path / name)
        merge(whole)
        save(whole, tmp_path / f"merged {name}", config=read_config(base))
        merged = logits_of(load(tmp_path / f"merged {name}"), IDS)
        assert (mine - merged).abs().max() <= 1e-5 * max(1.0, float(merged.abs().max()))


# ------------------------------------------------------------------------------------------------ refusals
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    path = tmp_path_factory.mktemp("refused")
    zoo.save(zoo.ZOO["llama"], path / "base")
    made("llama", path / "good", r=4, lora_alpha=8, target_modules=["q_proj"])
    return load(path / "base"), path


REFUSED = [
    ({"bias": "all"}, "bias"),
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"peft_type": "ADALORA"}, "ADALORA"),
    ({"r": 5}, "shape"),
    ({"r": 0}, "rank"),
    ({"r": "4"}, "r '4'"),
    ({"something_new": 3}, "something_new"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_what_is_not_built_is_refused_by_name(llama: tuple[Decoder, Path], tmp_path: Path, changes, named) -> None:
    decoder, path = llama
    for file in (path / "good").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    table = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=named):
        Slots(decoder, 1, 16).read(tmp_path, 1 << 30)


def test_a_score_head_and_what_is_too_large_are_refused(llama: tuple[Decoder, Path], tmp_path: Path) -> None:
    decoder, path = llama
    slots = Slots(decoder, 1, 3)
    with pytest.raises(CapacityError, match="--max-lora-rank 4"):
        slots.read(path / "good", 1 << 30)
    with pytest.raises(CapacityError, match="--lora-cache-bytes"):
        Slots(decoder, 1, 4).read(path / "good", 100)
    reward = peft.get_peft_model(
        zoo.build(zoo.ZOO["llama"]),
        peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    )
    reward.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="modules_to_save"):
        Slots(decoder, 1, 4).read(tmp_path / "saved", 1 << 30)
    trained = load(path / "base")
    adapt(trained, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="trained"):
        Slots(trained, 1, 4)


def test_the_digest_is_of_numbers_and_scale(llama: tuple[Decoder, Path], tmp_path: Path) -> None:
    decoder, path = llama
    slots = Slots(decoder, 1, 8)
    first = slots.read(path / "good", 1 << 30)
    assert slots.read(path / "good", 1 << 30).digest == first.digest and first.rank == 4
    for file in (path / "good").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    table = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(table | {"inference_mode": False, "revision": "x"}))
    assert slots.read(tmp_path, 1 << 30).digest == first.digest
    (tmp_path / CONFIG).write_text(json.dumps(table | {"lora_alpha": 9}))
    assert slots.read(tmp_path, 1 << 30).digest != first.digest
