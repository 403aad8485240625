"""Every architecture against transformers: logits, greedy tokens, and checkpoints there and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.parity import zoo
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.models import Decoder, PackedContext, load, read_config, save
from twofold.models.families import FAMILIES

NEW_TOKENS = 32
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Pair:
    """One variant in both libraries."""

    path: Path
    theirs: transformers.PreTrainedModel
    ours: Decoder
    prompt: list[int]


@pytest.fixture(scope="module", params=sorted(zoo.ZOO))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant = zoo.ZOO[request.param]
    path = tmp_path_factory.mktemp("zoo")
    theirs = zoo.save(variant, path)
    return Pair(path, theirs, load(path, max_len=variant.max_len), zoo.prompt_of(variant))


def test_the_zoo_has_every_architecture() -> None:
    assert sorted(FAMILIES) == zoo.ARCHITECTURES
    assert len(zoo.ARCHITECTURES) == 25


def test_logits_of_the_whole_prompt(pair: Pair) -> None:
    ids = torch.tensor(pair.prompt)
    with torch.no_grad():
        theirs = pair.theirs(ids[None]).logits[0]
        ours = pair.ours.logits(pair.ours(ids, PackedContext([len(pair.prompt)])))
    assert theirs.std() > 0.05
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE


def test_greedy_tokens(pair: Pair) -> None:
    ids = torch.tensor([pair.prompt])
    full = pair.theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    theirs = full[0, len(pair.prompt) :].tolist()
    assert len(theirs) == NEW_TOKENS
    assert greedy(pair.ours, pair.prompt) == theirs


def greedy(decoder: Decoder, prompt: list[int]) -> list[int]:
    config = EngineConfig(num_blocks=12, max_num_batched_tokens=64, max_num_seqs=4)
    engine = Engine(decoder, config)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    engine.submit(Request(id="greedy", prompt_ids=tuple(prompt), params=params))
    out: list[int] = []
    while engine.has_work:
        out += [token.id for output in engine.step() for token in output.tokens]
    return out


def test_export_is_what_transformers_loads(pair: Pair, tmp_path: Path) -> None:
    save(pair.ours, tmp_path, config=read_config(pair.path), shard_bytes=40_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    cls = type(pair.theirs)
    back, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.config.to_dict() | {"_name_or_path": ""} == pair.theirs.config.to_dict() | {"_name_or_path": ""}
    expected = pair.theirs.state_dict()
    found = back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = load(tmp_path, max_len=pair.ours.max_len)
    ours = dict(pair.ours.named_parameters())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.named_parameters())
