"""LLM with adapters: one for all prompts or one for each, and the texts of the checkpoints they are merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import make_checkpoint

import twofold
from twofold.core import CheckpointError, RequestError
from twofold.models import LoraConfig, load, read_config, save, save_adapter
from twofold.models.lora import adapt, merge, pair_parameters

PROMPTS = ["def add(a, b):", "The quick brown fox", "for i in range(10):", "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two adapters of it, and the two checkpoints that they are merged into."""
    base = tmp_path_factory.mktemp("llm")
    model = make_checkpoint(base / "model")
    for name, rank in (("one", 3), ("two", 12)):
        decoder = load(model)
        adapt(decoder, LoraConfig(rank=rank, alpha=8.0), seed=rank)
        source = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for key, parameter in pair_parameters(decoder).items():
                if key.endswith(".b"):
                    parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
        save_adapter(decoder, base / name)
        merge(decoder)
        save(decoder, base / f"merged {name}", config=read_config(model))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (base / f"merged {name}" / file).write_bytes((model / file).read_bytes())
    return base


@pytest.fixture(scope="module")
def llm(folder: Path) -> twofold.LLM:
    made = twofold.LLM(folder / "model", enable_lora=True, num_blocks=200)
    for name in ("one", "two"):
        made.load_adapter(name, folder / name)
    return made


def texts(llm: twofold.LLM, **what: Any) -> list[list[str]]:
    params = twofold.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, n=what.pop("n", 1))
    return [[out.text for out in each.outputs] for each in llm.generate(PROMPTS, params, progress=False, **what)]


def test_each_prompt_may_have_its_own(folder: Path, llm: twofold.LLM) -> None:
    whole = {None: texts(llm), "one": texts(llm, adapter="one"), "two": texts(llm, adapter="two")}
    for name in ("one", "two"):
        assert whole[name] == texts(twofold.LLM(folder / f"merged {name}", num_blocks=200))
        assert whole[name] != whole[None]
    who = ["two", None, "one", "two"]
    assert texts(llm, adapter=who) == [whole[name][i] for i, name in enumerate(who)]
    assert texts(llm, adapter="one", n=2) == [text * 2 for text in whole["one"]]


def test_what_is_wrong_is_named_and_nothing_stays_behind(folder: Path, llm: twofold.LLM) -> None:
    with pytest.raises(RequestError, match="did you mean 'one'"):
        texts(llm, adapter="onee")
    with pytest.raises(RequestError, match="2 adapters for 4 prompts"):
        texts(llm, adapter=["one", "two"])
    with pytest.raises(RequestError, match="already"):
        llm.load_adapter("one", folder / "two")
    with pytest.raises(CheckpointError, match="cannot be read"):
        llm.load_adapter("three", folder / "nowhere")
    assert not llm.engine.has_work
    llm.load_adapter("one", folder / "two", replace=True)
    assert texts(llm, adapter="one") == texts(llm, adapter="two")
    llm.load_adapter("one", folder / "one", replace=True)
    plain = twofold.LLM(folder / "model", num_blocks=50)
    with pytest.raises(RequestError, match="enable-lora"):
        texts(plain, adapter="one")
    with pytest.raises(RequestError, match="enable-lora"):
        plain.load_adapter("one", folder / "one")
